import torch

import tiny
from metaembed_pl.model.kernels import FP32, PACKED, PatchProjection, set_attention

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
