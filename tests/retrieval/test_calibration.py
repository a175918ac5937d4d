import re

import pytest
import torch

from calibrated import assert_plans_do_what_was_measured
from metaembed_pl.budget import parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval import calibration as calibration_module
from metaembed_pl.retrieval import cascade as cascade_module
from metaembed_pl.retrieval.calibration import (
    CALIBRATION_FILE,
    Calibration,
    calibrate,
    joined,
    logged_queries,
    measure,
    stages_of,
)
from metaembed_pl.retrieval.store import Store
from metaembed_pl.samples import evenly_spread

GROUPS = parse_groups(["1x1", "2x4", "4x8"])
WIDTH, COUNT = 16, 300


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store.create(tmp_path_factory.mktemp("stores") / "s", GROUPS, WIDTH, "model")
    vectors = torch.randn(COUNT, 8, WIDTH, generator=torch.Generator().manual_seed(0))
    store.add([f"{i}" for i in range(COUNT)], torch.nn.functional.normalize(vectors, dim=-1))
    return store


def test_a_plan_finds_and_reads_what_was_measured(store, monkeypatch):
    # Where bf16 is faster, what it chose is read again.
    monkeypatch.setattr(cascade_module, "fast_dtype", lambda device: torch.float32)
    queries = store.vectors([5, 50, 77])[:, :4]
    found = calibrate(store, queries, "own vectors")
    assert found.used == "3 own vectors, on 300 of 300 items"
    assert len(found.measured) > 4
    assert_plans_do_what_was_measured(store, queries, found)


def test_chooses_the_cheapest_that_is_good_enough(store):
    found = calibrate(store)
    products = [row.products for row in found.measured]
    assert products == sorted(products)
    for target in (0.01, 0.5, 0.9, 1.0):
        chosen = found.best(target)
        place = found.measured.index(chosen)
        assert chosen.recall - chosen.error >= target
        assert all(row.recall - row.error < target for row in found.measured[:place])


def test_keeps_enough_for_more_results(store):
    found = calibrate(store)
    for target in (0.01, 0.9, 1.0):
        stages = stages_of(found.best(target).plan, store.description, 60)
        assert min(stage.keep for stage in stages) >= 60
        assert stages[-1].keep == 60
        assert len(store.search(store.vectors([0])[:, :4], cascade=stages).rows[0]) == 60


def test_is_kept_for_its_generation(store, tmp_path):
    copy = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    copy.add(["a", "b"], store.vectors([0, 1]))
    found = calibrate(copy)
    found.save(copy)
    assert Calibration.load(copy) == found
    copy.delete(["a"])
    assert Calibration.load(copy) is None


def test_is_kept_until_a_tenth_of_the_items_came_or_went(store, tmp_path):
    copy = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    copy.add([str(i) for i in range(100)], store.vectors(range(100)))
    calibrate(copy).save(copy)
    copy.delete(["1", "2", "3", "4", "5"])
    copy.add(["6", "101"], store.vectors([6, 101]))  # one of them is replaced
    assert Calibration.load(copy) is not None
    copy.add(["102", "103", "104"], store.vectors([102, 103, 104]))
    assert Calibration.load(copy) is None
    calibrate(copy).save(copy)
    assert Calibration.load(copy) is not None
    copy.compact()
    assert Calibration.load(copy) is None


def test_what_is_kept_and_damaged_is_measured_anew(store, tmp_path):
    copy = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    copy.add(["a", "b"], store.vectors([0, 1]))
    calibrate(copy).save(copy)
    file = copy.folder / CALIBRATION_FILE
    good = file.read_text()
    for bad in ("", "{", "[]", "{}", good.replace("num_rows", "rows"), good.replace("4x8", "2x8")):
        file.write_text(bad)
        assert Calibration.load(copy) is None


def test_a_large_store_is_sampled_and_it_says_so(store, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_module, "PRODUCTS_AT_MOST", 1)
    monkeypatch.setattr(calibration_module, "ROWS_AT_LEAST", 100)
    monkeypatch.setattr(calibration_module, "TARGETS", tuple(i / 100 for i in range(101)))
    monkeypatch.setattr(calibration_module, "KEEPS", (50, 60, 70, 80, 90))
    sampled = calibrate(store)
    assert sampled.used == "32 stored items, by their own vectors, on 100 of 300 items"
    exact = next(row for row in sampled.measured if row.plan == "4x8")
    assert (exact.recall, exact.products) == (1, COUNT * 32)
    # A third of the rows by themselves, of which a stage keeps a third.
    third = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    rows = evenly_spread(COUNT, 100)
    third.add([f"{row}" for row in rows], store.vectors(rows))
    queries = store.vectors(evenly_spread(COUNT, 32))[:, :4]
    best = third.search(queries, "4x8").rows
    cascades = [row for row in sampled.measured if row.plan.count(",") == 1]
    assert len(cascades) > 3
    for row in cascades:
        first, keep = row.plan.split(",")[0].split(":")
        found = third.search(queries, cascade=f"{first}:{-(-int(keep) // 3)},4x8:10").rows
        kept = sum(len(set(a) & set(b)) for a, b in zip(found, best, strict=True)) / 320
        assert row.recall == pytest.approx(kept, abs=0.004)


def test_the_first_stages_of_all_kinds_are_measured(store, monkeypatch):
    monkeypatch.setattr(calibration_module, "TARGETS", tuple(i / 200 for i in range(201)))
    monkeypatch.setattr(calibration_module, "KEEPS", (12, 14, 20, 40, 100))
    monkeypatch.setattr(cascade_module, "fast_dtype", lambda device: torch.float32)
    queries = store.vectors(range(0, 300, 10))[:, :4]
    found = calibrate(store, queries)
    begin = {row.plan.split(":")[0] for row in found.measured}
    assert begin >= {"poolx4", "2x8", "4x4", "1x1", "4x1"}
    assert_plans_do_what_was_measured(store, queries, found)


def test_recall_is_that_of_the_hardest_kind(store):
    queries = store.vectors(range(32))[:, :4]
    several = [torch.nn.functional.normalize(queries + queries.roll(i, 0), dim=-1) for i in (1, 2)]
    together = calibrate(store, [queries, *several], "names")
    apart = [calibrate(store, some) for some in (queries, *several)]
    for plan in ("1x1", "4x1", "2x4"):
        rows = [next(row for row in one.measured if row.plan == plan) for one in apart]
        hardest = min(rows, key=lambda row: row.recall - row.error)
        measured = next(row for row in together.measured if row.plan == plan)
        assert measured.recall == pytest.approx(hardest.recall, abs=0.004)


def test_joined_queries_ask_for_different_things_and_stay_short():
    texts = [f"{i:02d} " + "x" * 200 for i in range(32)]
    two, three = joined(texts)
    assert len(two) == len(three) == 32
    for some, count in ((two, 2), (three, 3)):
        for query in some:
            numbers = set(re.findall(r"\b\d\d\b", query))
            assert len(numbers) == count
            assert len(query) <= count * 80 + 10


def test_measures_with_the_queries_that_were_logged(store, tmp_path):
    copy = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    texts = [{"text": f"text {i}"} for i in range(40)]
    copy.add([str(i) for i in range(40)], store.vectors(range(40)), texts)
    asked = []

    def encode(texts):
        asked.append(list(texts))
        return store.vectors(range(len(texts)))[:, :4]

    used = measure(copy, encode).used
    assert used.startswith("32 texts of its items, alone and joined by two and by three, on 40")
    assert all(text.startswith("text ") for text in asked[0])
    assert asked[1:] == list(joined(asked[0]))
    asked.clear()
    lines = [f'{{"text": "asked {i % 20}"}}' for i in range(60)]
    (copy.folder / "queries.jsonl").write_text("\n".join(["no JSON", *lines, '{"text": 3}']) + "\n")
    assert measure(copy, encode).used.startswith("20 queries that were logged, on 40")
    assert sorted(asked[0]) == sorted(f"asked {i}" for i in range(20))
    (copy.folder / "queries.jsonl").write_text("\n".join(lines[:5]))
    assert len(logged_queries(copy)) == 5
    assert "texts of its items" in measure(copy, encode).used


def test_the_summed_query_costs_what_a_single_vector_does(store):
    by_plan = {row.plan: row for row in calibrate(store).measured}
    assert by_plan["4x1"].products == by_plan["1x1"].products == COUNT
    assert by_plan["4x8"].products == COUNT * 32


def test_can_be_ended_between_any_two_searches(store):
    calls = []
    calibrate(store, go_on=lambda: calls.append(1))
    for last in (1, len(calls) // 2, len(calls)):
        left = iter(range(last - 1))
        with pytest.raises(StopIteration):
            calibrate(store, go_on=left.__next__)
    assert len(calls) > 10


def test_refuses_what_cannot_be_measured(store, tmp_path):
    empty = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    with pytest.raises(UserError, match=r"/s is empty"):
        calibrate(empty)
    with pytest.raises(UserError, match=r"at most 1, got 1.5"):
        calibrate(store).best(1.5)
