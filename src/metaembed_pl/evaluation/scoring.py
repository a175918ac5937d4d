"""Ranks of a task's right candidates, from a store that is read some rows at a time.

A budget is one pass over the planes it needs. Of each query only the scores of its right
candidates, how many wrong ones rank before them, and the first few it finds are kept: memory does
not grow with the corpus.

Q: queries    C: candidates    n: some of them    P: right candidates of a query, padded
Rq: vectors of a query    D: width    K: hits
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaembed_pl.budget import Budget
from metaembed_pl.data.beir import StoredItems
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.item import Item
from metaembed_pl.late_interaction import maxsim
from metaembed_pl.ranking import RankCounter, metrics_of_ranks, padded
from metaembed_pl.retrieval.store import Store

NUM_HITS = 10
GATHERED_BYTES = 2**27
"""Of candidates' vectors that are gathered at a time: 128 MiB of float32."""
SHARE_OF_SCAN = 4
"""Reading rows here and there costs more than reading all in order from about a quarter of them."""


@dataclass(frozen=True)
class Ranked:
    """What the queries of a task find at one budget.

    Args:
        values: metric -> one value a query.
        hits: for each query the first candidates, by index, and their scores; best first.
    """

    values: dict[str, Float[Tensor, " Q"]]
    hits: list[list[tuple[int, float]]]

    @classmethod
    def joined(cls, parts: Sequence["Ranked"]) -> "Ranked":
        """What the queries of several parts of a task find, in their order."""
        names = parts[0].values
        values = {name: torch.cat([part.values[name] for part in parts]) for name in names}
        return cls(values, [hits for part in parts for hits in part.hits])


class Group(NamedTuple):
    """Queries that are scored together.

    Args:
        queries: which.
        rows: of the store, ascending, that all of them search; None: every row.
        searched: which rows each of them searches, where they differ.
    """

    queries: Int[Tensor, " q"]
    rows: Int[Tensor, " n"] | None
    searched: Bool[Tensor, "q C"] | None


def rank_task(
    task: RetrievalSet,
    queries: Float[Tensor, "Q Rq D"],
    store: Store,
    budget: Budget,
    num_hits: int = NUM_HITS,
) -> Ranked:
    """Rank the candidates of a task at a budget.

    Args:
        task: what is asked, and what is right.
        queries: meta embeddings of its queries; where they are is where scores are made.
        store: of its candidates, by their uid. One that is missing there, because it could not be
            read, is found by no query.
        budget: to spend.
        num_hits: how many hits to keep.
    """
    rows = rows_of(task, store)
    index, gains = padded(task.relevant, task.gains)
    right = torch.where((gains > 0) & (index >= 0), rows[index.clamp(min=0)], -1)
    itself = torch.tensor(task.itself or [-1] * len(task.relevant))
    itself = torch.where(itself >= 0, rows[itself.clamp(min=0)], -1)
    ranks, gains_by_rank = torch.empty_like(gains), torch.empty_like(gains)
    hits: list[list[tuple[int, float]]] = [[] for _ in task.relevant]
    candidate_at = torch.full((len(store),), -1)
    candidate_at[rows[rows >= 0]] = (rows >= 0).nonzero().flatten()
    for group in _groups(task, rows, len(store)):
        counter, scores, found = _rank_group(
            group,
            queries[group.queries],
            right[group.queries],
            gains[group.queries],
            itself[group.queries],
            store,
            budget,
            num_hits,
        )
        ranks[group.queries] = counter.ranks().cpu()
        gains_by_rank[group.queries] = counter.gains.cpu()
        for query, *of_query in zip(group.queries, scores.tolist(), found.tolist(), strict=True):
            hits[query] = [
                (int(candidate_at[row]), score)
                for score, row in zip(*of_query, strict=True)
                if score > -torch.inf
            ]
    return Ranked(metrics_of_ranks(ranks, gains_by_rank), hits)


def rows_of(task: RetrievalSet, store: Store) -> Int[Tensor, " C"]:
    """The row of each candidate in the store; -1 where it is not in it."""
    place = {id: row for row, id in enumerate(store.ids)}
    return torch.tensor([place.get(uid, -1) for uid in uids(task.candidates)])


def uids(items: Sequence[Item]) -> list[str]:
    """The uid of each item, without reading those that are stored with theirs."""
    return items.ids if isinstance(items, StoredItems) else [item.uid for item in items]


def _rank_group(
    group: Group,
    queries: Float[Tensor, "q Rq D"],
    right: Int[Tensor, "q P"],
    gains: Float[Tensor, "q P"],
    itself: Int[Tensor, " q"],
    store: Store,
    budget: Budget,
    num_hits: int,
) -> tuple[RankCounter, Float[Tensor, "q K"], Int[Tensor, "q K"]]:
    """Ranks, and the scores and rows of the first hits."""
    device = queries.device
    counter = RankCounter(_right_scores(queries, right.to(device), store, budget), gains.to(device))
    best = torch.full((len(queries), num_hits), -torch.inf, device=device)
    best_rows = torch.full((len(queries), num_hits), -1, device=device)
    for rows, scores in _scored(queries, group.rows, store, budget):
        searched = torch.ones(scores.shape, dtype=torch.bool, device=device)
        if group.searched is not None:
            searched = group.searched[:, rows.cpu()].to(device)
        searched &= rows != itself.to(device)[:, None]
        at, is_here = _find(right.to(device), rows)
        # Padding points at the first row, and must not say that it is wrong.
        is_right = torch.zeros_like(searched, dtype=torch.int8)
        is_right = is_right.scatter_reduce(1, at, is_here.to(torch.int8), "amax").bool()
        counter.add(scores, searched & ~is_right)
        scores = torch.cat([best, scores.masked_fill(~searched, -torch.inf)], dim=1)
        best, order = scores.topk(num_hits, dim=1)
        best_rows = torch.cat([best_rows, rows.expand(len(queries), -1)], dim=1).gather(1, order)
    return counter, best, best_rows


def _right_scores(
    queries: Float[Tensor, "q Rq D"], right: Int[Tensor, "q P"], store: Store, budget: Budget
) -> Float[Tensor, "q P"]:
    """Scores of right candidates by their rows; -infinity for row -1."""
    found = torch.full(right.shape, -torch.inf, device=right.device)
    wanted = right[right >= 0].unique()
    for rows, scores in _scored(queries, wanted.cpu(), store, budget):
        at, is_here = _find(right, rows)
        found = torch.where(is_here, scores.gather(1, at), found)
    return found


def _find(
    wanted: Int[Tensor, "q P"], rows: Int[Tensor, " n"]
) -> tuple[Int[Tensor, "q P"], Bool[Tensor, "q P"]]:
    """Where rows stand among some ascending ones, and whether they do."""
    at = torch.searchsorted(rows, wanted).clamp(max=len(rows) - 1)
    return at, rows[at] == wanted


def _scored(
    queries: Float[Tensor, "q Rq D"], rows: Int[Tensor, " N"] | None, store: Store, budget: Budget
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "q n"]]]:
    """Scores of all rows, or of some, a few at a time and in order."""
    if rows is None:
        for part, scores in store.scores(queries, budget):
            yield torch.arange(part.start, part.stop, device=queries.device), scores
        return
    queries = queries[:, : budget.r_q]
    for part in rows.split(max(1, GATHERED_BYTES // (4 * budget.r_c * store.width))):
        vectors = store.vectors(part.tolist(), budget.r_c).to(queries.device)
        yield part.to(queries.device), maxsim(queries, vectors)


def _groups(task: RetrievalSet, rows: Int[Tensor, " C"], num_rows: int) -> list[Group]:
    """One group where all rows are read; else one for each list that queries have in common."""
    every = torch.arange(len(task.queries))
    if task.lists is None:
        return [Group(every, None, None)]
    if SHARE_OF_SCAN * sum(map(len, task.lists)) >= len(task.lists) * num_rows:
        searched = torch.zeros(len(task.lists), len(task.candidates), dtype=torch.bool)
        for query, indices in enumerate(task.lists):
            searched[query, indices] = True
        by_row = torch.zeros(len(task.lists), num_rows, dtype=torch.bool)
        by_row[:, rows[rows >= 0]] = searched[:, rows >= 0]
        return [Group(every, None, by_row)]
    alike: dict[tuple[int, ...], list[int]] = {}
    for query, indices in enumerate(task.lists):
        alike.setdefault(tuple(sorted(indices)), []).append(query)
    return [
        Group(torch.tensor(of), found[found >= 0].sort().values, None)
        for indices, of in alike.items()
        for found in [rows[list(indices)]]
    ]
