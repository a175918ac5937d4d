import json

import pytest
import torch

import tiny
from metaembed_pl import picture
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.family import family_of
from metaembed_pl.model.image_processors import load_image_processor
from metaembed_pl.model.processing import Processing, Prompt
from metaembed_pl.picture import MAX_ASPECT

IMAGE_PAD = "<|image_pad|>"


@pytest.fixture(scope="module")
def processing() -> Processing:
    return tiny.processing()


def test_a_row_is_prefix_image_text_suffix_slots(processing):
    batch = processing.with_slots({"query": 3})([Item("red apple", tiny.picture(0))], "query")
    ids = batch["input_ids"][0].tolist()
    told = processing.tokenizer.decode(ids[:-3])
    assert told == (
        "<|im_start|>user\n<|vision_start|>" + 4 * IMAGE_PAD + "<|vision_end|>"
        "Query: red apple<|im_end|>\n"
    )
    assert batch["slot_index"].tolist() == [[len(ids) - 3, len(ids) - 2, len(ids) - 1]]
    assert batch["mm_token_type_ids"].sum() == 4


def test_only_queries_get_the_query_words(processing):
    batch = processing.with_slots({"candidate": 1})([Item("red")], "candidate")
    assert "Query" not in processing.tokenizer.decode(batch["input_ids"][0])


def test_an_image_alone_gets_the_image_only_words(processing):
    batch = processing.with_slots({"candidate": 1})([Item(image=tiny.picture(0))], "candidate")
    assert "Describe the image." in processing.tokenizer.decode(batch["input_ids"][0])


def test_a_users_text_cannot_forge_an_image_placeholder(processing):
    batch = processing.with_slots({"candidate": 1})(
        [Item(f"a {IMAGE_PAD} b", tiny.picture(0))], "candidate"
    )
    assert batch["mm_token_type_ids"].sum() == 4


def test_too_long_a_text_is_cut_but_no_image_token_or_slot_is():
    processing = tiny.processing(max_text_tokens=5)
    short = processing.with_slots({"candidate": 2})([Item("red", tiny.picture(0))], "candidate")
    long = processing.with_slots({"candidate": 2})(
        [Item("red " * 1000, tiny.picture(0))], "candidate"
    )
    assert long["mm_token_type_ids"].sum() == short["mm_token_type_ids"].sum() == 4
    assert long["slot_index"].shape == (1, 2)
    assert long["input_ids"].shape[1] < short["input_ids"].shape[1] + 5


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_masked_on_either_side(side):
    processing = tiny.processing(padding_side=side)
    batch = processing.with_slots({"candidate": 2})(
        [Item("red"), Item("red green blue apple")], "candidate"
    )
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
    before, after = (p(items, "query") for p in (processing, loaded))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_prompt_given_in_part_keeps_the_rest_of_its_familys():
    processing = tiny.processing(tiny.CONFIGS["mllama"], prompt=Prompt(query="Find: "))
    batch = processing.with_slots({"query": 1})([Item("red")], "query")
    assert processing.tokenizer.decode(batch["input_ids"][0, :-1]) == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nFind: red<|eot_id|>"
    )


def test_refuses_marks_that_the_tokenizer_would_read_as_letters():
    smol = tiny.processing(tiny.CONFIGS["smolvlm"])
    other = tiny.processing(tiny.CONFIGS["paligemma"]).tokenizer  # has an <image>, and no turns
    parts = family_of("idefics3"), other, smol.image_processor
    with pytest.raises(UserError, match=r"idefics3 has <\S+>.* set prompt\.prefix"):
        Processing(*parts)
    batch = Processing(*parts, Prompt(prefix="<bos>", suffix="")).with_slots({"query": 1})(
        [Item("red")], "query"
    )
    assert batch["input_ids"][0, 0] == other.convert_tokens_to_ids("<bos>")


def test_the_tokenizer_tells_which_marks_a_model_has():
    """SmolVLM-Instruct says that it is an Idefics3, and has the marks of SmolVLM."""
    smol = tiny.processing(tiny.CONFIGS["smolvlm"])
    idefics = tiny.processing(tiny.CONFIGS["idefics3"])
    assert idefics.prompt.prefix == "<|begin_of_text|>User:"
    found = Processing(family_of("idefics3"), smol.tokenizer, smol.image_processor)
    items = [Item("red"), Item("blue", image=tiny.picture(1))]
    for name, tensor in smol(items, "query").items():
        assert torch.equal(found(items, "query")[name], tensor), name
    assert Processing(*_parts(found), Prompt(prefix="Ask:")).prompt.suffix == smol.prompt.suffix


def _parts(processing: Processing) -> tuple:
    return processing.family, processing.tokenizer, processing.image_processor


def test_a_prompt_may_be_empty():
    prompt = Prompt(prefix="", query="", image_only="", suffix="")
    batch = tiny.processing(prompt=prompt).with_slots({"query": 1})([Item("red")], "query")
    assert batch["input_ids"].shape == (1, 2)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_the_smallest_picture_is_one_tile_or_one_token(name):
    processing = tiny.processing(tiny.CONFIGS[name])
    smallest = processing.smallest_picture
    if processing.family.packs_images:
        assert smallest["image_grid_thw"].tolist() == [[1, 2, 2]]
    elif name == "mllama":
        assert smallest["aspect_ratio_mask"].sum() == 1
    else:
        assert smallest["pixel_values"].shape[-2:] == (28, 28)
        assert smallest["pixel_values"].numel() == 3 * 28 * 28
    picture = processing.with_slots({"query": 1})([Item(image=tiny.picture(0, (90, 40)))], "query")
    assert smallest.keys() == set(processing.family.picture_inputs) <= picture.keys()


def test_names_the_size_of_an_image_that_cannot_be_prepared(processing, monkeypatch):
    monkeypatch.setattr(picture, "MAX_ASPECT", 1000)
    with pytest.raises(UserError, match=r"images of 300 x 1: .* aspect ratio"):
        processing.with_slots({"query": 1})([Item(image=tiny.picture(0, (300, 1)))], "query")


@pytest.mark.parametrize("name", tiny.CONFIGS)
@pytest.mark.parametrize("size", [(1, 1), (1, 3), (MAX_ASPECT, 1), (25, 25 * MAX_ASPECT)], ids=str)
def test_every_family_takes_any_shape_that_is_read(name, size):
    processing = tiny.processing(tiny.CONFIGS[name])
    batch = processing.with_slots({"candidate": 2})(
        [Item(image=tiny.picture(0, size)), Item("red")], "candidate"
    )
    assert all(x.isfinite().all() for x in batch.values())


def test_an_instruction_is_read_before_the_text_and_in_place_of_none(processing):
    def words(item, side="query"):
        row = processing.with_slots({side: 1})([item], side)["input_ids"][0, :-1]
        return processing.tokenizer.decode(row)

    assert words(Item("red", instruction="Find:")) == words(Item("Find: red"))
    assert words(Item("red", instruction="Find:"), "candidate") == words(
        Item("Find: red"), "candidate"
    )
    picture = tiny.picture(0)
    assert words(Item(image=picture, instruction="Find:")) == words(Item("Find:", picture))
    assert words(Item(image=picture)) != words(Item("Find:", picture))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_an_image_processor_loads_by_any_name_of_its_kind(name, tmp_path):
    processing = tiny.processing(tiny.CONFIGS[name])
    processing.save(tmp_path)
    file = tmp_path / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    kind = settings["image_processor_type"].removesuffix("Pil")
    for named in (kind, f"{kind}Fast", f"{kind}Pil"):
        file.write_text(json.dumps(settings | {"image_processor_type": named}))
        loaded = load_image_processor(str(tmp_path))
        assert type(loaded) is type(processing.image_processor)
        assert loaded.size == processing.image_processor.size
    file.write_text(json.dumps(settings | {"image_processor_type": "CLIPImageProcessor"}))
    with pytest.raises(UserError, match=r"is of CLIPImageProcessor, expected one of Gemma3Image"):
        Processing.load(tmp_path)


def test_refuses_a_tokenizer_without_its_words():
    processing = tiny.processing()
    empty = tiny.train_tokenizer(["red"], 300, family_of("gemma3"))
    with pytest.raises(UserError, match=r"does not know <\|image_pad\|>: are its files missing"):
        Processing(processing.family, empty, processing.image_processor)


def test_refuses_no_items(processing):
    with pytest.raises(UserError, match="at least one item"):
        processing.with_slots({"query": 1})([], "query")


def test_names_the_folder_without_processor_files(tmp_path):
    (tmp_path / "processing.json").write_text(
        '{"model_type": "qwen2_5_vl", "prompt": {}, "max_text_tokens": 5}'
    )
    with pytest.raises(UserError, match=str(tmp_path)):
        Processing.load(tmp_path)
