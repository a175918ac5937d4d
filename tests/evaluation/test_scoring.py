"""Ranks from a store: what all scores at once would give, and MMEB's protocol by hand."""

import pytest
import torch
from torch.nn import functional as F

from metaembed_pl.budget import Budget, parse_groups
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.evaluation import scoring
from metaembed_pl.evaluation.scoring import rank_task
from metaembed_pl.item import Item
from metaembed_pl.late_interaction import nested_scores
from metaembed_pl.ranking import ranking_metrics
from metaembed_pl.retrieval.store import Store

GROUPS = parse_groups(["1x1", "2x4", "4x8"])


def vectors(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def store_of(folder, embeddings, ids):
    store = Store.create(folder, GROUPS, embeddings.shape[2], "made-up", "fp32")
    store.add(ids, embeddings)
    return store


def items(count, letter):
    return [Item(f"{letter}{i}", id=f"{letter}{i}") for i in range(count)]


LISTS = {
    "pool": None,
    "lists that overlap": [[i, *range(40, 60), (i + 7) % 40] for i in range(30)],
    "lists apart": [[i, i + 30, (3 * i + 1) % 30] for i in range(30)],
    "one list for all": [list(range(35))] * 30,
}


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """30 queries; 60 candidates, of which two are alike; stored in another order than asked."""
    queries, candidates = vectors(30, 4, 16), vectors(60, 8, 16, seed=1)
    candidates[3] = candidates[33]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(2))
    ids = [f"c{i}" for i in order.tolist()]
    return queries, candidates, store_of(tmp_path_factory.mktemp("s") / "s", candidates[order], ids)


@pytest.mark.parametrize("kind", LISTS)
@pytest.mark.parametrize("budget", ["1x1", "4x1", "2x4", "4x8"])
def test_ranks_are_those_of_all_scores_at_once(embedded, kind, budget, monkeypatch):
    queries, candidates, store = embedded
    lists = LISTS[kind] and [sorted(set(indices)) for indices in LISTS[kind]]
    relevant = [
        [i] if lists and kind != "lists that overlap" else sorted({i, 40}) for i in range(30)
    ]
    gains = [[1.0 + i % 3] * len(right) for i, right in enumerate(relevant)]
    task = RetrievalSet("x", items(30, "q"), items(60, "c"), relevant, gains, lists)
    monkeypatch.setattr(scoring, "GATHERED_BYTES", 4 * 8 * 16 * 7)  # seven at a time
    monkeypatch.setattr("metaembed_pl.retrieval.scoring.SCORES_AT_A_TIME", 30 * 11)
    ranked = rank_task(task, queries, store, Budget.parse(budget), num_hits=3)
    scores = nested_scores(queries, candidates, [budget])[0]
    torch.testing.assert_close(
        ranked.values, ranking_metrics(scores, relevant, gains=gains, lists=lists)
    )
    for query in range(30):
        of = sorted(task.searched(query), key=lambda c: -scores[query, c].item())[:3]
        assert [scores[query, c].item() for c, _ in ranked.hits[query]] == pytest.approx(
            [scores[query, c].item() for c in of], abs=1e-5
        )
        assert {c for c, _ in ranked.hits[query]} <= set(task.searched(query))


def test_a_candidate_that_could_not_be_read_is_found_by_nobody(tmp_path):
    candidates = vectors(4, 8, 16)
    store = store_of(tmp_path / "s", candidates[[0, 2]], ["c0", "c2"])
    task = RetrievalSet("x", items(2, "q"), items(4, "c"), [[1, 2], [3]])
    queries = candidates[[2, 3], :4]
    values = rank_task(task, queries, store, Budget(4, 8)).values
    assert values["recall@10"].tolist() == [0.5, 0.0]
    assert values["precision@1"].tolist() == [1.0, 0.0]
    assert values["mrr"].tolist() == [1.0, 0.0]


def test_mmeb_by_hand(tmp_path):
    """Four queries with lists of their own, in which the first candidate is the right one.

    On the unit circle, one vector a side: q0 finds its own; q1 is tied with a copy of its right
    candidate and so is wrong; q2's best candidate stands in other lists alone and does not count;
    q3 finds another one first. Precision@1 is 2 / 4.
    """
    groups = parse_groups(["1x1"])
    angles = {"right0": 0, "right1": 90, "copy1": 90, "right2": 180, "right3": 250, "near3": 268}
    store = Store.create(tmp_path / "s", groups, 2, "made-up", "fp32")
    circle = torch.deg2rad(torch.tensor([*angles.values(), 200], dtype=torch.float))
    names = [*angles, "near2"]
    store.add(names, torch.stack([circle.cos(), circle.sin()], dim=1).unsqueeze(1))
    at = {name: i for i, name in enumerate(names)}
    asked = torch.deg2rad(torch.tensor([5.0, 90.0, 195.0, 270.0]))
    lists = [
        ["right0", "near3", "right2"],
        ["right1", "copy1", "right0"],
        ["right2", "right0", "right1"],
        ["right3", "near3", "near2"],
    ]
    task = RetrievalSet(
        "mmeb",
        items(4, "q"),
        [Item(name, id=name) for name in names],
        [[at[of[0]]] for of in lists],
        lists=[[at[name] for name in of] for of in lists],
    )
    queries = torch.stack([asked.cos(), asked.sin()], dim=1).unsqueeze(1)
    ranked = rank_task(task, queries, store, Budget(1, 1))
    assert ranked.values["precision@1"].tolist() == [1, 0, 1, 0]
    assert ranked.values["mrr"].tolist() == [1, 0.5, 1, 0.5]
    without_lists = RetrievalSet("mmeb", task.queries, task.candidates, task.relevant)
    pooled = rank_task(without_lists, queries, store, Budget(1, 1)).values["precision@1"]
    assert pooled.tolist() == [1, 0, 0, 0]
