"""The metric in training: every row once, at every group, whichever rank it came from."""

import pytest
import torch
from torch.nn import functional as F

from metaembed_pl.budget import parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.late_interaction import nested_scores
from metaembed_pl.ranking import ranking_metrics
from metaembed_pl.training.metrics import RetrievalMetrics, headline
from ranks import on_two_ranks
from unchecked import shapes_unchecked

GROUPS = parse_groups(["1x1", "2x4"])
NUM_QUERIES, NUM_CANDIDATES = 7, 9
RELEVANT = [[0], [1, 8], [2], [3, 4, 5], [4], [0], [8]]


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


def test_what_cannot_be_read_is_not_found_and_finds_nothing():
    """As if the candidate were missing from the pool, and 0 for the query."""
    metric, sides = metrics(), embeddings()
    metric.update("query", torch.arange(7), sides["query"], unread=[5])
    metric.update("candidate", torch.tensor([8, *range(8)]), sides["candidate"].roll(1, 0), [0])
    values = metric.compute()
    assert metric.unread == {"query": [5], "candidate": [8]}
    right = [[0], [1, -1], [2], [3, 4, 5], [4], [0], [-1]]  # without candidate 8
    scores = nested_scores(sides["query"], sides["candidate"][:8], GROUPS)
    for group, of_group in zip(GROUPS, scores, strict=True):
        for name, per_query in ranking_metrics(of_group, right, (1, 5)).items():
            per_query[5] = 0
            assert values[f"{name}/{group}"] == pytest.approx(per_query.mean().item()), name
    assert metric.ranked[GROUPS[0]].hits[5] == []
    assert all(hit != 8 for found in metric.ranked[GROUPS[-1]].hits for hit, _ in found)


def test_the_largest_group_is_ranked_at_every_width_too():
    metric = updated(
        RetrievalMetrics(GROUPS, RELEVANT, NUM_CANDIDATES, (1, 5), widths=(4, 2)), ALL_ROWS
    )
    values, sides = metric.compute(), embeddings()
    assert [str(budget) for budget in metric.ranked] == ["1x1", "2x4x2", "2x4x4", "2x4"]
    for width in (2, 4):
        first = {name: F.normalize(of[..., :width], dim=-1) for name, of in sides.items()}
        products = torch.einsum("qid,cjd->qcij", first["query"][:, :2], first["candidate"][:, :4])
        scores = products.amax(dim=3).sum(dim=2)
        for name, per_query in ranking_metrics(scores, RELEVANT, (1, 5)).items():
            assert values[f"{name}/2x4x{width}"] == pytest.approx(per_query.mean().item())
    assert headline({"a": values}, "mrr/2x4x2", metric.budgets) == values["mrr/2x4x2"]


def test_the_metric_is_the_mean_over_queries_at_every_group():
    values = updated(metrics(), ALL_ROWS).compute()
    names = ["recall@1", "recall@5", "precision@1", "mrr", "ndcg@5", "ndcg@10"]
    assert list(values) == [f"{name}/{group}" for group in ("1x1", "2x4") for name in names]
    torch.testing.assert_close(values, expected_values())


def test_grades_and_lists_reach_the_ranking_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr("metaembed_pl.training.metrics.SCORES_AT_A_TIME", 2 * NUM_CANDIDATES * 2)
    gains = [[3.0] * len(right) for right in RELEVANT]
    gains[3] = [1.0, 2.0, 3.0]
    lists = [sorted({*right, 1, 2, 6}) for right in RELEVANT]
    sides = embeddings()
    scores = nested_scores(sides["query"], sides["candidate"], ["2x4"])[0]
    expected = ranking_metrics(scores, RELEVANT, (1, 5), gains, lists)
    metric = RetrievalMetrics(GROUPS, RELEVANT, NUM_CANDIDATES, (1, 5), gains, lists)
    values = updated(metric, ALL_ROWS).compute()
    for name, per_query in expected.items():
        assert values[f"{name}/2x4"] == pytest.approx(per_query.mean().item())
    assert values["ndcg@5/2x4"] != pytest.approx(
        updated(metrics(), ALL_ROWS).compute()["ndcg@5/2x4"]
    )


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
    metric.compute()
    rounded = [rows.bfloat16().float() for rows in embeddings().values()]
    expected = nested_scores(*rounded, ["2x4"])[0].max(dim=1).values.tolist()
    assert [hits[0][1] for hits in metric.ranked[GROUPS[1]].hits] == pytest.approx(expected)


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
        ("candidate", [0], vectors(1, 4, 6) * torch.nan, "candidate embeddings contain NaN"),
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


VALUES = {
    name: {
        f"{metric}/{group}": torch.tensor(value + i)
        for i, metric in enumerate(["recall@1", "ndcg@5"])
        for group, value in (("1x1", first), ("2x4", first + 10))
    }
    for name, first in (("a", 0.0), ("a/b", 100.0))
}


@pytest.mark.parametrize(
    ("choice", "value"),
    [
        (None, 60),
        ("recall@1", 60),
        ("ndcg@5", 61),
        ("ndcg@5/1x1", 51),
        ("a/b/ndcg@5", 111),
        ("a/recall@1/1x1", 0),
    ],
)
def test_the_headline_is_the_metric_that_was_chosen(choice, value):
    assert headline(VALUES, choice, GROUPS) == value


@pytest.mark.parametrize("choice", ["ndcg@3", "ndcg@5/4x8", "c/ndcg@5", "a/"])
def test_refuses_a_headline_that_is_no_metric(choice):
    with pytest.raises(UserError, match=f"no metric '{choice}'.* recall@1, .*/1x1 or /2x4"):
        headline(VALUES, choice, GROUPS)
