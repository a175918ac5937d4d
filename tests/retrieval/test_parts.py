import json

import pytest
import torch

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval import embedding
from metaembed_pl.retrieval.embedding import PartOf
from metaembed_pl.retrieval.parts import PART_FILE, PartNote, merge
from metaembed_pl.retrieval.store import Store


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.embedder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def things(tmp_path_factory):
    """Fifty items, texts and pictures, of which the last but one cannot be read."""
    folder = tmp_path_factory.mktemp("things")
    lines = [{"id": f"{i}", "text": tiny.text(i, 1 + i % 20)} for i in range(50)]
    for i in range(0, 50, 7):
        lines[i] = {"id": f"{i}", "image": f"{i}.png", "metadata": {"number": i}}
        tiny.picture(i).save(folder / f"{i}.png")
    lines[48] = {"id": "48", "image": "broken.png"}
    (folder / "broken.png").write_bytes(b"no picture")
    file = folder / "things.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def run(*arguments):
    return main([str(argument) for argument in arguments])


def embed(model, things, store, *arguments):
    flags = ("--model", model, "--items", things, "--store", store, "--device", "cpu")
    return run("embed", *flags, "--batch-size", 1, "--skip-bad", *arguments)


@pytest.fixture(scope="module")
def whole(model, things, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "s"
    assert embed(model, things, folder) == 0
    return Store.open(folder)


@pytest.fixture(scope="module")
def parts(model, things, tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for number in (1, 2, 3):
        assert embed(model, things, folder / f"{number}", "--part", f"{number}/3") == 0
    return [folder / f"{number}" for number in (1, 2, 3)]


def same(store, whole):
    assert store.ids == whole.ids
    assert torch.equal(store.vectors(), whole.vectors())
    assert store.metadata() == whole.metadata()
    assert store.previews(range(len(store))) == whole.previews(range(len(whole)))
    return store.description.identity == whole.description.identity


def test_parts_merged_in_any_order_are_what_one_process_makes_bit_for_bit(
    whole, parts, tmp_path, capsys
):
    sizes = [len(Store.open(part)) for part in parts]
    assert sum(sizes) == len(whole) == 49
    assert min(sizes) > 5, "each has a share of the work"
    assert run("store", "merge", parts[2], parts[0], parts[1], "--out", tmp_path / "s") == 0
    assert "49 items of 3 parts in" in capsys.readouterr().out
    merged = Store.open(tmp_path / "s")
    assert same(merged, whole)
    query = torch.nn.functional.normalize(torch.randn(1, 4, 32), dim=-1)
    assert merged.search(query).ids == whole.search(query).ids
    merged.add(["new"], torch.nn.functional.normalize(torch.randn(1, 8, 32), dim=-1))
    assert len(Store.open(tmp_path / "s")) == 50


def test_a_part_that_was_stopped_is_not_merged_and_goes_on(
    model, things, whole, parts, tmp_path, monkeypatch, capsys
):
    add, calls = Store.add, []

    def killed(self, *arguments):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        add(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Store, "add", killed)
        assert embed(model, things, tmp_path / "2", "--part", "2/3") == 130
    assert 0 < len(Store.open(tmp_path / "2")) < len(Store.open(parts[1]))
    given = parts[0], tmp_path / "2", parts[2]
    capsys.readouterr()
    assert run("store", "merge", *given, "--out", tmp_path / "s") == 2
    assert f"part 2/3 in {tmp_path / '2'} is not complete" in capsys.readouterr().err
    assert not (tmp_path / "s").exists()
    assert embed(model, things, tmp_path / "2", "--part", "2/3") == 0
    assert run("store", "merge", *given, "--out", tmp_path / "s") == 0
    assert same(Store.open(tmp_path / "s"), whole)


def test_what_is_missing_twice_or_no_part_is_named(whole, parts, tmp_path, capsys):
    for given, message in (
        (parts[:1], "missing: part 2/3, 3/3; expected each of 1/3 to 3/3 exactly once"),
        ([parts[0], parts[1], parts[1]], "missing: part 3/3"),
        ([*parts, whole.folder], f"{whole.folder} is not a part of a store"),
        ([tmp_path / "gone"], "is not a part of a store"),
    ):
        assert run("store", "merge", *given, "--out", tmp_path / "s") == 2
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
        assert not (tmp_path / "s").exists()


def test_a_part_of_another_division_or_model_is_refused(model, things, parts, tmp_path, capsys):
    assert embed(model, things, parts[0], "--part", "1/4") == 2
    assert "is part 1/3 of 50 items in batches of 1, not part 1/4" in capsys.readouterr().err
    assert embed(model, things, tmp_path / "w", "--part", "1/3", "--store-dtype", "int8") == 0
    given = tmp_path / "w", *parts[1:]
    capsys.readouterr()
    assert run("store", "merge", *given, "--out", tmp_path / "s") == 2
    assert "has dtype bf16" in (err := capsys.readouterr().err)
    assert "has int8" in err
    (tmp_path / "w" / PART_FILE).write_text('{"part": "9/3", "items": 1, "batch_size": 1}')
    assert run("store", "merge", *given, "--out", tmp_path / "s") == 2
    assert "part.json is malformed: expected a part such as 3/8" in capsys.readouterr().err


def test_a_whole_store_is_not_taken_for_a_part(model, things, whole, capsys):
    assert embed(model, things, whole.folder, "--part", "1/3") == 2
    assert "has items but is not a part" in capsys.readouterr().err
    assert embed(model, things, "x", "--part", "1/3", "--index") == 2
    assert "--index needs a complete store" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0/3", "4/3", "3", "1/", "a/b", "-1/3"])
def test_a_part_that_is_none_is_refused(text, model, things, tmp_path, capsys):
    assert embed(model, things, tmp_path / "s", f"--part={text}") == 2
    assert f"expected a part such as 3/8, from 1/8 to 8/8; got {text!r}" in capsys.readouterr().err


def test_each_window_is_in_one_part_and_parts_are_alike():
    for of in (1, 2, 7):
        parts = [PartOf(number, of) for number in range(1, of + 1)]
        owners = [[part.number for part in parts if part.has(i, 100)] for i in range(100)]
        assert all(len(owner) == 1 for owner in owners)
        counts = [sum(owner == [part.number] for owner in owners) for part in parts]
        assert max(counts) - min(counts) <= 1
        assert owners == sorted(owners)


def test_what_comes_twice_is_in_the_part_of_the_first(tmp_path):
    model = tiny.embedder()
    items = [{"id": f"{i % 20}", "text": tiny.text(i % 20)} for i in range(40)]
    for number in (1, 2):
        store = Store.open_for(model, tmp_path / f"{number}")
        note = PartNote(f"{number}/2", 40, 1, done=True)
        note.write(store.folder)
        for _ in embedding.embed(store, model, items, 1, part=PartOf(number, 2)):
            pass
    ids = [Store.open(tmp_path / f"{number}").ids for number in (1, 2)]
    assert [*ids[0], *ids[1]] == [f"{i}" for i in range(20)]
    with pytest.raises(UserError, match="give a list of them"):
        for _ in embedding.embed(store, model, iter(items), 1, part=PartOf(1, 2)):
            pass


def test_parts_in_batches_of_different_sizes_are_not_merged(tmp_path):
    # Their windows begin at other places: merged, they would lack items or hold some twice.
    model = tiny.embedder()
    items = [{"id": f"{i}", "text": tiny.text(i)} for i in range(50)]
    for number, batch_size in ((1, 1), (2, 3)):
        store = Store.open_for(model, tmp_path / f"{number}")
        PartNote(f"{number}/2", 50, batch_size, done=True).write(store.folder)
        for _ in embedding.embed(store, model, items, batch_size, part=PartOf(number, 2)):
            pass
    with pytest.raises(UserError, match=r"50 items in batches of 1; .* 50 items in batches of 3"):
        merge([tmp_path / "1", tmp_path / "2"], tmp_path / "s")
    assert not (tmp_path / "s").exists()
