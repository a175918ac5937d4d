"""An index: against the exact search, through changes of the store, damage and kills."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from metaembed_pl.budget import parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval import index_build
from metaembed_pl.retrieval.calibration import Calibration, calibrate, choose, costs, plan_name
from metaembed_pl.retrieval.cascade import for_filter
from metaembed_pl.retrieval.index import FILE, FOLDER, IndexUnusable
from metaembed_pl.retrieval.index_build import build, extend
from metaembed_pl.retrieval.store import Store

pytest.importorskip("faiss")
GROUPS = parse_groups(["1x1", "2x4", "4x8"])
WIDTH, COUNT = 16, 600
PLANS = ("pool@.5:200,4x8:10", "each@.6:100,4x8:10")


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


def topics(count, seed):
    """Items of 20 topics, so that there is something to find."""
    meant = unit(20, 1, WIDTH, seed=5)[torch.arange(count) % 20]
    return torch.nn.functional.normalize(meant + 0.7 * unit(count, 8, WIDTH, seed=seed), dim=-1)


QUERIES = topics(20, seed=3)[:, :4]


def filled(folder, count=COUNT, dtype="bf16"):
    store = Store.create(folder, GROUPS, WIDTH, "model", dtype)
    metadata = [{"n": i} for i in range(count)]
    store.add([f"item {i}" for i in range(count)], topics(count, seed=1), metadata)
    return store


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    store = filled(tmp_path_factory.mktemp("stores") / "s")
    build(store)
    return store


@pytest.fixture
def store(made, tmp_path):
    """A copy, to be changed."""
    return Store.open(shutil.copytree(made.folder, tmp_path / "s"))


def recall(store, plan, queries=QUERIES, **settings):
    exact = store.search(queries, "4x8", **settings).ids
    found = store.search(queries, cascade=plan, **settings).ids
    wanted = sum(map(len, exact))
    return sum(len(set(a) & set(b)) for a, b in zip(exact, found, strict=True)) / wanted


def assert_all_is_there(store):
    """Each item's own vector finds it, by the index alone: no row is masked or misnumbered."""
    index = store.index()
    places = store.snapshot().places
    places = places[places < index.num_rows]
    vectors = store.vectors(store.snapshot().rows_of(places).tolist())[:, 3:4].numpy()
    lists, products = index.lists_of(vectors, 0.95)
    nearest = index.nearest(vectors, lists, products, 1)[:, 0, 0]
    assert (nearest == places.numpy() * 8 + 3).mean() > 0.97


@pytest.mark.parametrize("dtype", ["bf16", "int8"])
@pytest.mark.parametrize("codes", ["sq8", "rabitq"])
def test_all_lists_and_hits_find_what_the_exact_search_finds(tmp_path, dtype, codes):
    store = filled(tmp_path / "s", dtype=dtype)
    index = build(store, codes)
    exact = store.search(QUERIES, "4x8", top=COUNT)
    questions = QUERIES.sum(dim=1, keepdim=True)
    every, _ = index.search(questions, -1e9, COUNT * 8)
    assert all(places.tolist() == list(range(COUNT)) for places in every)
    for asks in ("pool", "each"):
        found = store.search(QUERIES, cascade=f"{asks}@.9:5,4x8:{COUNT}")
        # Far down, scores lie closer than rounding.
        assert [rows[:10] for rows in found.rows] == [rows[:10] for rows in exact.rows]
        assert [sorted(rows) for rows in found.rows] == [sorted(rows) for rows in exact.rows]
        assert torch.allclose(torch.tensor(found.scores), torch.tensor(exact.scores), atol=1e-5)


def test_a_few_lists_find_most_and_read_little(made):
    exact = made.search(QUERIES[:1], "4x8")
    for plan in PLANS:
        assert recall(made, plan) > 0.9
    few = made.search(QUERIES[:1], cascade="pool@.9:20,4x8:10")
    assert recall(made, "pool@.9:20,4x8:10") < recall(made, PLANS[0])
    assert few.bytes_read < exact.bytes_read / 3


def test_more_is_read_until_there_are_as_many_results_as_were_asked_for(made):
    hits = made.search(QUERIES, cascade="pool@1:1,4x8:50", top=50)
    assert all(len(set(rows)) == 50 for rows in hits.rows)
    assert all(
        len(rows) == COUNT for rows in made.search(QUERIES, cascade=f"pool@1:1,4x8:{COUNT}").rows
    )


def test_items_added_later_are_found_and_deleted_ones_are_not(store):
    best = store.search(QUERIES[:1], "4x8").ids[0]
    store.delete(best[:3])
    new = QUERIES[:2, [0, 1, 2, 3, 0, 1, 2, 3]]
    store.add(["new", "item 5"], new, [{"n": -1}, {"n": -5}])
    for plan in PLANS:
        hits = store.search(QUERIES[:2], cascade=plan)
        assert not set(best[:3]) & set(hits.ids[0])
        assert [ids[0] for ids in hits.ids] == ["new", "item 5"]
        assert recall(store, plan) > 0.9


def test_grows_by_segments_that_are_merged_when_they_are_small(store, monkeypatch):
    assert not extend(store), "nothing is new"
    monkeypatch.setattr(index_build, "LEFT_OUT_AT_MOST", 10)
    for step in range(4):
        ids = [f"{step} {i}" for i in range(50)]
        store.add(ids, topics(50, seed=50 + step))
        store.delete(ids[:2])
        assert extend(store)
        index = store.index()
        assert index.num_rows == store.description.num_rows
        sizes = [segment.end - segment.first for segment in index.manifest.segments]
        assert sizes == [[600, 50], [600, 100], [600, 100, 50], [600, 200]][step]
        assert index.drift() is None
        on_disk = {file.name for file in (store.folder / "data-0000" / FOLDER).iterdir()}
        assert len(on_disk) == len(sizes) + 2
        assert recall(store, PLANS[0]) > 0.9
        assert not {f"{step} 0", f"{step} 1"} & set(store.ids)
        assert_all_is_there(store)


def test_segments_are_bounded_by_bytes_and_find_the_same(made, store, monkeypatch):
    row_bytes = 8 * (WIDTH + 8)
    monkeypatch.setattr(index_build, "SEGMENT_BYTES", 250 * row_bytes)
    index = build(store)
    assert [(one.first, one.end) for one in index.manifest.segments] == [
        (0, 250),
        (250, 500),
        (500, COUNT),
    ]
    for plan in PLANS:
        found, expected = store.search(QUERIES, cascade=plan), made.search(QUERIES, cascade=plan)
        assert found.ids == expected.ids


def test_tells_when_it_no_longer_fits(store, monkeypatch):
    monkeypatch.setattr(index_build, "LEFT_OUT_AT_MOST", 10)
    store.add([f"other {i}" for i in range(200)], unit(200, 8, WIDTH, seed=77))
    extend(store)
    assert "the 200 items added since it was built lie" in store.index().drift()
    build(store)
    assert store.index().drift() is None
    store.add([f"many {i}" for i in range(4 * len(store))], topics(4 * len(store), seed=8))
    extend(store)
    assert "made for 800 items and now hold 4,000" in store.index().drift()


def test_a_reader_goes_on_with_an_index_that_is_replaced(store):
    reader = Store.open(store.folder)
    before = reader.search(QUERIES, cascade=PLANS[0]).ids
    old = reader.index()
    build(store)
    assert not (store.folder / "data-0000" / FOLDER / old.manifest.trained).exists()
    found, _ = old.search(QUERIES.sum(dim=1, keepdim=True), 0.8, 20)
    assert all(map(len, found)), "it is still mapped"
    assert reader.search(QUERIES, cascade=PLANS[0]).ids == before
    assert reader.index() is not old


def test_a_reader_of_an_older_generation_uses_an_index_of_a_newer_one(store):
    reader = Store.open(store.folder)
    exact = reader.search(QUERIES, "4x8").ids
    store.add(["new"], QUERIES[:1, [0, 1, 2, 3, 0, 1, 2, 3]])
    build(store)
    assert reader.index().num_rows == COUNT + 1
    found = reader.search(QUERIES, cascade=f"pool@.9:9,4x8:{COUNT}").ids
    assert [ids[:10] for ids in found] == exact
    assert all("new" not in ids for ids in found)
    assert store.search(QUERIES[:1], cascade=PLANS[1]).ids[0][0] == "new"
    store.compact()
    assert reader.search(QUERIES, cascade=PLANS[0]).ids, "what is mapped goes on"


def test_compaction_takes_the_index_along(store):
    store.delete([f"item {i}" for i in range(0, 300, 3)])
    exact = store.search(QUERIES, "4x8").ids
    store.compact()
    index = store.index()
    assert index.num_rows == len(store) == 500
    assert_all_is_there(store)
    assert recall(store, PLANS[1]) > 0.9
    assert Store.open(store.folder).search(QUERIES, "4x8").ids == exact


@pytest.mark.parametrize("share", [0.5, 0.05, 0.01])
def test_filters_reach_the_index(made, share):
    where = f"n<{round(COUNT * share)}"
    for plan in PLANS:
        assert recall(made, plan, where=where) > 0.9
        for ids in made.search(QUERIES, cascade=plan, where=where).ids:
            assert all(int(id.split()[1]) < COUNT * share for id in ids)
    assert made.search(QUERIES, cascade=PLANS[0], where="n<0").ids == [[]] * len(QUERIES)


def test_under_a_filter_more_lists_are_read_or_all_is_scored(made):
    stages, index = made.stages(cascade="pool@.8:50,4x8:10"), made.index()
    assert for_filter(stages, index, QUERIES, 1) == stages
    assert [str(stage) for stage in for_filter(stages, index, QUERIES, 0.01)] == ["4x8:10"]
    assert [str(s) for s in made.search(QUERIES, cascade=stages, where="n<5").stages] == ["4x8:10"]
    assert made.search(QUERIES, cascade=stages, where="n<0").ids == [[]] * len(QUERIES)
    asked = QUERIES.sum(dim=1, keepdim=True).numpy()
    few, many = ((index.lists_of(asked, 0.9, by)[0] >= 0).sum(axis=1) for by in (1, 3))
    assert (many == np.minimum(3 * few, index.num_lists)).all()


def test_lists_are_those_whose_centres_are_near(made):
    index, asked = made.index(), QUERIES[:, :2].numpy()
    lists, products = index.lists_of(asked, 0.7)
    every = asked.reshape(-1, WIDTH) @ index.centres.T
    for some, scores, of_all in zip(lists, products, every, strict=True):
        expected = [n for n in np.argsort(-of_all) if of_all[n] >= 0.7 * of_all.max()]
        assert some[some >= 0].tolist() == expected
        assert scores[: len(expected)].tolist() == of_all[expected].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_vector_lies_in_the_list_of_its_nearest_centre(made, monkeypatch, dtype):
    monkeypatch.setattr(index_build, "fast_dtype", lambda _device: dtype)
    vectors = topics(80, seed=4).flatten(0, 1).numpy()
    every = vectors @ made.index().centres.T
    products, lists = index_build._nearest_centres(made.index()._segments[0].quantizer, vectors)
    assert every[np.arange(len(lists)), lists] == pytest.approx(every.max(axis=1), abs=0.01)
    assert products == pytest.approx(every.max(axis=1), abs=0.01)


def test_calibration_measures_what_plans_find(made):
    found = calibrate(made, QUERIES)
    asks = [row for row in found.measured if "@" in row.plan]
    assert asks
    for row in found.measured:
        plan = row.plan if ":" in row.plan else f"{row.plan}:10"
        assert recall(made, plan) == pytest.approx(row.recall, abs=0.011)
    assert found.best(0.9).plan == next(r.plan for r in found.measured if r.recall - r.error >= 0.9)
    stages = made.stages(cascade=asks[0].plan)
    index = made.index()
    questions = 1 if stages[0].pooled else 4
    expected = questions * index.num_lists + 7 / index.num_lists * COUNT * 8 + 30 * 32
    assert costs(stages, made, (index, 7, 30))[0] == expected


def test_a_plan_that_asks_the_index_is_chosen_only_where_there_is_one(store, monkeypatch):
    monkeypatch.setattr("metaembed_pl.retrieval.calibration.SMALL", 0)
    calibration = calibrate(store, QUERIES)
    calibration.save(store)
    row = next(row for row in calibration.measured if "@" in row.plan)
    target = row.recall - row.error
    assert "@" in plan_name(choose(store, calibration, target).stages)
    damage(store, lambda text: text.replace("sq8", "sq9"))
    choice = choose(store, Calibration.load(store), target)
    assert "@" not in plan_name(choice.stages)
    assert "index is not used" in choice.note
    assert f"index --store {store.folder} --again" in choice.note
    shutil.rmtree(store.folder / "data-0000" / FOLDER)
    assert "@" not in plan_name(choose(store, Calibration.load(store), target).stages)


def test_an_unreachable_target_is_searched_exactly_and_says_so(store, monkeypatch):
    monkeypatch.setattr("metaembed_pl.retrieval.calibration.SMALL", 0)
    far = torch.nn.functional.normalize(torch.randn(20, 4, WIDTH), dim=-1)
    calibration = calibrate(store, far)
    only_exact = [row for row in calibration.measured if row.recall < 1] + [
        calibration.measured[-1]
    ]
    choice = choose(store, Calibration(**{**vars(calibration), "measured": tuple(only_exact)}), 1.0)
    assert plan_name(choice.stages) == "4x8"
    assert "no cheaper plan reached recall 1" in choice.note
    assert "not been measured" in choose(store, None).note


def damage(store, change):
    file = store.folder / "data-0000" / FOLDER / FILE
    file.write_text(change(file.read_text()))


def cut(file):
    os.truncate(file, file.stat().st_size - 1)


def flip(file):
    content = bytearray(file.read_bytes())
    content[40] ^= 255
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / FILE).write_text("{"), "cannot be read"),
        (lambda folder: (folder / FILE).write_text('{"format": 1}'), "cannot be read"),
        (lambda folder: cut(next(folder.glob("segment*"))), "bytes instead of"),
        (lambda folder: flip(next(folder.glob("segment*"))), "is damaged"),
        (lambda folder: next(folder.glob("segment*")).unlink(), "No such file"),
    ],
)
def test_a_damaged_index_is_refused_and_the_command_that_mends_it_is_named(store, change, message):
    change(store.folder / "data-0000" / FOLDER)
    again = Store.open(store.folder)
    with pytest.raises(IndexUnusable, match=message) as raised:
        again.search(QUERIES, cascade=PLANS[0])
    assert f"rebuild it with `index --store {store.folder} --again`" in str(raised.value)
    assert again.search(QUERIES, "4x8").ids, "exact search needs no index"
    build(again)
    assert recall(again, PLANS[0]) > 0.9


def test_an_index_that_is_cut_while_it_is_open_is_not_read(store):
    store.search(QUERIES, cascade=PLANS[0])
    cut(next((store.folder / "data-0000" / FOLDER).glob("segment*")))
    with pytest.raises(IndexUnusable, match="bytes instead of"):
        store.search(QUERIES, cascade=PLANS[0])


@pytest.mark.parametrize(
    ("groups", "width", "identity"),
    [(GROUPS, WIDTH, "model"), (GROUPS, 8, "model"), (GROUPS, WIDTH, "another")],
)
def test_the_index_of_another_store_is_refused(made, tmp_path, groups, width, identity):
    other = Store.create(tmp_path / "other", groups, width, identity)
    other.add([f"item {i}" for i in range(COUNT)], unit(COUNT, 8, width, seed=9))
    shutil.copytree(made.folder / "data-0000" / FOLDER, other.folder / "data-0000" / FOLDER)
    with pytest.raises(IndexUnusable, match="index of another store"):
        other.index()


def test_an_index_of_rows_that_are_not_there_is_refused(made, tmp_path):
    fewer = filled(tmp_path / "fewer", COUNT - 1)
    shutil.copytree(made.folder / "data-0000" / FOLDER, fewer.folder / "data-0000" / FOLDER)
    with pytest.raises(IndexUnusable, match="or of other items"):
        fewer.index()


def test_without_faiss_a_store_is_searched_exactly(store, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    again = Store.open(store.folder)
    with pytest.raises(IndexUnusable, match=r"pip install 'metaembed-pl\[index\]'"):
        again.search(QUERIES, cascade=PLANS[0])
    with pytest.raises(IndexUnusable, match="needs faiss"):
        build(again)
    assert len(again.search(QUERIES, "4x8").ids) == len(QUERIES)
    again.delete(["item 1"])
    again.compact()  # leaves the index behind
    assert Store.open(store.folder).index() is None


def test_a_stage_that_asks_needs_an_index(tmp_path):
    store = filled(tmp_path / "s", 20)
    with pytest.raises(UserError, match=r"has no index for pool@0.9:20: build one with `index"):
        store.search(QUERIES, cascade="pool@.9:20,4x8:10")
    empty = Store.create(tmp_path / "empty", GROUPS, WIDTH, "model")
    with pytest.raises(UserError, match="is empty"):
        build(empty)
    with pytest.raises(UserError, match="got 'pq'"):
        build(store, "pq")


def test_a_store_written_before_there_was_an_index_opens_and_gets_one(tmp_path):
    old = filled(tmp_path / "s", 50)
    manifest = json.loads((old.folder / "manifest.json").read_text())
    assert manifest["format"] == 1, "an older version reads it too"
    assert not (old.folder / "data-0000" / FOLDER).exists()
    build(old)
    assert json.loads((old.folder / "manifest.json").read_text()) == manifest
    assert recall(old, "each@.4:400,4x8:10") > 0.9


@pytest.mark.slow
@pytest.mark.parametrize("what", ["index_killed_at_every_step", "index_read_beside_a_writer"])
def test_survives(what, tmp_path):
    filled(tmp_path / "s", 300)
    script = Path(__file__).parents[1] / "store_changes.py"
    done = subprocess.run(
        [sys.executable, script, what, tmp_path / "s"],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.endswith("fine\n"), done.stdout + done.stderr


def test_more_vectors_than_lists_and_less(tmp_path):
    store = filled(tmp_path / "s", 1)
    index = build(store)
    assert index.num_lists <= 8
    assert store.search(QUERIES, cascade="each@.4:5,4x8:10").ids == [["item 0"]] * len(QUERIES)
    assert [one.tolist() for one in index.search(QUERIES, 0.5, 8)[0]] == [[0]] * len(QUERIES)


def test_few_indexed_items_and_many_new_ones_still_fill_the_list(tmp_path):
    store = filled(tmp_path / "s", 3)
    build(store)
    store.add([f"new {i}" for i in range(100)], topics(100, seed=8))
    hits = store.search(QUERIES, cascade="each@.6:5,4x8:10")
    assert {len(ids) for ids in hits.ids} == {10}
