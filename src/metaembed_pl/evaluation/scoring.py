"""Ranks of a task's right candidates, from a store that is read in blocks of rows.

Each budget is one pass over the planes it needs. Only the scores of a query's right candidates, the
number of wrong ones ranked before them, and the first hits are kept, so memory does not grow with
the corpus.

Q: queries    C: candidates    n: some of them    P: right candidates of a query, padded
Rq: vectors of a query    D: width
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaembed_pl.budget import Budget
from metaembed_pl.data.beir import StoredItems
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.item import Item
from metaembed_pl.late_interaction import maxsim, narrowed
from metaembed_pl.ranking import NUM_HITS, Ranked, Ranker, padded
from metaembed_pl.retrieval.store import Store

GATHERED_BYTES = 2**27
"""Of candidates' vectors that are gathered at a time: 128 MiB of float32."""
SHARE_OF_SCAN = 4
"""Reading rows here and there costs more than reading all in order from about a quarter of them."""


class Group(NamedTuple):
    """Queries that are scored together.

    Args:
        queries: their numbers.
        rows: of the store, ascending, that all of them search; None: every row.
        searched: the rows that each of them searches, if they differ.
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
        task: has the queries and their right candidates.
        queries: meta embeddings of its queries; scores are computed on their device.
        store: of its candidates, by uid. A candidate that is missing, because it could not be
            read, is found by no query.
        budget: to search with.
        num_hits: how many hits to keep.
    """
    rows = rows_of(task, store)
    index, gains = padded(task.relevant, task.gains)
    right = torch.where((gains > 0) & (index >= 0), rows[index.clamp(min=0)], -1)
    itself = torch.tensor(task.itself or [-1] * len(task.relevant))
    itself = torch.where(itself >= 0, rows[itself.clamp(min=0)], -1)
    groups, parts, device = _groups(task, rows, len(store)), [], queries.device
    for group in groups:
        vectors = queries[group.queries]
        wanted, of_right, left_out = (of[group.queries].to(device) for of in (right, gains, itself))
        scores = _right_scores(vectors, wanted, store, budget)
        ranker = Ranker(wanted, scores, of_right, left_out, num_hits)
        for ids, scores in _scored(vectors, group.rows, store, budget):
            searched = group.searched
            if searched is not None:
                searched = searched[:, ids.cpu()].to(device)
            ranker.add(scores, ids, searched)
        found = ranker.ranked()
        parts.append(Ranked({name: of.cpu() for name, of in found.values.items()}, found.hits))
    order = torch.cat([group.queries for group in groups]).argsort().tolist()
    ranked = Ranked.joined(parts, order)
    candidates = {int(row): candidate for candidate, row in enumerate(rows)}
    hits = [[(candidates[row], score) for row, score in found] for found in ranked.hits]
    return Ranked(ranked.values, hits)


def rows_of(task: RetrievalSet, store: Store) -> Int[Tensor, " C"]:
    """The row of each candidate in the store; -1 if it is not there."""
    place = {id: row for row, id in enumerate(store.ids)}
    return torch.tensor([place.get(uid, -1) for uid in uids(task.candidates)])


def uids(items: Sequence[Item]) -> list[str]:
    """The uid of each item; stored items are not read for this."""
    return items.ids if isinstance(items, StoredItems) else [item.uid for item in items]


def _right_scores(
    queries: Float[Tensor, "q Rq D"], right: Int[Tensor, "q P"], store: Store, budget: Budget
) -> Float[Tensor, "q P"]:
    """Scores of right candidates, by their rows; -infinity for row -1."""
    found = torch.full(right.shape, -torch.inf, device=right.device)
    wanted = right[right >= 0].unique()
    for rows, scores in _scored(queries, wanted.cpu(), store, budget):
        at = torch.searchsorted(rows, right).clamp(max=len(rows) - 1)
        found = torch.where(rows[at] == right, scores.gather(1, at), found)
    return found


def _scored(
    queries: Float[Tensor, "q Rq D"], rows: Int[Tensor, " N"] | None, store: Store, budget: Budget
) -> Iterator[tuple[Int[Tensor, " n"], Float[Tensor, "q n"]]]:
    """Scores of all rows, or of some, a few at a time and in order."""
    if rows is None:
        for part, scores in store.scores(queries, budget):
            yield torch.arange(part.start, part.stop, device=queries.device), scores
        return
    if not len(rows):
        return
    r_q, r_c, width = budget
    queries = narrowed(store.accept(queries)[:, :r_q], width)
    for part in rows.split(max(1, GATHERED_BYTES // (4 * r_c * (width or store.width)))):
        vectors = store.vectors(part.tolist(), r_c, width).to(queries.device)
        yield part.to(queries.device), maxsim(queries, vectors)


def _groups(task: RetrievalSet, rows: Int[Tensor, " C"], num_rows: int) -> list[Group]:
    """One group if all rows are read; else one for each list that queries have in common."""
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
