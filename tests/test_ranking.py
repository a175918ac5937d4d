"""Ranking metrics against independent implementations, ties, grades and lists included."""

import math

import pytest
import pytrec_eval
import torch
from torchmetrics.functional.retrieval import (
    retrieval_normalized_dcg,
    retrieval_precision,
    retrieval_recall,
    retrieval_reciprocal_rank,
)

from metaembed_pl.errors import UserError
from metaembed_pl.ranking import Ranker, padded, rank, ranking_metrics


def a_ranking(distinct_scores, num_queries=30, num_candidates=25, seed=0):
    """Scores with ties, and one to eight relevant candidates a query."""
    generator = torch.Generator().manual_seed(seed)
    shape = num_queries, num_candidates
    scores = torch.randint(distinct_scores, shape, generator=generator) / distinct_scores
    orders = torch.rand(shape, generator=generator).argsort(dim=1)
    relevant = [order[: 1 + query % 8].tolist() for query, order in enumerate(orders)]
    return scores, relevant


def with_ties_broken_against(scores, relevant, gains):
    """The same ranking for an implementation that knows no rule for ties."""
    # torchmetrics never finds a candidate whose score is 0 or below.
    scores = scores.double() + 1
    for row, indices, values in zip(scores, relevant, gains, strict=True):
        row[indices] -= 1e-6 * torch.tensor(values).double()
    return scores


def grades(relevant):
    """Gains of 1 to 3."""
    return [[1.0 + (i + query) % 3 for i in range(len(row))] for query, row in enumerate(relevant)]


@pytest.mark.parametrize("distinct_scores", [2, 5, 1000])
def test_metrics_are_those_of_torchmetrics_with_ties_against_us(distinct_scores):
    scores, relevant = a_ranking(distinct_scores)
    gains = grades(relevant)
    ours = ranking_metrics(scores, relevant, ks=(1, 5, 10), gains=gains)
    broken = with_ties_broken_against(scores, relevant, gains)
    for query, indices in enumerate(relevant):
        graded = torch.zeros(scores.shape[1], dtype=torch.double)
        graded[indices] = torch.tensor(gains[query]).double()
        row, target = broken[query], graded > 0
        expected = {f"recall@{k}": retrieval_recall(row, target, top_k=k) for k in (1, 5, 10)}
        expected["precision@1"] = retrieval_precision(row, target, top_k=1)
        expected["mrr"] = retrieval_reciprocal_rank(row, target)
        for k in (5, 10):
            expected[f"ndcg@{k}"] = retrieval_normalized_dcg(row, graded, top_k=k).float()
        torch.testing.assert_close({name: ours[name][query] for name in expected}, expected)


def test_metrics_are_those_of_trec_eval():
    scores, relevant = a_ranking(4, num_queries=200, num_candidates=60, seed=1)
    gains = [[int(gain) for gain in row] for row in grades(relevant)]
    ours = ranking_metrics(scores, relevant, gains=gains)
    broken = with_ties_broken_against(scores, relevant, gains).tolist()
    qrels = {
        f"q{i:03}": {f"c{j}": gain for j, gain in zip(*rows, strict=True)}
        for i, rows in enumerate(zip(relevant, gains, strict=True))
    }
    run = {f"q{i:03}": {f"c{j}": s for j, s in enumerate(row)} for i, row in enumerate(broken)}
    names = {"recall": "recall_{}", "precision": "P_{}", "ndcg": "ndcg_cut_{}", "mrr": "recip_rank"}
    found = pytrec_eval.RelevanceEvaluator(
        qrels, {"recall.5,10", "P.1", "ndcg_cut.5,10", "recip_rank"}
    ).evaluate(run)
    for name in ("recall@5", "recall@10", "precision@1", "mrr", "ndcg@5", "ndcg@10"):
        kind, _, k = name.partition("@")
        expected = [found[query][names[kind].format(k)] for query in qrels]
        torch.testing.assert_close(ours[name].double(), torch.tensor(expected).double())


def of_a_slow_loop(scores, relevant, gains, lists):
    """Rank by rank, as the definitions say it."""
    found = {"precision@1": [], "mrr": [], "ndcg@10": []}
    for row, right, values, searched in zip(scores, relevant, gains, lists, strict=True):
        gain = dict(zip(right, values, strict=True))
        order = sorted(searched, key=lambda c: (-row[c].item(), gain.get(c, 0)))
        ranks = [rank for rank, c in enumerate(order, start=1) if c in gain]
        found["precision@1"].append(float(order[0] in gain))
        found["mrr"].append(1 / ranks[0])
        dcg = sum(gain.get(c, 0) / math.log2(1 + r) for r, c in enumerate(order[:10], start=1))
        ideal = sorted(values, reverse=True)[:10]
        best = sum(value / math.log2(1 + r) for r, value in enumerate(ideal, start=1))
        found["ndcg@10"].append(dcg / best)
    return {name: torch.tensor(values) for name, values in found.items()}


def test_a_query_searches_its_own_list_alone():
    scores, relevant = a_ranking(4)
    gains = grades(relevant)
    lists = [[*row, *range(query % 7, 25, 3)] for query, row in enumerate(relevant)]
    ours = ranking_metrics(scores, relevant, gains=gains, lists=lists)
    lists = [list(dict.fromkeys(row)) for row in lists]
    expected = of_a_slow_loop(scores, relevant, gains, lists)
    torch.testing.assert_close({name: ours[name] for name in expected}, expected)
    assert (ours["mrr"] != ranking_metrics(scores, relevant)["mrr"]).any()


def test_a_query_whose_list_holds_nothing_finds_nothing():
    """Where all its candidates are missing from the corpus."""
    found = rank(torch.tensor([[0.5, 0.2], [0.1, 0.3]]), [[-1], [1]], lists=[[], [0, 1]])
    assert found.values["mrr"].tolist() == [0.0, 1.0]
    assert found.hits[0] == []


def test_candidates_added_in_parts_rank_as_those_added_at_once():
    scores, relevant = a_ranking(4)
    index, gains = padded(relevant, grades(relevant))
    ranker = Ranker(index, scores.gather(1, index).masked_fill(gains == 0, -torch.inf), gains)
    for part in torch.randperm(25, generator=torch.Generator().manual_seed(1)).split(4):
        ids = part.sort().values
        ranker.add(scores[:, ids], ids)
    found, expected = ranker.ranked(), rank(scores, relevant, gains=grades(relevant))
    torch.testing.assert_close(found.values, expected.values)
    for hits, others in zip(found.hits, expected.hits, strict=True):
        assert [score for _, score in hits] == [score for _, score in others]


@pytest.mark.parametrize("distinct_scores", [1, 2, 5, 1000])
def test_hits_stand_at_the_ranks_that_the_metrics_count(distinct_scores):
    scores, relevant = a_ranking(distinct_scores)
    gains = grades(relevant)
    lists = [[*row, *range(query % 7, 25, 3)] for query, row in enumerate(relevant)]
    lists = [list(dict.fromkeys(row)) for row in lists]
    itself = [next(c for c in lists[q] if c not in relevant[q]) for q in range(len(lists))]
    found = rank(scores, relevant, gains, lists, itself, num_hits=10)
    for query, hits in enumerate(found.hits):
        right, searched = set(relevant[query]), set(lists[query]) - {itself[query]}
        of = [found_id for found_id, _ in hits]
        assert len(set(of)) == len(of) == min(10, len(searched))
        assert set(of) <= searched
        # Best first; among equal scores the wrong ones come first.
        keys = [(-scores[query, i].item(), i in right) for i in of]
        assert keys == sorted(keys)
        assert all(score == scores[query, i].item() for i, score in hits)
        assert found.values["precision@1"][query] == (of[0] in right)
        for k in (1, 5, 10):
            share = len(right & set(of[:k])) / len(right)
            assert found.values[f"recall@{k}"][query] == pytest.approx(share)


def test_a_right_candidate_without_a_score_counts_as_not_found():
    ranker = Ranker(
        torch.tensor([[7, 3]]), torch.tensor([[5.0, -torch.inf]]), torch.tensor([[1.0, 3.0]])
    )
    ranker.add(torch.tensor([[9.0, 1.0, 5.0]]), torch.tensor([4, 6, 7]))
    found = ranker.ranked()
    assert ranker.ranks().tolist() == [[2, torch.inf]]
    assert found.hits == [[(4, 9.0), (7, 5.0), (6, 1.0)]]
    assert found.values["recall@10"] == 0.5
    assert found.values["ndcg@5"] == pytest.approx(1 / math.log2(3) / (3 + 1 / math.log2(3)))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 16.0])
def test_scores_that_rounding_tells_apart_are_a_tie(scale):
    right = torch.tensor(scale)
    for wrong, expected in (
        (torch.nextafter(right, torch.tensor(0.0)), 2),
        (right - 1e-5 * right.clamp(min=1), 1),
    ):
        values = ranking_metrics(torch.stack([right, wrong])[None], [[0]])
        assert 1 / values["mrr"] == expected


def test_a_model_that_scores_all_alike_finds_nothing():
    values = ranking_metrics(torch.zeros(1, 20), [[0]], ks=(1, 19, 20))
    assert {name: float(value) for name, value in values.items()} == {
        "recall@1": 0, "recall@19": 0, "recall@20": 1, "precision@1": 0,
        "mrr": pytest.approx(1 / 20), "ndcg@5": 0, "ndcg@10": 0,
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
    ("relevant", "more", "message"),
    [
        ([[0]], {}, "2 rows of scores came with 1 lists"),
        ([[0], []], {}, "query 1 needs relevant candidates"),
        ([[0], [1, 1]], {}, r"each once; got \[1, 1\]"),
        ([[0], [3]], {}, r"0 to 2, got \[3\]"),
        ([[0], [2]], {"lists": [[0, 1], [0, 1]]}, r"query 1: its list does not hold .* \[2\]"),
        ([[0], [2]], {"gains": [[1.0], [0.0]]}, r"query 1: .* gain above 0, got \[0.0\]"),
        ([[0], [2]], {"gains": [[1.0, 2.0], [1.0]]}, r"query 0: each of its 1 .* \[1.0, 2.0\]"),
    ],
)
def test_refuses_lists_that_do_not_fit(relevant, more, message):
    with pytest.raises(UserError, match=message):
        ranking_metrics(torch.rand(2, 3), relevant, **more)
