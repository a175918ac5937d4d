import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from metaembed_pl.budget import parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval import writing
from metaembed_pl.retrieval.manifest import Manifest
from metaembed_pl.retrieval.store import Store
from unchecked import shapes_unchecked

GROUPS = parse_groups(["1x1", "2x4", "4x8"])
WIDTH = 16
# How far a stored component may be from what was given, in parts of the vector's largest.
ROUNDING = {"fp32": 2**-24, "bf16": 2**-8, "fp16": 2**-11, "int8": 0.51 / 127}


def vectors(count, num_vectors=8, seed=0):
    random_vectors = torch.randn(
        count, num_vectors, WIDTH, generator=torch.Generator().manual_seed(seed)
    )
    return torch.nn.functional.normalize(random_vectors, dim=-1)


def new_store(folder, dtype="bf16", count=0):
    store = Store.create(folder, GROUPS, WIDTH, "some model", dtype)
    if count:
        ids = [f"item {i}" for i in range(count)]
        store.add(ids, vectors(count), [{"n": i} for i in range(count)])
    return store


@pytest.mark.parametrize("dtype", ROUNDING)
def test_gives_back_what_was_added(tmp_path, dtype):
    store = new_store(tmp_path / "s", dtype)
    given = vectors(7)
    store.add(["a", "b", "c"], given[:3], [{"n": 1}, None, {"n": [3]}], [b"jpeg", None, None])
    store.add(["d", "e", "f", "g"], given[3:])
    for opened in (store, Store.open(tmp_path / "s")):
        assert opened.ids == list("abcdefg")
        assert len(opened) == 7
        assert opened.metadata([0, 2, 4]) == [{"n": 1}, {"n": [3]}, {}]
        assert opened.previews([0, 1]) == [b"jpeg", None]
        largest = given.abs().amax(dim=2, keepdim=True)
        assert ((opened.vectors() - given).abs() <= ROUNDING[dtype] * largest).all()
        assert torch.equal(opened.vectors([5, 1], 4), opened.vectors()[[5, 1], :4])
        assert (opened.groups, opened.width, opened.dtype) == (GROUPS, WIDTH, dtype)


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
def test_a_thousand_random_changes_leave_what_a_dictionary_would_hold(tmp_path, dtype, monkeypatch):
    monkeypatch.setattr(writing, "COPIED_AT_A_TIME", 7)
    # Waiting for the disk is what the other tests are for.
    monkeypatch.setattr("os.fsync", lambda file: None)
    rng, known = random.Random(0), {}
    store = new_store(tmp_path / "s", dtype)
    pool = vectors(64)
    for step in range(1000):
        kind = rng.choices(["add", "delete", "reopen", "compact"], [60, 25, 10, 5])[0]
        if kind == "add":
            ids = [str(number) for number in rng.sample(range(40), rng.randint(1, 5))]
            chosen = [rng.randrange(64) for _ in ids]
            store.add(ids, pool[chosen], [{"step": step, "vector": i} for i in chosen])
            for id, i in zip(ids, chosen, strict=True):
                known.pop(id, None)
                known[id] = {"step": step, "vector": i}
        elif kind == "delete" and known:
            ids = rng.sample(sorted(known), rng.randint(1, min(3, len(known))))
            store.delete(ids)
            for id in ids:
                del known[id]
        elif kind == "reopen":
            store = Store.open(tmp_path / "s")
        elif kind == "compact":
            store.compact()
        assert len(store) == len(known)
        if step % 10 == 0:
            assert store.ids == list(known)
            assert store.metadata() == list(known.values())
            given = pool[[value["vector"] for value in known.values()]]
            assert torch.allclose(store.vectors(), given, atol=0.01)
            assert store.rows_of(known) == list(range(len(known)))
    assert len(known) > 10
    assert len(list((tmp_path / "s").glob("data-*"))) == 1


def test_a_replaced_item_moves_to_the_end_with_new_vectors(tmp_path):
    store = new_store(tmp_path / "s", count=3)
    store.add(["item 1"], vectors(1, seed=9), [{"new": True}])
    assert store.ids == ["item 0", "item 2", "item 1"]
    assert store.metadata([2]) == [{"new": True}]
    assert (store.vectors([2]) - vectors(1, seed=9)).abs().max().item() < 0.01
    assert "item 1" in store
    assert "item 9" not in store


def test_compaction_frees_the_bytes_of_deleted_items(tmp_path):
    store = new_store(tmp_path / "s", count=10)
    store.delete([f"item {i}" for i in range(8)])
    before, kept = data_bytes(tmp_path / "s"), store.vectors()
    store.compact()
    assert torch.equal(store.vectors(), kept)
    assert data_bytes(tmp_path / "s") < before / 2
    assert Store.open(tmp_path / "s").ids == ["item 8", "item 9"]


def data_bytes(folder):
    return sum(file.stat().st_size for file in folder.rglob("*.bf16"))


def test_a_small_budget_reads_few_files(tmp_path):
    """Those of the larger groups may even be gone."""
    new_store(tmp_path / "s", count=4)
    sizes = {
        file.name: file.stat().st_size for file in sorted((tmp_path / "s/data-0000").glob("*.bf16"))
    }
    row = 4 * WIDTH * 2
    assert sizes == {
        "slots-000-000.bf16": row,
        "slots-001-003.bf16": 3 * row,
        "slots-004-007.bf16": 4 * row,
    }


def test_a_reader_goes_on_with_what_it_opened(tmp_path):
    writer = new_store(tmp_path / "s", count=5)
    reader = Store.open(tmp_path / "s")
    before = reader.vectors()
    writer.add(["another"], vectors(1))
    writer.delete(["item 0", "item 1"])
    writer.compact()
    assert reader.ids == [f"item {i}" for i in range(5)]
    assert torch.equal(reader.vectors(), before)
    assert reader.metadata([4]) == [{"n": 4}]
    assert Store.open(tmp_path / "s").ids == ["item 2", "item 3", "item 4", "another"]


def test_a_writer_goes_on_from_what_another_wrote(tmp_path):
    first = new_store(tmp_path / "s", count=2)
    second = Store.open(tmp_path / "s")
    first.add(["a"], vectors(1))
    second.add(["a", "b"], vectors(2, seed=1))
    first.delete(["item 0"])
    assert first.ids == Store.open(tmp_path / "s").ids == ["item 1", "a", "b"]


def test_one_process_writes_at_a_time(tmp_path):
    store = new_store(tmp_path / "s", count=2)
    with (
        Store.open(tmp_path / "s").writing(),
        pytest.raises(UserError, match=r"another process is writing to .*/s: wait"),
    ):
        store.delete(["item 0"])
    store.delete(["item 0"])
    assert store.ids == ["item 1"]


@pytest.mark.parametrize("what", ["kill_at_random", "kill_at_every_step", "read_beside_a_writer"])
def test_killed_at_any_moment_or_read_meanwhile_it_is_whole(tmp_path, what):
    """See store_changes.py."""
    store, given = new_store(tmp_path / "s"), vectors(1)
    store.add(["first"], given, [{"check": given[0, 0, 0].item()}])
    command = [sys.executable, Path(__file__).parents[1] / "store_changes.py", what, tmp_path / "s"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stdout, done.stderr) == ("fine\n", "")


def test_what_a_killed_writer_left_behind_does_not_count(tmp_path):
    store = new_store(tmp_path / "s", count=3)
    for file in (tmp_path / "s" / "data-0000").iterdir():
        with file.open("ab") as opened:
            opened.write(b"\xff" * 1000)
    assert Store.open(tmp_path / "s").ids == store.ids
    store.add(["more"], vectors(1, seed=5), [{"n": 9}])
    again = Store.open(tmp_path / "s")
    assert again.ids == ["item 0", "item 1", "item 2", "more"]
    assert (again.vectors([3]) - vectors(1, seed=5)).abs().max().item() < 0.01
    assert again.metadata([3]) == [{"n": 9}]


@pytest.mark.parametrize("name", ["slots-001-003.bf16", "rows.arrows", "deleted.i64"])
def test_refuses_a_file_that_was_cut_off(tmp_path, name):
    store = new_store(tmp_path / "s", count=3)
    store.delete(["item 1"])
    file = tmp_path / "s" / "data-0000" / name
    size = file.stat().st_size
    with file.open("r+b") as opened:
        opened.truncate(size - 1)
    with pytest.raises(UserError, match=rf"{name} has {size - 1:,} bytes, .* counts {size:,}"):
        Store.open(tmp_path / "s")
    file.unlink()
    with pytest.raises(UserError, match=rf"{name} has 0 bytes"):
        Store.open(tmp_path / "s")


def test_a_file_cut_off_while_it_is_read_is_told_and_no_end_of_the_process(tmp_path):
    """Reading a mapped file beyond its end would kill this process, and so fail all its tests."""
    store = new_store(tmp_path / "s", count=3000)
    copies = {file: file.read_bytes() for file in (tmp_path / "s" / "data-0000").iterdir()}
    expected, metadata = store.vectors(), store.metadata()
    reads = (
        store.vectors,
        store.metadata,
        lambda: store.search(vectors(1, 4), "4x8"),
        lambda: list(store.scores(vectors(1, 4))),
        lambda: store.previews([2999]),
    )
    for file, content in copies.items():
        os.truncate(file, 100)
        for read in reads:
            with pytest.raises(UserError, match=rf"{file.name} has 100 bytes, its store's"):
                read()
        file.write_bytes(content)
    assert torch.equal(store.vectors(), expected)
    assert store.metadata() == metadata


def test_refuses_rows_that_are_damaged(tmp_path):
    new_store(tmp_path / "s", count=3)
    file = tmp_path / "s" / "data-0000" / "rows.arrows"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(UserError, match=r"rows.arrows (is damaged|holds 0 rows)"):
        Store.open(tmp_path / "s")


@pytest.mark.parametrize(
    "read", [lambda store: store.compact(), lambda store: store.search(vectors(1, 4), where="n=1")]
)
def test_damaged_metadata_do_not_kill_the_process(tmp_path, read):
    new_store(tmp_path / "s", count=3)
    file = tmp_path / "s" / "data-0000" / "rows.arrows"
    ends = struct.pack("<4q", 0, 8, 16, 24)  # of the texts {"n": 0}, ...
    assert file.read_bytes().count(ends) == 1
    file.write_bytes(file.read_bytes().replace(ends, struct.pack("<4q", 0, 8, 16, 10**13)))
    with pytest.raises(UserError, match="the column 'metadata' of a store's rows is damaged"):
        read(Store.open(tmp_path / "s"))


@pytest.mark.parametrize(
    ("key", "value"),
    [("width", 8), ("identity", "another"), ("num_rows", 2), ("groups", ["1x1"]), ("data", "../x")],
)
def test_refuses_a_manifest_that_was_edited(tmp_path, key, value):
    new_store(tmp_path / "s", count=3)
    file = tmp_path / "s" / "manifest.json"
    manifest = json.loads(file.read_text())
    assert manifest[key] != value
    file.write_text(json.dumps(manifest | {key: value}))
    with pytest.raises(UserError, match=r"manifest.json was edited or damaged: its checksum"):
        Store.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"manifest.json cannot be read"),
        ("[]", r"manifest.json is not a store's manifest of format 1"),
        ('{"format": 3}', r"of format 1 or 2"),
    ],
)
def test_refuses_a_manifest_that_is_none(tmp_path, content, message):
    new_store(tmp_path / "s")
    (tmp_path / "s" / "manifest.json").write_text(content)
    with pytest.raises(UserError, match=message):
        Store.open(tmp_path / "s")


def test_refuses_a_folder_that_is_no_store(tmp_path):
    with pytest.raises(UserError, match=r"nowhere is not a store: it has no manifest.json"):
        Store.open(tmp_path / "nowhere")


def test_a_store_may_be_made_in_an_empty_folder_and_in_no_other(tmp_path):
    (tmp_path / "empty").mkdir()
    assert len(new_store(tmp_path / "empty", count=2)) == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("keep this")
    (tmp_path / "file").write_text("keep this")
    for name in ("full", "file"):
        with pytest.raises(UserError, match=rf"{name} exists already"):
            new_store(tmp_path / name)
    assert (
        (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "keep this"
    )


def test_refuses_to_make_a_store_where_one_is(tmp_path):
    new_store(tmp_path / "s", count=2)
    with pytest.raises(UserError, match=r"/s is already a store"):
        new_store(tmp_path / "s")
    assert len(Store.open(tmp_path / "s")) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width cannot be 0"),
        ({"dtype": "fp8"}, "one of fp32, bf16, fp16, int8; got 'fp8'"),
        ({"identity": ""}, "identity cannot be ''"),
        ({"data": "../elsewhere"}, "data cannot be '../elsewhere'"),
        ({"data": ".."}, "data cannot be '..'"),
        ({"projection": 3}, "projection cannot be 3"),
        ({"num_rows": -1}, "num_rows cannot be -1"),
        ({"num_rows": True}, "num_rows cannot be True"),
    ],
)
def test_refuses_settings_that_no_store_has(settings, message):
    settings = {"identity": "a", "groups": GROUPS, "width": 8, "dtype": "bf16"} | settings
    with shapes_unchecked(), pytest.raises(UserError, match=message):
        Manifest(**settings)


BAD = vectors(3)
BAD[1, 2, 3] = torch.nan


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ((["a", "b", "c"], BAD), "the embeddings of 'b' hold NaN"),
        ((["a", "b", "a"], vectors(3)), "id 'a' is given twice"),
        ((["a", "b"], vectors(3)), "must be 2 x 8 x 16 for 2 ids in .*, got 3 x 8 x 16"),
        ((["a"], vectors(1, 4)), "must be 1 x 8 x 16 .*, got 1 x 4 x 16"),
        ((["a"], vectors(1)[..., :9]), "must be 1 x 8 x 16 .*, got 1 x 8 x 9"),
        ((["a"], "vectors"), "embeddings must be a tensor of items x vectors x width.* got str"),
        ((["a"], vectors(1)[0]), "embeddings must be a tensor .* got 8 x 16"),
        ((["a"], vectors(1), []), "got 1 ids, metadata of 0"),
        ((["a", ""], vectors(2)), "an id must be a text that is not empty, got ''"),
        ((["a"], vectors(1), [{"x": {1, 2}}]), "item 'a': metadata must be what JSON can hold"),
        ((["a"], vectors(1), [{"x": float("nan")}]), "item 'a': metadata must be what JSON"),
    ],
)
def test_refuses_items_that_do_not_fit_and_stays_as_it_was(tmp_path, items, message):
    store = new_store(tmp_path / "s", count=2)
    with shapes_unchecked(), pytest.raises(UserError, match=message):
        store.add(*items)
    for opened in (store, Store.open(tmp_path / "s")):
        assert opened.ids == ["item 0", "item 1"]
        assert opened.generation == 1


@pytest.mark.parametrize("rows", [[2], [0, -3], ["item 0"], 2])
def test_rows_that_are_not_there_are_refused_in_one_line(tmp_path, rows):
    store = new_store(tmp_path / "s", count=2)
    for read in (store.metadata, store.vectors, store.previews):
        with (
            shapes_unchecked(),
            pytest.raises(UserError, match="rows are numbers from 0 to 1, got"),
        ):
            read(rows)


def test_refuses_to_delete_what_is_not_there_and_deletes_nothing(tmp_path):
    store = new_store(tmp_path / "s", count=2)
    with pytest.raises(UserError, match=r"/s has no item 'item 7'"):
        store.delete(["item 0", "item 7"])
    with pytest.raises(UserError, match=r"ids must be a list: write \['item 0'\]"):
        store.delete("item 0")
    assert store.ids == ["item 0", "item 1"]


def test_rows_are_an_arrow_stream_that_others_can_read(tmp_path):
    new_store(tmp_path / "s", count=2).add(["more"], vectors(1))
    with pa.ipc.open_stream(str(tmp_path / "s" / "data-0000" / "rows.arrows")) as stream:
        table = stream.read_all()
    assert table["id"].to_pylist() == ["item 0", "item 1", "more"]
