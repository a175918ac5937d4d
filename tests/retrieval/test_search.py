import pytest
import torch

import tiny
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.retrieval import search
from metaembed_pl.retrieval.search import best, rank


@pytest.fixture(scope="module")
def model():
    return tiny.embedder()


def items(count):
    return [Item(tiny.text(i)) for i in range(count)]


def slow_scores(queries, candidates, r_q, r_c):
    """MaxSim as the paper writes it, one dot product at a time."""
    return [
        [
            sum(
                max(torch.dot(query[i], candidate[j]).item() for j in range(r_c))
                for i in range(r_q)
            )
            for candidate in candidates
        ]
        for query in queries
    ]


@pytest.mark.parametrize("budget", ["1x1", "2x4", "4x1", None])
def test_ranks_by_maxsim_at_the_budget(model, budget):
    queries, candidates = [Item("red apple"), Item("star")], items(7)
    encoded = model.encode_query(queries), model.encode_candidate(candidates)
    r_q, r_c = (4, 8) if budget is None else map(int, budget.split("x"))
    found = rank(model, queries, candidates, budget, top=7)
    for hits, scores in zip(found, slow_scores(*encoded, r_q, r_c), strict=True):
        assert [hit.score for hit in hits] == pytest.approx(sorted(scores, reverse=True), abs=1e-5)
        assert [scores[hit.candidate] for hit in hits] == pytest.approx([hit.score for hit in hits])


def test_kept_embeddings_find_the_same_as_their_items(model):
    candidates = items(6)
    kept = model.encode_candidate(candidates)
    queries = [Item("green cat"), Item(image=tiny.picture(1))]
    assert rank(model, queries, kept, "2x4", 3) == rank(model, queries, candidates, "2x4", 3)


def test_many_queries_find_what_each_finds_alone(model, monkeypatch):
    queries, kept = items(5), model.encode_candidate(items(6))
    alone = [rank(model, [query], kept, top=6)[0] for query in queries]
    monkeypatch.setattr(search, "SCORES_AT_A_TIME", 13)  # two queries at a time
    for one, several in zip(alone, rank(model, queries, kept, top=6), strict=True):
        assert [hit.candidate for hit in one] == [hit.candidate for hit in several]
        assert [hit.score for hit in one] == pytest.approx([hit.score for hit in several], abs=1e-5)


def test_of_equal_scores_the_earlier_candidate_comes_first():
    scores = torch.zeros(1, 1000)
    scores[0, 500] = 1
    assert [hit.candidate for hit in best(scores, 5)[0]] == [500, 0, 1, 2, 3]


def test_a_small_pool_is_ranked_whole(model):
    assert len(rank(model, [Item("cat")], items(3), top=10)[0]) == 3


def test_no_queries_find_nothing(model):
    assert rank(model, [], items(3)) == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"budget": "3x4"}, "not trained at 3 query vectors; choose one of 1, 2, 4"),
        ({"candidates": []}, "no candidates"),
    ],
)
def test_refuses_what_it_cannot_rank_before_encoding_anything(
    model, monkeypatch, settings, message
):
    monkeypatch.setattr(model, "encode_query", None)
    settings = {"candidates": items(2), **settings}
    with pytest.raises(UserError, match=message):
        rank(model, [Item("cat")], **settings)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_refuses_scores_that_are_not_finite(value):
    with pytest.raises(UserError, match="NaN or infinity"):
        best(torch.tensor([[0.0, value]]), 1)
