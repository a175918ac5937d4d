"""Budgets with a width: the first components of each vector, where the model was trained so."""

import pytest
import torch

import tiny
from calibrated import assert_plans_do_what_was_measured
from metaembed_pl.budget import Budget, parse_groups
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.scoring import rank_task
from metaembed_pl.item import Item
from metaembed_pl.ranking import rank
from metaembed_pl.retrieval import cascade, scoring
from metaembed_pl.retrieval.calibration import calibrate
from metaembed_pl.retrieval.exchange import export_store, import_store
from metaembed_pl.retrieval.projection import Projection
from metaembed_pl.retrieval.qdrant.layout import Layout
from metaembed_pl.retrieval.qdrant.push import push
from metaembed_pl.retrieval.store import Store
from metaembed_pl.serving.service import Service
from qdrant_edge_folder import EdgeCollection, open_at

GROUPS = parse_groups(["1x1", "2x4", "4x8"])
WIDTH, WIDTHS, COUNT = 24, (12, 5), 60
BYTES = {"fp32": (4, 0), "bf16": (2, 0), "int8": (1, 4)}
"""Of a component, and of a vector beside them."""


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


QUERIES = unit(3, 4, WIDTH, seed=1)


def made(folder, dtype="fp32", width=WIDTH):
    """60 items of which 10 were deleted, in a store of all components or of the first alone."""
    projection = None if width == WIDTH else Projection.first(WIDTH, width)
    store = Store.create(folder, GROUPS, WIDTH, "model", dtype, projection, WIDTHS)
    rows = range(COUNT)
    store.add([f"{i}" for i in rows], unit(COUNT, 8, WIDTH), [{"n": i} for i in rows])
    store.delete([f"{i}" for i in range(20, 30)])
    return Store.open(folder)


def slow_scores(queries, candidates, r_q, r_c, width):
    """Sums of the best cosines of the first components, one pair of vectors at a time."""

    def cosine(a, b):
        return torch.cosine_similarity(a[:width], b[:width], dim=0).item()

    return torch.tensor(
        [
            [
                sum(max(cosine(query[i], item[j]) for j in range(r_c)) for i in range(r_q))
                for item in candidates
            ]
            for query in queries
        ]
    )


@pytest.mark.parametrize("dtype", BYTES)
@pytest.mark.parametrize("budget", ["1x1x5", "4x1x12", "2x4x5", "4x8x12"])
def test_finds_what_the_slow_loop_finds_and_reads_no_more(tmp_path, monkeypatch, dtype, budget):
    # Several tiles, several parts: their seams must not show. Where bf16 is faster, what it chose
    # is read again.
    monkeypatch.setattr(scoring, "CPU_TILE_BYTES", 5000)
    monkeypatch.setattr(scoring, "SCORES_AT_A_TIME", 3 * 17)
    monkeypatch.setattr(cascade, "fast_dtype", lambda device: torch.float32)
    store = made(tmp_path / "s", dtype)
    r_q, r_c, width = Budget.parse(budget)
    expected = slow_scores(QUERIES, store.vectors(), r_q, r_c, width)
    best, order = expected.sort(dim=1, descending=True)
    hits = store.search(QUERIES, budget, top=len(store))
    torch.testing.assert_close(torch.tensor(hits.scores), best, atol=1e-5, rtol=0)
    assert hits.rows == order.tolist()
    assert [str(stage) for stage in hits.stages] == [f"{budget}:50"]
    component, beside = BYTES[dtype]
    assert hits.bytes_read == 50 * r_c * (width * component + beside)
    scores = torch.cat([part for _, part in store.scores(QUERIES, budget)], dim=1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("in_bf16", [False, True])
def test_is_to_the_bit_what_a_store_of_that_width_finds(tmp_path, monkeypatch, width, in_bf16):
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    monkeypatch.setattr(cascade, "fast_dtype", lambda device: dtype)
    whole, narrow = made(tmp_path / "s"), made(tmp_path / "n", width=width)
    assert torch.equal(whole.vectors([7, 3], 4, width), narrow.vectors([7, 3], 4))
    for budget in ("1x1", "4x1", "2x4", "4x8"):
        expected = narrow.search(QUERIES, budget, top=9)
        found = whole.search(QUERIES, f"{budget}x{width}", top=9)
        assert (found.ids, found.scores) == (expected.ids, expected.scores)
        assert found.bytes_read == expected.bytes_read
    plan = "poolx4{0}:30,2x4{0}:20,4x8{0}:9"
    expected = narrow.search(QUERIES, cascade=plan.format(""), where="n>=9")
    found = whole.search(QUERIES, cascade=plan.format(f"x{width}"), where="n>=9")
    assert (found.ids, found.scores) == (expected.ids, expected.scores)


def test_a_narrow_stage_chooses_what_a_whole_one_scores(tmp_path):
    store = made(tmp_path / "s")
    vectors = store.vectors()
    first = slow_scores(QUERIES, vectors, 2, 4, 5).topk(12, dim=1).indices
    scores = slow_scores(QUERIES, vectors, 4, 8, WIDTH)
    hits = store.search(QUERIES, cascade="2x4x5:12,4x8:6")
    for rows, kept, of_all in zip(hits.rows, first, scores, strict=True):
        assert rows == kept[of_all[kept].topk(6).indices].tolist()


@pytest.mark.parametrize("kept", [WIDTHS, ()])
def test_refuses_a_width_that_was_not_trained_and_names_the_trained(tmp_path, kept):
    store = Store.create(tmp_path / "s", GROUPS, WIDTH, "model", widths=kept)
    message = "not trained at width 7; choose one of 12, 5, or leave" if kept else "7; leave"
    for plan in ({"budget": "4x8x7"}, {"cascade": "poolx8x7:20,4x8:9"}, {"cascade": "4x8x7:9"}):
        with pytest.raises(UserError, match=message):
            store.search(QUERIES, **plan)
    with pytest.raises(UserError, match=message):
        store.vectors(width=7)


def test_a_store_remembers_what_the_model_was_trained_at(tmp_path):
    assert made(tmp_path / "s").widths == WIDTHS
    assert made(tmp_path / "n", width=12).widths == (5,)
    export_store(made(tmp_path / "e"), tmp_path / "e.parquet")
    assert import_store(tmp_path / "e.parquet", tmp_path / "i").widths == WIDTHS
    store = Store.open(tmp_path / "s")
    store.compact()
    assert Store.open(tmp_path / "s").widths == WIDTHS
    layout = Layout.of(store)
    assert Layout.from_json(layout.to_json()) == layout
    assert "widths" not in Layout.of(Store.create(tmp_path / "p", GROUPS, 8, "model")).to_json()


def test_a_learned_projection_has_no_trained_widths(tmp_path):
    model = tiny.embedder()
    model.widths = (16, 8)
    items = [Item(tiny.text(i), id=f"{i}") for i in range(20)]
    for width, widths in ((None, (16, 8)), (16, (8,)), (20, ())):
        store = Store.build(tmp_path / f"{width}", model, items, width=width)
        assert store.widths == widths


def test_a_collection_says_how_to_get_narrower_vectors(tmp_path):
    collection = EdgeCollection(tmp_path / "edge")
    list(push(made(tmp_path / "s"), collection))
    collection.close()
    with open_at(tmp_path / "edge") as opened:
        with pytest.raises(UserError, match=r"4x8x5:10: Qdrant scores full .* `embed --width 5`"):
            opened.search(QUERIES, "4x8x5")
        with pytest.raises(UserError, match="not trained at width 7; choose one of 12, 5"):
            opened.search(QUERIES, "4x8x7")


def test_narrow_plans_are_measured_and_do_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(cascade, "fast_dtype", lambda device: torch.float32)
    store = made(tmp_path / "s")
    # The first components say nearly all, as a trained model's do.
    vectors = unit(COUNT, 8, WIDTH, seed=3) * torch.where(torch.arange(WIDTH) < 5, 1.0, 0.05)
    store.add([f"{i}" for i in range(COUNT)], torch.nn.functional.normalize(vectors, dim=-1))
    queries = store.vectors(range(0, 60, 3))[:, :4]
    found = calibrate(store, queries)
    assert_plans_do_what_was_measured(store, queries, found)
    narrow = [row for row in found.measured if "x5" in row.plan]
    assert narrow, "five components are as good as all, and cheaper"
    assert found.best(0.9).plan in {row.plan for row in narrow}


@pytest.mark.parametrize("lists", [None, [[0, 1, 2], [3, 4, 5, 6], [0, 9]]])
def test_an_evaluation_ranks_at_a_width(tmp_path, lists):
    store = made(tmp_path / "s")
    ids, relevant = store.ids[:40], [[1], [5], [9]]
    store = Store.open(tmp_path / "s")
    candidates = [Item(id, id=id) for id in ids]
    task = RetrievalSet("t", [Item(f"q{i}") for i in range(3)], candidates, relevant, lists=lists)
    scores = slow_scores(QUERIES, store.vectors(range(40)), 2, 4, 5)
    if lists is None:
        store.delete(store.ids[40:])
    expected = rank(scores, relevant, lists=lists)
    found = rank_task(task, QUERIES, store, Budget(2, 4, 5))
    for name, values in expected.values.items():
        assert torch.allclose(found.values[name], values, atol=1e-6), name
    assert [[i for i, _ in row] for row in found.hits] == [
        [i for i, _ in row] for row in expected.hits
    ]


def test_the_service_searches_and_explains_at_a_width(tmp_path):
    model = tiny.embedder()
    model.widths = (16, 8)
    items = [Item(tiny.text(i), id=f"{i}") for i in range(12)]
    Store.build(tmp_path / "s", model, items, dtype="fp32")
    service = Service(model, tmp_path / "s")
    query = service.ask("a red circle").query
    answer = service.search(query, "2x4x8", top=3)
    assert (answer.plan, answer.budget) == ("2x4x8", "2x4x8")
    expected = model.score(
        model.encode_query(["a red circle"]), model.encode_candidate(items), "2x4x8"
    )[0].topk(3)
    assert [int(result.id) for result in answer.results] == expected.indices.tolist()
    for result, score in zip(answer.results, expected.values, strict=True):
        explained = service.explain(query, result.id, "2x4x8")
        assert result.score == pytest.approx(score.item(), abs=1e-5)
        assert explained.item.score == pytest.approx(score.item(), abs=1e-5)
    assert {"4x8x8", "4x8x16"} <= {plan.plan for plan in service.store_info().plans}
