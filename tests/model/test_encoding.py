import random

import pytest
import torch

import tiny
from metaembed_pl.cli.main import main, one_line
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.encoding import Pace
from metaembed_pl.model.identity import identity_of
from metaembed_pl.model.lora import LoraConfig, adapted_layers, set_trainable
from metaembed_pl.retrieval.embedding import Entry, embed
from metaembed_pl.retrieval.store import Store


def mixed(count):
    """Texts of very different lengths, pictures of two sizes, and both together."""
    items = [Item(tiny.text(i, 1 + (i * 7) % 40)) for i in range(count)]
    sizes = [(56, 56), (84, 28)]
    items += [Item(image=tiny.picture(i, sizes[i % 2])) for i in range(count // 4)]
    items += [Item(tiny.text(i), image=tiny.picture(i)) for i in range(count // 8)]
    random.Random(0).shuffle(items)
    return items


def test_vectors_come_in_the_items_own_order_as_if_each_was_encoded_alone():
    model, items = tiny.embedder(), mixed(40)
    alone = torch.cat([model.encode_candidate([item]) for item in items])
    for batch_size in (1, 3, 32):
        together = model.encode_candidate(items, batch_size)
        assert torch.nn.functional.cosine_similarity(together, alone, dim=-1).min() > 0.99999


def test_a_chunk_keeps_to_its_tokens_and_holds_little_padding():
    process, items = tiny.embedder().processor(), mixed(64)
    together = process(items, "candidate")
    used = together["attention_mask"].sum().item()
    chunks = process.prepared(items, "candidate", 256).chunks
    sizes = [chunk.inputs["input_ids"].numel() for chunk in chunks]
    assert max(sizes) <= 256
    assert sorted(torch.cat([chunk.rows for chunk in chunks]).tolist()) == [*range(len(items))]
    assert used <= sum(sizes) < 1.15 * used
    assert together["input_ids"].numel() > 1.5 * used


def test_a_window_of_pictures_is_shorter_than_one_of_texts():
    windows = Pace(2).windows([*"tttpptt", *"t" * 20], lambda item: item == "t")
    assert ["".join(window) for window in windows] == ["tttp", "ptt" + "t" * 6, "t" * 14]


def stored(folder, model, items, **settings):
    store = Store.open_for(model, folder, "fp32")
    for _ in embed(store, model, items, Pace(2, 256, **settings)):
        pass
    return store


def test_workers_give_the_same_vectors_bit_for_bit(tmp_path):
    model, items = tiny.embedder(), mixed(20)
    alone = stored(tmp_path / "alone", model, items)
    shared = stored(tmp_path / "shared", model, items, num_workers=2)
    assert shared.ids == alone.ids == [item.uid for item in items]
    assert torch.equal(shared.vectors(), alone.vectors())
    assert shared.previews(range(len(shared))) == alone.previews(range(len(alone)))


def test_a_bad_item_in_a_worker_is_one_line_and_what_came_before_is_kept(tmp_path):
    model = tiny.embedder()
    items = [Item(image=tiny.picture(i), id=f"{i}") for i in range(7)]
    items[5] = Item(image=b"no picture", id="5")
    store = Store.open_for(model, tmp_path / "s")
    with pytest.raises(UserError) as found:
        for _ in embed(store, model, items, Pace(2, num_workers=2)):
            pass
    assert one_line(found.value).startswith("item '5': ")
    assert store.ids == ["0", "1", "2", "3"]
    for done in embed(store, model, items, Pace(2, num_workers=2), skip_bad=True):
        reason = (
            one_line(found.value)
            .removeprefix("item '5': ")
            .removesuffix("; skip it with --skip-bad (skip_bad=True)")
        )
        assert done.skipped in ([], [f"5: {reason}"])
    assert store.ids == ["0", "1", "2", "3", "4", "6"]


def test_a_run_that_goes_on_gives_the_model_the_same_windows(tmp_path):
    model, items = tiny.embedder(), mixed(40)
    whole = stored(tmp_path / "whole", model, items)
    store = Store.open_for(model, tmp_path / "cut", "fp32")
    for done in embed(store, model, items, Pace(2, 256)):
        if done.embedded >= 15:
            break  # as one that was killed
    store = stored(tmp_path / "cut", model, items)
    assert store.ids == whole.ids
    assert torch.equal(store.vectors(), whole.vectors())


def test_few_new_items_among_many_old_ones_share_a_window(tmp_path):
    model = tiny.embedder()
    items = [Entry.of({"id": f"{i:03}", "text": tiny.text(i)}) for i in range(160)]
    store = stored(tmp_path / "s", model, items[::10] + items[1::10] + items[2::10])
    done = [progress.embedded for progress in embed(store, model, items[:80], Pace(1))]
    assert done == [8, 16, 24, 32, 40, 48, 56, 56]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with an adapter that changes the vectors, and the model that was saved."""
    torch.manual_seed(0)
    model = tiny.embedder()
    set_trainable(model.backbone, model.processing.family, LoraConfig(r=4, alpha=8), False)
    for layer in adapted_layers(model.backbone).values():
        torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.1)
    folder = tmp_path_factory.mktemp("adapter") / "model"
    model.eval().save_pretrained(folder)
    return folder, model


def test_verbs_merge_an_adapter_in_memory_and_the_store_stays_the_models(adapter, tmp_path):
    from argparse import ArgumentParser

    from metaembed_pl.cli.model import add_model_arguments, load_model

    folder, model = adapter
    parser = ArgumentParser()
    add_model_arguments(parser)
    merged = load_model(parser.parse_args(["--model", str(folder), "--device", "cpu"]))
    assert adapted_layers(model.backbone)
    assert not adapted_layers(merged.backbone)
    assert identity_of(merged) == identity_of(model)
    items = mixed(8)
    cosines = torch.nn.functional.cosine_similarity(
        merged.encode_query(items), model.encode_query(items), dim=-1
    )
    assert cosines.min() > 0.99999
    plain = tiny.embedder()
    assert not torch.allclose(plain.encode_query(items), model.encode_query(items), atol=1e-2)
    assert merged.backbone.dtype == torch.float32
    half = load_model(
        parser.parse_args(["--model", str(folder), "--device", "cpu", "--dtype", "bf16"])
    )
    assert half.backbone.dtype == torch.bfloat16
    assert identity_of(half) == identity_of(model)


@pytest.mark.parametrize("verb", ["embed", "evaluate", "search", "serve", "mine", "index"])
def test_every_verb_takes_the_same_flags_for_its_model(verb, capsys):
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    out = " ".join(capsys.readouterr().out.split())
    for flag in ("--model FOLDER", "--revision NAME", "--device NAME", "--dtype {bf16,fp32}"):
        assert flag in out
    assert "--attention {sdpa,sdpa_fp32,flash_attention_2,eager}" in out
    assert "--compile" in out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "int8"], "int8 is a dtype for stored vectors: use --store-dtype int8"),
        (["--dtype", "half"], "expected bf16 or fp32, got 'half'"),
        (["--attention", "fast"], "invalid choice: 'fast'"),
    ],
)
def test_a_flag_that_is_not_valid_says_what_is(flags, message, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["embed", "--model", "m", "--items", "i", "--store", "s", *flags])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--batch-size", "--chunk-tokens"])
def test_a_count_below_one_is_refused_before_the_model_is_loaded(flag, tmp_path, capsys):
    items = tmp_path / "items.jsonl"
    items.write_text('"a cat"\n')
    command = ["embed", "--model", "nowhere", "--items", str(items), "--store", "s", flag, "0"]
    assert main(command) == 2
    assert f"{flag} must be at least 1, got 0" in capsys.readouterr().err


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    items = tmp_path / "items.jsonl"
    items.write_text('"a cat"\n')
    command = ["embed", "--model", str(tmp_path), "--items", str(items), "--store", "s"]
    assert main(command) == 2
    assert "is not a model folder" in capsys.readouterr().err
