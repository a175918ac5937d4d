"""The rows of data: what each family says of its modules, names and limits is so."""

import re

import pytest
import torch

import tiny
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.family import FAMILIES, family_of

every_family = pytest.mark.parametrize("name", tiny.CONFIGS)


def test_there_is_a_tiny_model_of_every_family():
    assert tiny.CONFIGS.keys() == FAMILIES.keys()


@every_family
def test_the_rows_name_modules_that_are_there(name):
    family, backbone = family_of(name), tiny.embedder(config=tiny.CONFIGS[name]).backbone
    for module in (family.vision_module, family.text_module, family.projector_module):
        assert module is None or backbone.get_submodule(module) is not None
    assert backbone.get_submodule(family.text_module).get_input_embeddings() is (
        backbone.get_input_embeddings()
    )


@every_family
def test_the_patterns_of_lora_hit_linear_layers_of_their_part(name):
    family, backbone = family_of(name), tiny.embedder(config=tiny.CONFIGS[name]).backbone
    modules = dict(backbone.named_modules())
    parts = {family.text_module: family.lora_targets, family.vision_module: family.vision_targets}
    for part, pattern in parts.items():
        hits = [n for n in modules if re.fullmatch(pattern, n)]
        layers = [
            n
            for n, m in modules.items()
            if n.startswith(f"{part}.") and isinstance(m, torch.nn.Linear) and "merger" not in n
        ]
        assert hits == layers != []


def test_names_the_families_for_one_that_is_not_supported():
    with pytest.raises(UserError, match=r"'qwen2_5_v'.*smolvlm; did you mean 'qwen2_5_vl'"):
        family_of("qwen2_5_v")


@pytest.mark.parametrize(
    ("name", "limits", "told"),
    [
        ("qwen2_5_vl", (None, 27 * 28), "at least 784 .* got None and 756"),
        ("qwen2_5_vl", (5000, 4000), r"min_pixels \(5000\) is larger than max_pixels \(4000\)"),
        ("paligemma", (None, 4000), "must be null for this family, got None and 4000"),
        ("mllama", (100, None), "must be null for this family, got 100 and None"),
        ("smolvlm", (None, 700), r"at least 784 \(28 x 28, one tile\), got 700"),
        ("idefics3", (700, None), "min_pixels must be null for this family, got 700"),
    ],
)
def test_refuses_pixel_limits_that_the_family_cannot_keep(name, limits, told):
    with pytest.raises(UserError, match=told):
        family_of(name).image_processor(tiny.CONFIGS[name], *limits)


@pytest.mark.parametrize(("max_pixels", "num_tokens"), [(28 * 28, 4), (56 * 56, 4 * 4 + 4)])
def test_the_limit_bounds_the_tiles(max_pixels, num_tokens):
    config = tiny.CONFIGS["idefics3"]
    processing = tiny.processing(config)
    processing.family.set_up(processing.image_processor, config, None, max_pixels)
    batch = processing.with_slots({"candidate": 1})([Item(image=tiny.picture(1))], "candidate")
    image_id = processing.tokenizer.convert_tokens_to_ids("<image>")
    assert (batch["input_ids"] == image_id).sum() == num_tokens
