import pytest
import torch

from calibrated import assert_plans_do_what_was_measured
from metaembed_pl.budget import PAPER_GROUPS, parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval import calibration as calibration_module
from metaembed_pl.retrieval import cascade as cascade_module
from metaembed_pl.retrieval.calibration import Calibration, calibrate, plan_name, plans, spread
from metaembed_pl.retrieval.store import Store

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
        chosen = plan_name(found.choose(target)).replace(":10", "")
        names = [row.plan.replace(":10", "") for row in found.measured]
        assert found.measured[names.index(chosen)].recall >= target
        assert all(row.recall < target for row in found.measured[: names.index(chosen)])


def test_keeps_enough_for_more_results(store):
    found = calibrate(store)
    for target in (0.01, 0.9, 1.0):
        stages = found.choose(target, top=60)
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


def test_a_large_store_is_sampled_and_it_says_so(store, tmp_path, monkeypatch):
    monkeypatch.setattr(calibration_module, "PRODUCTS_AT_MOST", 1)
    monkeypatch.setattr(calibration_module, "ROWS_AT_LEAST", 100)
    sampled = calibrate(store)
    assert sampled.used == "32 stored items, by their own vectors, on 100 of 300 items"
    exact = next(row for row in sampled.measured if row.plan == "4x8")
    assert (exact.recall, exact.products) == (1, COUNT * 32)
    # A third of the rows by themselves, of which a stage keeps a third.
    third = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    rows = spread(COUNT, 100).tolist()
    third.add([f"{row}" for row in rows], store.vectors(rows))
    queries = store.vectors(spread(COUNT, 32).tolist())[:, :4]
    best = third.search(queries, "4x8").rows
    found = third.search(queries, cascade="4x1:17,4x8:10").rows
    kept = sum(len(set(a) & set(b)) for a, b in zip(found, best, strict=True)) / 320
    cascade = next(row for row in sampled.measured if row.plan == "4x1:50,4x8:10")
    assert cascade.recall == pytest.approx(kept)
    assert kept < 1


def test_the_summed_query_costs_what_a_single_vector_does(store):
    by_plan = {row.plan: row for row in calibrate(store).measured}
    assert by_plan["4x1"].products == by_plan["1x1"].products == COUNT
    assert by_plan["4x8"].products == COUNT * 32


def test_plans_of_the_papers_groups_end_with_the_cascade_of_the_docs():
    names = [plan_name(plan) for plan in plans(PAPER_GROUPS, 100_000)]
    assert names[:6] == ["1x1", "16x1", "2x4", "4x8", "8x16", "16x64"]
    assert names[6:] == [
        "16x1:50,16x64:10",
        "16x1:200,4x8:20,16x64:10",
        "16x1:1000,4x8:100,16x64:10",
        "16x1:4000,4x8:400,16x64:10",
        "16x1:16000,4x8:1600,16x64:10",
    ]


def test_can_be_ended_between_any_two_searches(store):
    calls = []
    calibrate(store, go_on=lambda: calls.append(1))
    for last in (1, len(calls) // 2, len(calls)):
        left = iter(range(last - 1))
        with pytest.raises(StopIteration):
            calibrate(store, go_on=left.__next__)
    assert len(calls) == 4 * (1 + len(plans(GROUPS, COUNT)))


def test_refuses_what_cannot_be_measured(store, tmp_path):
    empty = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    with pytest.raises(UserError, match=r"/s is empty"):
        calibrate(empty)
    with pytest.raises(UserError, match=r"up to 1, got 1.5"):
        calibrate(store).choose(1.5)
