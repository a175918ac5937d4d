"""Every family, on a tiny model made from scratch: what a retriever needs of its backbone."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
)
from transformers.masking_utils import flash_attention_mask

import tiny
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.backbone_options import checkpoint_activations
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.family import family_of
from metaembed_pl.model.kernels import FP32, PACKED, set_attention
from metaembed_pl.model.weights import load_backbone

NAMES = list(tiny.CONFIGS)
QWEN = [name for name in NAMES if family_of(name).packs_images]
TEXTS = [Item("red apple"), Item("a text that is a good deal longer than the others are")]
ITEMS = [
    TEXTS[0],
    Item(image=tiny.picture(1)),
    Item("blue flag moon star", tiny.picture(2, (84, 56))),
    TEXTS[1],
    Item(image=tiny.picture(3, (28, 84))),
]

every_family = pytest.mark.parametrize("name", NAMES)
# transformers 5.17 calls its own mllama by an old name.
pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")


def loud(name: str, **settings) -> MetaEmbedder:
    """A model in which everything counts: no gate is shut, and no layer adds next to nothing."""
    model = tiny.embedder(config=tiny.CONFIGS[name], layout="both", **settings)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 or not weight.any():
                weight.normal_(std=weight.shape[-1] ** -0.5, generator=generator)
    return model


def batch_of(model, items, side="candidate"):
    return model.processor()(items, side)


@every_family
@pytest.mark.parametrize("side", ["query", "candidate"])
def test_neighbours_batch_size_and_padding_side_change_nothing(name, side):
    model = loud(name)
    encode = model.encode_query if side == "query" else model.encode_candidate
    together = encode(ITEMS)
    alone = torch.cat([encode([item]) for item in ITEMS])
    in_pairs = encode(ITEMS, batch_size=2)
    model.processing.padding_side = "left"
    left = encode(ITEMS)
    for other in (alone, in_pairs, left):
        torch.testing.assert_close(other, together, atol=1e-5, rtol=0)


@every_family
def test_chunks_change_nothing(name):
    model = loud(name)
    together = model.encode_candidate(ITEMS)
    lengths = batch_of(model, ITEMS)["attention_mask"].sum(dim=1)
    limit = 2 * int(lengths.max())
    chunks = model.processor().in_chunks(ITEMS, "candidate", limit)
    assert sorted(torch.cat([chunk.rows for chunk in chunks]).tolist()) == list(range(len(ITEMS)))
    assert len(chunks) > 1
    for chunk in chunks:
        with torch.no_grad():
            found = model(chunk.inputs, "candidate")
        torch.testing.assert_close(found, together[chunk.rows], atol=1e-5, rtol=0)
        rows, length = chunk.inputs["attention_mask"].shape
        assert len(chunk.rows) * length <= limit
        assert rows == len(chunk.rows)


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("side", ["query", "candidate"])
def test_packed_rows_change_nothing(name, side):
    """With flash attention's positions; sdpa makes a mask of blocks of them."""
    model = loud(name).train()
    checkpoint_activations(model.backbone)
    for items in (ITEMS, TEXTS):
        found = []
        for packs in (False, True):
            model.packs = packs
            model.zero_grad()
            embeddings = model(batch_of(model, items, side), side)
            weights = torch.linspace(-1, 1, embeddings.numel())
            (embeddings.flatten() * weights).sum().backward()
            gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            found.append((embeddings.detach(), gradients))
        (plain, of_plain), (ours, of_ours) = found
        torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)
        largest = max(float(gradient.abs().max()) for gradient in of_plain.values())
        assert of_ours.keys() == of_plain.keys()
        worst = max(float((of_ours[n] - of_plain[n]).abs().max()) for n in of_plain)
        assert worst <= 1e-5 * largest


def varlen_by_hand(module, query, key, value, attention_mask, *, cu_seq_lens_q, scaling, **rest):
    """What flash attention computes of packed rows, from what transformers hands to it."""
    assert attention_mask is None
    assert torch.equal(cu_seq_lens_q, rest["cu_seq_lens_k"])
    lengths = cu_seq_lens_q.diff()
    assert rest["max_length_q"] == rest["max_length_k"] == lengths.max()
    parts = [
        torch.nn.functional.scaled_dot_product_attention(
            *row, is_causal=True, scale=scaling, enable_gqa=True
        )
        for row in zip(
            *(t.split(lengths.tolist(), dim=2) for t in (query, key, value)), strict=True
        )
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


@pytest.mark.parametrize("name", QWEN)
def test_packed_rows_change_nothing_where_attention_goes_by_lengths(name):
    AttentionInterface.register("flash_by_hand", varlen_by_hand)
    AttentionMaskInterface.register("flash_by_hand", flash_attention_mask)
    model = loud(name)
    batch = batch_of(model, ITEMS)
    with torch.no_grad():
        plain = model(batch, "candidate")
        model.packs = True
        text = model.backbone.get_submodule(model.processing.family.text_module)
        text.config._attn_implementation = "flash_by_hand"
        ours = model(batch, "candidate")
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=0)


def test_flash_attention_packs_where_the_family_can():
    for name in NAMES:
        model = tiny.embedder(config=tiny.CONFIGS[name])
        assert not model.packs
        model.backbone.config._attn_implementation_internal = "flash_attention_2"
        again = MetaEmbedder(model.backbone, model.processing, ["1x1"])
        assert again.packs == (name in QWEN)


@every_family
def test_a_row_that_shows_nothing_is_encoded_and_short(name):
    model = loud(name)
    for side in ("query", "candidate"):
        inputs = model.processor().smallest_row(side)
        assert inputs["input_ids"].shape == (1, model.meta_tokens.num_slots(side) + 1)
        with torch.no_grad():
            assert model(inputs, side).isfinite().all()


@every_family
def test_every_meta_token_sees_image_and_text(name):
    model = loud(name)
    items = [
        Item("red moon", tiny.picture(1)),
        Item("red star", tiny.picture(1)),
        Item("red moon", tiny.picture(2)),
    ]
    first, other_text, other_image = model.encode_candidate(items)
    for other in (other_text, other_image):
        assert (first - other).norm(dim=-1).min() > 1e-3


def test_meta_tokens_of_mllama_see_the_tiles_of_their_own_image():
    """They stand behind the image, as the text does; a row without an image sees none."""
    model = tiny.embedder(config=tiny.CONFIGS["mllama"])
    items = [TEXTS[0], Item(image=tiny.picture(1, (28, 28))), Item(image=tiny.picture(2, (56, 28)))]
    batch = batch_of(model, items)
    mask, slots = batch["cross_attention_mask"][:, :, 0], batch["slot_index"]
    for row, num_tiles in enumerate([0, 1, 2]):
        expected = [1] * num_tiles + [0] * (4 - num_tiles)
        assert mask[row, slots[row]].tolist() == [expected] * slots.shape[1]


@every_family
def test_fewer_meta_tokens_give_a_prefix_of_more(name):
    large, small = loud(name, groups=("1x1", "4x8")), loud(name, groups=("1x1", "4x2"))
    small.backbone.load_state_dict(large.backbone.state_dict())
    with torch.no_grad():
        small.meta_tokens.embedding.weight.copy_(large.meta_tokens.embedding.weight[:6])
    more = large.encode_candidate(ITEMS)
    torch.testing.assert_close(small.encode_candidate(ITEMS), more[:, :2], atol=1e-5, rtol=0)


@every_family
def test_plain_transformers_gives_the_same_vectors(name):
    """The reference: meta tokens as rows of the vocabulary, the library's forward, one item."""
    model = loud(name)
    table = model.backbone.get_input_embeddings().weight
    ours, before = model.encode_candidate(ITEMS), table.detach().clone()
    for item, expected in zip(ITEMS, ours, strict=True):
        batch = batch_of(model, [item])
        slots = batch.pop("slot_index")
        batch.pop("image_rows", None)
        used = set(batch["input_ids"].flatten().tolist())
        spare = [i for i in range(len(model.processing.tokenizer)) if i not in used][-12:]
        with torch.no_grad():
            table.copy_(before)
            table[spare] = model.meta_tokens.embedding.weight
            batch["input_ids"].scatter_(1, slots, torch.tensor([spare]))
            hidden = model.backbone(**batch, use_cache=False).last_hidden_state
        found = torch.nn.functional.normalize(hidden[0, slots[0, 4:]], dim=-1)
        torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)


def _positions(types: list[int], grid: list[int], merge: int) -> list[list[int]]:
    """M-RoPE as Qwen2-VL defines it, token by token, for a row with at most one image."""
    _, height, width = grid
    columns, rows = width // merge, height // merge
    found, at, num_seen = [], 0, 0
    for kind in types:
        if kind == 0:
            at += max(rows, columns) if num_seen == rows * columns else 0
            num_seen = 0
            found.append([at] * 3)
            at += 1
        else:
            found.append([at, at + num_seen // columns, at + num_seen % columns])
            num_seen += 1
    return found


@pytest.mark.parametrize("name", QWEN)
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_positions_are_those_of_the_library_and_the_definition(name, padding_side):
    model = tiny.embedder(config=tiny.CONFIGS[name], padding_side=padding_side)
    batch, seen = batch_of(model, ITEMS), {}
    model.backbone.language_model.register_forward_pre_hook(
        lambda _module, _args, inputs: seen.update(inputs), with_kwargs=True
    )
    model(batch, "candidate")
    grids = iter(batch["image_grid_thw"])
    for row, item in enumerate(ITEMS):
        kept = batch["attention_mask"][row].bool()
        types = batch["mm_token_type_ids"][row, kept]
        grid = torch.tensor([1, 0, 0]) if item.image is None else next(grids)
        found = seen["position_ids"][:, row, kept]
        assert found.T.tolist() == _positions(types.tolist(), grid.tolist(), merge=2)
        library, _ = model.backbone.get_rope_index(
            batch["input_ids"][row, kept][None],
            image_grid_thw=grid[None],
            mm_token_type_ids=types[None],
        )
        assert torch.equal(found, library[:, 0])


@every_family
def test_every_weight_has_a_gradient_at_step_two(name):
    model = loud(name).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        optimizer.zero_grad()
        _some_loss(model, ITEMS, ITEMS[1:4]).backward()
        if step == 0:
            optimizer.step()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # Without positions, a bias of all keys adds the same to all logits: its gradient is zero.
    assert not [name for name in silent if not name.endswith("k_proj.bias")]


def _some_loss(model, queries, candidates):
    found = [
        model(batch_of(model, items, side), side).flatten(0, 1)
        for side, items in (("query", queries), ("candidate", candidates))
    ]
    return (found[0] @ found[1].T).square().mean()


@every_family
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients = []
    for recomputed in (False, True):
        model = loud(name).train()
        if recomputed:
            checkpoint_activations(model.backbone)
        _some_loss(model, ITEMS, ITEMS).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


@every_family
def test_a_saved_model_loads_to_the_same_vectors(name, tmp_path):
    model = loud(name)
    model.save_pretrained(tmp_path / "model")
    loaded = MetaEmbedder.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.encode_candidate(ITEMS), model.encode_candidate(ITEMS))


@every_family
@pytest.mark.filterwarnings("ignore")
def test_a_model_with_a_missing_weight_is_refused(name, tmp_path):
    loud(name).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "backbone" / "model.safetensors"
    weights = load_file(file)
    gone = next(n for n in weights if family_of(name).vision_module in n and n.endswith(".weight"))
    del weights[gone]
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing .*weight"):
        MetaEmbedder.from_pretrained(tmp_path / "model")


@every_family
def test_a_generative_checkpoint_loads_whole(name, tmp_path):
    config = loud(name).backbone.config
    # Without its attention, which is not the library's.
    config = type(config).from_dict(config.to_dict())
    generative = AutoModelForImageTextToText.from_config(config)
    generative.save_pretrained(tmp_path)
    loaded = load_backbone(str(tmp_path)).state_dict()
    expected = generative.model.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in expected)


@every_family
def test_attention_in_fp32_changes_nothing_in_an_fp32_model(name):
    model = loud(name)
    before = model.encode_candidate(ITEMS)
    set_attention(model.backbone, FP32, model.processing.family)
    torch.testing.assert_close(model.encode_candidate(ITEMS), before, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", QWEN)
def test_packed_attention_and_patches_equal_the_librarys(name):
    model = loud(name)
    assert model.backbone.visual.config._attn_implementation == PACKED
    fast = model.encode_candidate(ITEMS)
    model.backbone.visual.config._attn_implementation = "sdpa"
    model.backbone.visual.patch_embed.proj.__class__ = torch.nn.Conv3d
    torch.testing.assert_close(fast, model.encode_candidate(ITEMS), atol=1e-5, rtol=0)
