"""The ranker: computes ranks from scores, metrics from ranks, and the first hits.

Ties count against the model: a wrong candidate with the score of a right one ranks before it, so a
model that gives every candidate the same vector scores 0, not 1. Scores that differ only by
rounding are ties too: if a picture is in a pool twice, its two scores may differ in the last digit,
depending on the position in the batch. Metrics must not depend on batch sizes. Metrics and hits
come from the same ranks, so a picture of the hits cannot contradict them.

Q: queries    C: candidates    n: some candidates    P: right candidates of a query, padded
K: hits
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaembed_pl.errors import UserError

ROUNDING = 2.0**-20
"""Eight units in the last place of float32: how far two sums of the same products may differ."""
NUM_HITS = 10
RECALL_AT = (1, 5, 10)
NDCG_AT = (5, 10)
METRICS = (
    *(f"recall@{k}" for k in RECALL_AT),
    "precision@1",
    "mrr",
    *(f"ndcg@{k}" for k in NDCG_AT),
)

Hits = list[list[tuple[int, float]]]
"""For each query its first candidates, by index, with their scores; best first."""


@dataclass(frozen=True)
class Ranked:
    """The metrics and hits of some queries at one budget.

    Args:
        values: metric -> one value a query; see `metrics_of_ranks`.
        hits: the first candidates of each query.
    """

    values: dict[str, Float[Tensor, " Q"]]
    hits: Hits

    @classmethod
    def joined(cls, parts: Sequence["Ranked"], order: Sequence[int] | None = None) -> "Ranked":
        """The queries of several parts in one, in the given order of their rows."""
        hits = [found for part in parts for found in part.hits]
        order = range(len(hits)) if order is None else order
        values = {
            name: torch.cat([part.values[name] for part in parts])[list(order)]
            for name in parts[0].values
        }
        return cls(values, [hits[i] for i in order])

    def finding_nothing(self, queries: Collection[int]) -> "Ranked":
        """The same, but for some queries nothing was found: they cannot be read."""
        found = torch.tensor([query not in queries for query in range(len(self.hits))])
        values = {name: of.where(found.to(of.device), 0.0) for name, of in self.values.items()}
        hits = [[] if query in queries else hits for query, hits in enumerate(self.hits)]
        return Ranked(values, hits)


def rank(
    scores: Float[Tensor, "Q C"],
    relevant: Sequence[Sequence[int]],
    gains: Sequence[Sequence[float]] | None = None,
    lists: Sequence[Sequence[int]] | None = None,
    itself: Sequence[int] | None = None,
    ks: Sequence[int] = RECALL_AT,
    num_hits: int = NUM_HITS,
    unread: Sequence[int] = (),
) -> Ranked:
    """Rank all candidates for each query.

    Args:
        scores: higher is better; finite.
        relevant: for each query, the indices of its right candidates, at least one; negative for a
            right candidate that is not in the pool.
        gains: relevance of each of them, above 0; None: all 1.
        lists: for each query, the indices of the candidates to search; None: all.
        itself: for each query, the index of a candidate to leave out; -1: none.
        ks: the cut-offs of recall.
        num_hits: hits per query.
        unread: candidates that cannot be read: no query finds them.

    Raises:
        UserError: scores that are not finite, or lists that do not fit them.

    >>> rank(torch.tensor([[0.5, 0.75, 0.75]]), [[1]], num_hits=2).hits
    [[(2, 0.75), (1, 0.75)]]
    """
    _check(scores, relevant, gains, lists)
    device = scores.device
    right, padded_gains = (of.to(device) for of in padded(relevant, gains))
    missing = torch.tensor(unread, dtype=torch.long, device=device)
    is_there = (padded_gains > 0) & (right >= 0) & ~torch.isin(right, missing)
    of_right = scores.gather(1, right.clamp(min=0)).masked_fill(~is_there, -torch.inf)
    left_out = None if itself is None else torch.tensor(itself, device=device)
    ranker = Ranker(right, of_right, padded_gains, left_out, num_hits)
    searched = torch.full(scores.shape, lists is None, device=device)
    for query, indices in enumerate(lists or ()):
        searched[query, torch.tensor(indices, dtype=torch.long, device=device)] = True
    searched[:, missing] = False
    ranker.add(scores, torch.arange(scores.shape[1], device=device), searched)
    return ranker.ranked(ks)


def ranking_metrics(
    scores: Float[Tensor, "Q C"],
    relevant: Sequence[Sequence[int]],
    ks: Sequence[int] = RECALL_AT,
    gains: Sequence[Sequence[float]] | None = None,
    lists: Sequence[Sequence[int]] | None = None,
    itself: Sequence[int] | None = None,
) -> dict[str, Float[Tensor, " Q"]]:
    """The metrics of `rank`, without hits.

    >>> ranking_metrics(torch.tensor([[0.9, 0.7, 0.1]]), [[1]], ks=[1, 2])["recall@2"]
    tensor([1.])
    """
    return rank(scores, relevant, gains, lists, itself, ks, num_hits=0).values


def metrics_of_ranks(
    ranks: Float[Tensor, "Q P"], gains: Float[Tensor, "Q P"], ks: Sequence[int] = RECALL_AT
) -> dict[str, Float[Tensor, " Q"]]:
    """The metrics of each query, from the ranks of its right candidates.

    Args:
        ranks: from 1, ascending; infinity: not found.
        gains: of the same candidates; 0 is padding.
        ks: the cut-offs of recall.

    Returns:
        For each query, in [0, 1]: `recall@k` (the share of its right candidates among the first k),
        `precision@1` (1 where the first one is right), `mrr` (1 / rank of the first right one) and
        `ndcg@5`, `ndcg@10` (gains as they are, not 2^gain - 1, over those of the best order).
    """
    num_right = (gains > 0).sum(dim=1)
    values = {f"recall@{k}": (ranks <= k).sum(dim=1) / num_right for k in ks}
    values["precision@1"] = (ranks[:, 0] == 1).float()
    values["mrr"] = 1 / ranks[:, 0]
    discounted = gains / torch.log2(1 + ranks)
    best = gains.sort(dim=1, descending=True).values
    places = torch.arange(1, 1 + ranks.shape[1], device=ranks.device)
    best = best / torch.log2(1 + places)
    for k in NDCG_AT:
        ideal = best[:, :k].sum(dim=1)
        values[f"ndcg@{k}"] = torch.where(ranks <= k, discounted, 0).sum(dim=1) / ideal
    return values


class Ranker:
    """Ranks right candidates among all candidates, which are added in parts.

    Args:
        right: ids of each query's right candidates.
        scores: of the right candidates; -infinity for padding and for candidates without a score,
            which are not ranked.
        gains: relevance of the right candidates; 0 is padding.
        itself: for each query, the id of a candidate to leave out; -1: none.
        num_hits: hits per query.
    """

    def __init__(
        self,
        right: Int[Tensor, "Q P"],
        scores: Float[Tensor, "Q P"],
        gains: Float[Tensor, "Q P"],
        itself: Int[Tensor, " Q"] | None = None,
        num_hits: int = NUM_HITS,
    ):
        # Best first; of equal scores the least relevant first, and padding last.
        by_gain = gains.masked_fill(gains == 0, torch.inf).argsort(dim=1)
        self._scores, order = scores.gather(1, by_gain).sort(dim=1, descending=True, stable=True)
        order = by_gain.gather(1, order)
        self.gains, self._right = gains.gather(1, order), right.gather(1, order)
        self._thresholds = self._scores - ROUNDING * self._scores.abs().clamp(min=1)
        self._thresholds[self._scores == -torch.inf] = torch.inf
        self._num_before = torch.zeros_like(self._right)
        self._itself = itself
        self._num_hits = num_hits
        self._best_wrong = scores.new_full((len(scores), num_hits), -torch.inf)
        self._best_ids = right.new_full((len(scores), num_hits), -1)

    def add(
        self,
        scores: Float[Tensor, "Q n"],
        ids: Int[Tensor, " n"],
        searched: Bool[Tensor, "Q n"] | None = None,
    ) -> None:
        """Count the wrong candidates that rank before each right one.

        Args:
            scores: of each query with these candidates.
            ids: of the candidates, ascending; each candidate is added once.
            searched: the candidates to search for each query; None: all.
        """
        at = torch.searchsorted(ids, self._right).clamp(max=len(ids) - 1)
        is_here = (ids[at] == self._right) & (self._scores > -torch.inf)
        # Padding also points at a column, and must not undo that it is right.
        skipped = torch.zeros(scores.shape, dtype=torch.int8, device=scores.device)
        skipped = skipped.scatter_reduce(1, at, is_here.to(torch.int8), "amax").bool()
        if searched is not None:
            skipped |= ~searched
        if self._itself is not None:
            skipped |= ids == self._itself[:, None]
        wrong, order = scores.masked_fill(skipped, -torch.inf).sort(dim=1, descending=True)
        self._num_before += torch.searchsorted(-wrong, -self._thresholds, right=True)
        if self._num_hits:
            wrong = torch.cat([self._best_wrong, wrong[:, : self._num_hits]], dim=1)
            found = torch.cat([self._best_ids, ids[order[:, : self._num_hits]]], dim=1)
            wrong, order = wrong.sort(dim=1, descending=True, stable=True)
            self._best_wrong = wrong[:, : self._num_hits]
            self._best_ids = found.gather(1, order[:, : self._num_hits])

    def ranks(self) -> Float[Tensor, "Q P"]:
        """Ranks from 1, best first; infinity for padding and candidates without a score."""
        places = torch.arange(1, 1 + self._right.shape[1], device=self._right.device)
        ranks = (self._num_before + places).float()
        return ranks.masked_fill(self._scores == -torch.inf, torch.inf)

    def ranked(self, ks: Sequence[int] = RECALL_AT) -> Ranked:
        """The metrics and hits of each query."""
        return Ranked(metrics_of_ranks(self.ranks(), self.gains, ks), self._hits())

    def _hits(self) -> Hits:
        """Right candidates at their ranks, with the best wrong ones between them."""
        # A right candidate with b wrong ones before it is between wrong ones b - 1 and b.
        right = (self._num_before - 0.5).masked_fill(self._scores == -torch.inf, torch.inf)
        wrong = torch.arange(self._num_hits, device=right.device).expand(len(right), -1)
        wrong = wrong.to(right.dtype).masked_fill(self._best_wrong == -torch.inf, torch.inf)
        places, order = torch.cat([right, wrong], dim=1).sort(dim=1, stable=True)
        num_found = (places[:, : self._num_hits] < torch.inf).sum(dim=1)
        order = order[:, : self._num_hits]
        ids = torch.cat([self._right, self._best_ids], dim=1).gather(1, order)
        scores = torch.cat([self._scores, self._best_wrong], dim=1).gather(1, order)
        return [
            list(zip(i[:n], s[:n], strict=True))
            for i, s, n in zip(ids.tolist(), scores.tolist(), num_found.tolist(), strict=True)
        ]


def padded(
    relevant: Sequence[Sequence[int]], gains: Sequence[Sequence[float]] | None = None
) -> tuple[Int[Tensor, "Q P"], Float[Tensor, "Q P"]]:
    """Indices and gains of right candidates as tensors; shorter rows repeat their first with 0.

    >>> padded([[3], [1, 2]])
    (tensor([[3, 3], [1, 2]]), tensor([[1., 0.], [1., 1.]]))
    """
    width = max(map(len, relevant))
    gains = gains or [[1.0] * len(indices) for indices in relevant]
    index = [[*indices, *[indices[0]] * (width - len(indices))] for indices in relevant]
    value = [[*values, *[0.0] * (width - len(values))] for values in gains]
    return torch.tensor(index), torch.tensor(value)


def _check(
    scores: Tensor,
    relevant: Sequence[Sequence[int]],
    gains: Sequence[Sequence[float]] | None,
    lists: Sequence[Sequence[int]] | None,
) -> None:
    if len(scores) != len(relevant) or not len(scores):
        raise UserError(f"{len(scores)} rows of scores came with {len(relevant)} lists of relevant")
    for query, indices in enumerate(relevant):
        if not indices or len(set(indices)) != len(indices):
            raise UserError(f"query {query} needs relevant candidates, each once; got {indices}")
        if not max(indices) < scores.shape[1]:
            raise UserError(
                f"query {query}: relevant candidates lie in 0 to {scores.shape[1] - 1}, "
                f"got {indices}"
            )
        if lists is not None and not {i for i in indices if i >= 0} <= set(lists[query]):
            raise UserError(f"query {query}: its list does not hold all its relevant {indices}")
        if gains is not None and (len(gains[query]) != len(indices) or min(gains[query]) <= 0):
            raise UserError(
                f"query {query}: each of its {len(indices)} relevant candidates needs a gain above "
                f"0, got {gains[query]}"
            )
    if not scores.isfinite().all():
        raise UserError("scores contain NaN or infinity and cannot be ranked")
