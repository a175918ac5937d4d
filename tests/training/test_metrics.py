"""Retrieval metrics against independent implementations, ties and ranks included."""

import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.retrieval import (
    retrieval_normalized_dcg,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from metaembed_pl.budget import parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.late_interaction import nested_scores
from metaembed_pl.training.metrics import RetrievalMetrics, ranking_metrics
from two_ranks import on_two_ranks
from unchecked import shapes_unchecked

GROUPS = parse_groups(["1x1", "2x4"])
NUM_QUERIES, NUM_CANDIDATES = 7, 9
RELEVANT = [[0], [1, 8], [2], [3, 4, 5], [4], [0], [8]]


def a_ranking(distinct_scores, num_queries=30, num_candidates=25, seed=0):
    """Scores with ties, and one to eight relevant candidates a query."""
    generator = torch.Generator().manual_seed(seed)
    shape = num_queries, num_candidates
    scores = torch.randint(distinct_scores, shape, generator=generator) / distinct_scores
    orders = torch.rand(shape, generator=generator).argsort(dim=1)
    relevant = [order[: 1 + query % 8].tolist() for query, order in enumerate(orders)]
    return scores, relevant


def with_ties_broken_against(scores, relevant):
    """The same ranking for an implementation that knows no rule for ties."""
    # torchmetrics never finds a candidate whose score is 0 or below.
    scores = scores.double() + 1
    for row, indices in zip(scores, relevant, strict=True):
        row[indices] -= 1e-6
    return scores


@pytest.mark.parametrize("distinct_scores", [2, 5, 100_000])
def test_metrics_are_those_of_torchmetrics_with_ties_against_us(distinct_scores):
    scores, relevant = a_ranking(distinct_scores)
    ours = ranking_metrics(scores, relevant, ks=(1, 5, 10))
    broken = with_ties_broken_against(scores, relevant)
    for query, indices in enumerate(relevant):
        target = torch.zeros(scores.shape[1], dtype=torch.bool)
        target[indices] = True
        row = broken[query]
        expected = {f"recall@{k}": retrieval_recall(row, target, top_k=k) for k in (1, 5, 10)}
        expected["mrr"] = retrieval_reciprocal_rank(row, target)
        expected["ndcg@5"] = retrieval_normalized_dcg(row, target, top_k=5)
        torch.testing.assert_close({name: ours[name][query] for name in expected}, expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # numba's, while it compiles ranx
def test_metrics_are_those_of_ranx():
    ranx = pytest.importorskip("ranx")
    scores, relevant = a_ranking(4, num_queries=200, num_candidates=60, seed=1)
    ours = ranking_metrics(scores, relevant)
    broken = with_ties_broken_against(scores, relevant).tolist()
    qrels = {f"q{i:03}": {f"c{j}": 1 for j in row} for i, row in enumerate(relevant)}
    run = {f"q{i:03}": {f"c{j}": s for j, s in enumerate(row)} for i, row in enumerate(broken)}
    names = ["recall@5", "mrr", "ndcg@5"]
    expected = ranx.evaluate(ranx.Qrels(qrels), ranx.Run(run), names, return_mean=False)
    for name in names:
        torch.testing.assert_close(ours[name].double(), torch.tensor(expected[name]).double())


def test_a_model_that_scores_all_alike_finds_nothing():
    values = ranking_metrics(torch.zeros(1, 20), [[0]], ks=(1, 19, 20))
    assert {name: float(value) for name, value in values.items()} == {
        "recall@1": 0, "recall@19": 0, "recall@20": 1, "mrr": pytest.approx(1 / 20), "ndcg@5": 0
    }  # fmt: skip


def test_a_perfect_ranking_scores_1_however_many_are_relevant():
    scores = torch.arange(20.0).expand(3, 20)
    values = ranking_metrics(scores, [[19], [18, 19], list(range(10, 20))], ks=(10,))
    assert all((value == 1).all() for value in values.values())


def test_permuting_candidates_changes_nothing():
    scores, relevant = a_ranking(5)
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(3))
    moved = [[order.tolist().index(i) for i in row] for row in relevant]
    torch.testing.assert_close(
        ranking_metrics(scores[:, order], moved), ranking_metrics(scores, relevant)
    )


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_refuses_scores_that_are_not_finite(value):
    with pytest.raises(UserError, match="NaN or infinity"):
        ranking_metrics(torch.tensor([[0.5, value]]), [[0]])


@pytest.mark.parametrize(
    ("relevant", "message"),
    [
        ([[0]], "2 rows of scores came with 1 lists"),
        ([[0], []], "query 1 needs relevant candidates"),
        ([[0], [1, 1]], r"each once; got \[1, 1\]"),
        ([[0], [3]], r"0 to 2, got \[3\]"),
        ([[-1], [2]], r"query 0: .* got \[-1\]"),
    ],
)
def test_refuses_relevant_lists_that_do_not_fit(relevant, message):
    with pytest.raises(UserError, match=message):
        ranking_metrics(torch.rand(2, 3), relevant)


def vectors(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def embeddings():
    queries, candidates = vectors(NUM_QUERIES, 3, 6), vectors(NUM_CANDIDATES, 5, 6, seed=1)
    candidates[3] = candidates[6]  # the same picture twice in the pool: a tie
    return {"query": queries, "candidate": candidates}


def metrics():
    return RetrievalMetrics(GROUPS, RELEVANT, NUM_CANDIDATES, ks=(1, 5))


def updated(metric, rows, batch_size=4):
    """`metric` after the rows given for each side, in batches."""
    for side, vectors in embeddings().items():
        for start in range(0, len(rows[side]), batch_size):
            index = torch.tensor(rows[side][start : start + batch_size])
            metric.update(side, index, vectors[index])
    return metric


ALL_ROWS = {"query": list(range(NUM_QUERIES)), "candidate": list(range(NUM_CANDIDATES))}


def expected_values():
    sides = embeddings()
    values = {}
    scores = nested_scores(sides["query"], sides["candidate"], GROUPS)
    for group, of_group in zip(GROUPS, scores, strict=True):
        for name, per_query in ranking_metrics(of_group, RELEVANT, (1, 5)).items():
            values[f"{name}/{group}"] = per_query.mean()
    return values


def test_the_metric_is_the_mean_over_queries_at_every_group():
    values = updated(metrics(), ALL_ROWS).compute()
    assert list(values)[:5] == [
        "recall@1/1x1",
        "recall@5/1x1",
        "mrr/1x1",
        "ndcg@5/1x1",
        "recall@1/2x4",
    ]
    torch.testing.assert_close(values, expected_values())


def test_order_and_repetition_of_rows_change_nothing():
    rows = {side: [*reversed(indices), indices[0], 2] for side, indices in ALL_ROWS.items()}
    torch.testing.assert_close(updated(metrics(), rows).compute(), expected_values())


def test_scoring_in_chunks_changes_nothing(monkeypatch):
    monkeypatch.setattr("metaembed_pl.training.metrics.SCORES_AT_A_TIME", 2 * NUM_CANDIDATES * 2)
    torch.testing.assert_close(updated(metrics(), ALL_ROWS).compute(), expected_values())


def test_a_reset_metric_starts_anew():
    metric = updated(metrics(), ALL_ROWS)
    metric.compute()
    metric.reset()
    metric.update("query", torch.tensor([6]), vectors(1, 2, 6))
    with pytest.raises(UserError, match="6 of 7 query rows were never given"):
        metric.compute()
    torch.testing.assert_close(updated(metric, ALL_ROWS).compute(), expected_values())


def test_bf16_embeddings_are_ranked_in_float32():
    metric = metrics()
    for side, rows in embeddings().items():
        metric.update(side, torch.arange(len(rows)), rows.bfloat16())
    assert metric.scores("2x4").dtype == torch.float32


def test_a_report_gets_all_scores_of_a_group():
    sides = embeddings()
    expected = nested_scores(sides["query"], sides["candidate"], [(1, 4)])[0]
    torch.testing.assert_close(updated(metrics(), ALL_ROWS).scores("1x4"), expected)


def test_a_missing_row_is_an_error_that_names_it():
    rows = ALL_ROWS | {"candidate": [0, 1, 2, 4, 5, 6, 8]}
    with pytest.raises(UserError, match="2 of 9 candidate rows were never given, first of all 3"):
        updated(metrics(), rows).compute()


@pytest.mark.parametrize(
    ("side", "index", "rows", "message"),
    [
        ("document", [0], vectors(1, 4, 6), "got 'document'"),
        ("query", [0, 1], vectors(1, 2, 6), "2 query indices came with 1 embeddings"),
        ("query", [7], vectors(1, 2, 6), "0 to 6, got 7 to 7"),
        ("candidate", [3, -1], vectors(2, 4, 6), "0 to 8, got -1 to 3"),
        ("candidate", [0], vectors(1, 3, 6), "2x4 needs 4 vectors of a candidate, got 3"),
        ("candidate", [0], vectors(1, 4, 6) * torch.nan, "candidate embeddings hold NaN"),
    ],
)
def test_refuses_rows_that_cannot_be_ranked(side, index, rows, message):
    with shapes_unchecked(), pytest.raises(UserError, match=message):
        metrics().update(side, torch.tensor(index), rows)


ROWS_OF_RANKS = {
    "uneven": [
        {"query": [0, 1, 2, 3, 4], "candidate": [8, 7, 6]},
        {"query": [5, 6], "candidate": [0, 1, 2, 3, 4, 5]},
    ],
    "padded": [
        {"query": [0, 2, 4, 6], "candidate": [0, 2, 4, 6, 8]},
        {"query": [1, 3, 5, 0], "candidate": [1, 3, 5, 7, 0]},
    ],
    "one rank without candidates": [
        {"query": [0, 1, 2], "candidate": []},
        {"query": [3, 4, 5, 6], "candidate": ALL_ROWS["candidate"]},
    ],
    "one rank without rows": [{"query": [], "candidate": []}, ALL_ROWS],
}


def work(rank):
    results = {}
    for name, rows in ROWS_OF_RANKS.items():
        metric = updated(metrics(), rows[rank])
        results[name] = metric.compute()
        metric.reset()
        assert updated(metric, rows[rank]).compute() == results[name], "after a reset"
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(work, tmp_path_factory.mktemp("metrics"))


@pytest.mark.parametrize("name", ROWS_OF_RANKS)
def test_rows_spread_over_two_ranks_give_the_same_values_on_both(ranks, name):
    for seen in ranks:
        torch.testing.assert_close(seen[name], expected_values())
