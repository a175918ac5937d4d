"""Where meta embeddings look: real attention, and nothing else changes."""

import pytest
import torch

import tiny
from metaembed_pl.item import Item
from metaembed_pl.model.patches import patch_attention


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", "qwen3_vl", "paligemma", "gemma3", "idefics3", "smolvlm"]
)
def test_maps_are_shares_of_attention_and_leave_the_model_as_it_was(family):
    model = tiny.embedder(config=tiny.CONFIGS[family])
    item = Item(tiny.text(0), tiny.picture(1, (84, 56)))
    before = model.encode_candidate([item])
    maps = patch_attention(model, item, "candidate")
    assert maps.shape == (8, 2, 3 if family.startswith("qwen") else 2)
    assert (maps > 0).all()
    assert (maps.sum(dim=(1, 2)) < 1).all()
    assert torch.equal(model.encode_candidate([item]), before)


def test_a_meta_token_that_looks_at_one_patch_shows_it():
    """Keys made so that every slot prefers the first image token of the row."""
    model = tiny.embedder()
    item = Item(image=tiny.picture(1, (84, 56)))
    image_id = model.processing.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    row = model.processor()([item], "query")["input_ids"][0]
    first = int((row == image_id).nonzero()[0])

    def prefer(_module, _args, output):
        output = torch.full_like(output, -50.0)
        output[:, first] = 0
        return output

    # Queries of ones, and keys of 0 or -50: attention falls on the key that is 0.
    handles = []
    for layer in model.backbone.language_model.layers:
        attention = layer.self_attn
        handles += [
            attention.q_proj.register_forward_hook(lambda m, a, o: torch.ones_like(o)),
            attention.k_proj.register_forward_hook(prefer),
        ]
    try:
        maps = patch_attention(model, item, "query")
    finally:
        for handle in handles:
            handle.remove()
    assert maps[:, 0, 0].min() > maps.flatten(1)[:, 1:].max()


def test_of_a_picture_in_tiles_the_map_is_of_the_whole_one_after_them():
    model = tiny.embedder(config=tiny.CONFIGS["idefics3"])
    item = Item(image=tiny.picture(0))
    tokens = model.processing.tokenizer
    row = model.processor()([item], "candidate")["input_ids"][0]
    is_image = row == tokens.convert_tokens_to_ids("<image>")
    whole = int((row == tokens.convert_tokens_to_ids("<global-img>")).nonzero())
    maps = patch_attention(model, item, "candidate")
    assert is_image[:whole].any()  # tiles
    assert maps[0].numel() == is_image[whole:].sum()
    # Without position, and with keys that draw all attention there, the maps have all of it.
    text = model.backbone.get_submodule(model.processing.family.text_module)
    places = is_image.clone()
    places[:whole] = False

    def draw(_module, _args, output):
        return torch.where(places[None, :, None], 0.0, torch.full_like(output, -50.0))

    text.rotary_emb.register_forward_hook(
        lambda _m, _a, made: (torch.ones_like(made[0]), torch.zeros_like(made[1]))
    )
    for layer in text.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda _m, _a, o: torch.ones_like(o))
        layer.self_attn.k_proj.register_forward_hook(draw)
    assert patch_attention(model, item, "candidate").sum(dim=(1, 2)).min() > 0.99


def test_no_picture_or_one_outside_of_the_row_has_no_map():
    assert patch_attention(tiny.embedder(), Item("words"), "candidate") is None
    model = tiny.embedder(config=tiny.CONFIGS["mllama"])
    assert patch_attention(model, Item(image=tiny.picture(0)), "candidate") is None
