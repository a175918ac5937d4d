from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_position_ids,
    get_vision_window_index,
)

import tiny
from metaembed_pl.model.backbone import BackboneConfig, ScratchTokenizer, build_backbone
from metaembed_pl.model.kernels import (
    FP32,
    PACKED,
    PatchProjection,
    _with_places,
    set_attention,
)

ITEMS = [
    {"image": tiny.picture(1)},
    {"image": tiny.picture(2, (84, 84))},
    {"image": tiny.picture(3, (140, 28)), "text": "red"},
    {"image": tiny.picture(4)},
]


def test_packed_attention_equals_one_call_an_image():
    model = tiny.embedder()
    assert model.backbone.visual.config._attn_implementation == PACKED
    packed = model.encode_candidate(ITEMS)
    model.backbone.visual.config._attn_implementation = "sdpa"
    torch.testing.assert_close(packed, model.encode_candidate(ITEMS), atol=1e-6, rtol=0)


def test_packed_attention_has_the_same_gradient():
    gradients = []
    for name in (PACKED, "sdpa"):
        model = tiny.embedder()
        model.backbone.visual.config._attn_implementation = name
        batch = model.processor()([tiny.Item.parse(item) for item in ITEMS], "candidate")
        model(batch, "candidate")[:, :, 0].sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.backbone.visual.parameters()]))
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_fp32_attention_changes_nothing_in_an_fp32_model():
    model = tiny.embedder()
    before = model.encode_candidate(ITEMS)
    set_attention(model.backbone, FP32, model.processing.family)
    torch.testing.assert_close(model.encode_candidate(ITEMS), before, atol=1e-6, rtol=0)


def test_fp32_attention_runs_under_autocast():
    model = tiny.embedder()
    before = model.encode_candidate(ITEMS)
    set_attention(model.backbone, FP32, model.processing.family)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        after = model.encode_candidate(ITEMS)
    torch.testing.assert_close(after, before, atol=0.02, rtol=0)


def test_the_patch_projection_equals_the_convolution():
    model = tiny.embedder()
    projection = model.backbone.visual.patch_embed.proj
    assert type(projection) is PatchProjection
    fast = model.encode_candidate(ITEMS)
    projection.__class__ = torch.nn.Conv3d
    torch.testing.assert_close(fast, model.encode_candidate(ITEMS), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_what_is_looked_up_of_an_image_is_what_its_model_finds(name):
    model = tiny.embedder(config=tiny.CONFIGS[name])
    looked_up = model.encode_candidate(ITEMS)
    (hook,) = model.backbone.visual._forward_pre_hooks
    assert model.backbone.visual._forward_pre_hooks.pop(hook) is _with_places
    assert torch.equal(looked_up, model.encode_candidate(ITEMS))


def test_places_are_those_of_the_library_for_images_of_many_sizes():
    sizes = SimpleNamespace(spatial_merge_size=2, window_size=112, patch_size=14)
    chance = torch.Generator().manual_seed(0)
    for _ in range(20):
        sides = 2 * torch.randint(1, 14, (5, 2), generator=chance)
        grids = torch.cat([torch.randint(1, 3, (5, 1), generator=chance), sides], dim=1)
        _, found = _with_places(SimpleNamespace(config=sizes), (), {"grid_thw": grids})
        order, ends = get_vision_window_index(grids, 2, 112, 14)
        expected = {"position_ids": get_vision_position_ids(grids, 2)}
        expected |= {"window_index": order, "cu_window_seqlens": ends, "grid_thw": grids}
        expected |= {"cu_seqlens": get_vision_cu_seqlens(grids)}
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name], tensor), name
            assert found[name].dtype == tensor.dtype, name


def test_a_size_first_seen_in_inference_can_be_trained_on():
    model = tiny.embedder()
    item = tiny.Item(image=tiny.picture(5, (84, 28)))
    model.encode_candidate([item])
    model(model.processor()([item], "candidate"), "candidate").sum().backward()
    assert model.backbone.visual.patch_embed.proj.weight.grad.any()


@pytest.mark.parametrize("attention", ["eager", "sdpa", "sdpa_fp32"])
def test_patches_are_projected_by_one_product_whatever_the_attention(attention):
    config = BackboneConfig(
        scratch=tiny.QWEN25_VL, tokenizer=ScratchTokenizer(300, ["unused"]), attention=attention
    )
    backbone = build_backbone(config, tiny.processing())
    assert type(backbone.visual.patch_embed.proj) is PatchProjection


class Waits(TorchDispatchMode):
    """Counts operations whose result decides a shape: a GPU's answer would be waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten._unique2, torch.ops.aten.nonzero)
        return func(*args, **(kwargs or {}))


def test_lengths_are_looked_through_once_a_forward_pass_and_not_in_each_layer():
    counts = []
    for depth in (2, 6):
        vision = tiny.QWEN25_VL["vision_config"] | {"depth": depth, "fullatt_block_indexes": [1, 3]}
        model = tiny.embedder(config=tiny.QWEN25_VL | {"vision_config": vision})
        batch = model.processor()([tiny.Item.parse(item) for item in ITEMS], "candidate")
        with Waits() as waits:
            model(batch, "candidate")
        counts.append(waits.count)
    assert counts[0] == counts[1] > 0
