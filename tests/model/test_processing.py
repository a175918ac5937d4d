import pytest
import torch

import tiny
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.processing import Processing, Prompt

IMAGE_PAD = "<|image_pad|>"


@pytest.fixture(scope="module")
def processing() -> Processing:
    return tiny.processing()


def test_a_row_is_prefix_image_text_suffix_slots(processing):
    batch = processing([Item("red apple", tiny.picture(0))], "query", num_slots=3)
    ids = batch["input_ids"][0].tolist()
    told = processing.tokenizer.decode(ids[:-3])
    assert told == (
        "<|im_start|>user\n<|vision_start|>" + 4 * IMAGE_PAD + "<|vision_end|>"
        "Query: red apple<|im_end|>\n"
    )
    assert batch["slot_index"].tolist() == [[len(ids) - 3, len(ids) - 2, len(ids) - 1]]
    assert batch["mm_token_type_ids"].sum() == 4


def test_only_queries_get_the_query_words(processing):
    batch = processing([Item("red")], "candidate", num_slots=1)
    assert "Query" not in processing.tokenizer.decode(batch["input_ids"][0])


def test_an_image_alone_gets_the_image_only_words(processing):
    batch = processing([Item(image=tiny.picture(0))], "candidate", num_slots=1)
    assert "Describe the image." in processing.tokenizer.decode(batch["input_ids"][0])


def test_a_users_text_cannot_forge_an_image_placeholder(processing):
    batch = processing([Item(f"a {IMAGE_PAD} b", tiny.picture(0))], "candidate", num_slots=1)
    assert batch["mm_token_type_ids"].sum() == 4


def test_too_long_a_text_is_cut_but_no_image_token_or_slot_is():
    processing = tiny.processing(max_text_tokens=5)
    short = processing([Item("red", tiny.picture(0))], "candidate", num_slots=2)
    long = processing([Item("red " * 1000, tiny.picture(0))], "candidate", num_slots=2)
    assert long["mm_token_type_ids"].sum() == short["mm_token_type_ids"].sum() == 4
    assert long["slot_index"].shape == (1, 2)
    assert long["input_ids"].shape[1] < short["input_ids"].shape[1] + 5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_on_either_side(side):
    processing = tiny.processing(padding_side=side)
    batch = processing([Item("red"), Item("red green blue apple")], "candidate", num_slots=2)
    lengths = batch["attention_mask"].sum(dim=1)
    assert lengths[0] < lengths[1] == batch["input_ids"].shape[1]
    padded = batch["attention_mask"][0, 0 if side == "left" else -1]
    assert padded == 0
    assert (batch["attention_mask"].gather(1, batch["slot_index"]) == 1).all()


def test_what_is_saved_loads_to_the_same_tensors(tmp_path):
    processing = tiny.processing(prompt=Prompt(query="Find: "), max_text_tokens=7)
    processing.save(tmp_path)
    loaded = Processing.load(tmp_path)
    items = [Item("red apple flag moon star sun fish bird"), Item(image=tiny.picture(1))]
    before, after = (p(items, "query", 4) for p in (processing, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_refuses_no_items(processing):
    with pytest.raises(UserError, match="at least one item"):
        processing([], "query", 1)


def test_names_the_folder_without_processor_files(tmp_path):
    (tmp_path / "processing.json").write_text(
        '{"model_type": "qwen2_5_vl", "prompt": {}, "max_text_tokens": 5}'
    )
    with pytest.raises(UserError, match=str(tmp_path)):
        Processing.load(tmp_path)
