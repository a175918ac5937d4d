"""How well queries rank their right candidates: where scores become ranks, and ranks numbers.

Ties count against the model: a wrong candidate with the score of a right one ranks before it, so a
model that gives every candidate the same vector scores 0, not 1. Scores that differ by no more than
rounding are a tie too: the same picture may stand in a pool twice, and its two scores then differ
in the last digit, by where in a batch each was computed. Metrics must not depend on batch sizes.

Q: queries    C: candidates    n: some candidates    P: right candidates of a query, padded
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from metaembed_pl.errors import UserError

ROUNDING = 2.0**-20
"""Eight units in the last place of float32: what two sums of the same products may differ by."""
RECALL_AT = (1, 5, 10)
NDCG_AT = (5, 10)
METRICS = (
    *(f"recall@{k}" for k in RECALL_AT),
    "precision@1",
    "mrr",
    *(f"ndcg@{k}" for k in NDCG_AT),
)


def ranking_metrics(
    scores: Float[Tensor, "Q C"],
    relevant: Sequence[Sequence[int]],
    ks: Sequence[int] = RECALL_AT,
    gains: Sequence[Sequence[float]] | None = None,
    lists: Sequence[Sequence[int]] | None = None,
    itself: Sequence[int] | None = None,
) -> dict[str, Float[Tensor, " Q"]]:
    """How well each query ranks its right candidates.

    Args:
        scores: higher is better; finite.
        relevant: for each query the indices of its right candidates, at least one; below 0 for one
            that is not among the candidates.
        ks: the cut-offs of recall.
        gains: how right each of them is, above 0; None: all 1.
        lists: for each query the indices of the candidates it searches; None: all.
        itself: for each query the index of one that it does not search; -1: none.

    Returns:
        For each query what `metrics_of_ranks` tells.

    Raises:
        UserError: scores that are not finite, or lists that do not fit them.

    >>> ranking_metrics(torch.tensor([[0.9, 0.7, 0.1]]), [[1]], ks=[1, 2])["recall@2"]
    tensor([1.])
    """
    _check(scores, relevant, gains, lists)
    index, padded_gains = padded(relevant, gains)
    index, padded_gains = index.to(scores.device), padded_gains.to(scores.device)
    is_there = (padded_gains > 0) & (index >= 0)
    index = index.clamp(min=0)
    right = scores.gather(1, index).masked_fill(~is_there, -torch.inf)
    counter = RankCounter(right, padded_gains)
    is_wrong = torch.ones(scores.shape, dtype=torch.bool, device=scores.device)
    if lists is not None:
        is_wrong = torch.zeros_like(is_wrong)
        for query, indices in enumerate(lists):
            is_wrong[query, torch.tensor(indices, device=scores.device)] = True
    if itself is not None:
        for query, left_out in enumerate(itself):
            if left_out >= 0:
                is_wrong[query, left_out] = False
    is_right = torch.zeros_like(is_wrong, dtype=torch.int8)
    is_wrong &= ~is_right.scatter_reduce(1, index, is_there.to(torch.int8), "amax").bool()
    counter.add(scores, is_wrong)
    return metrics_of_ranks(counter.ranks(), counter.gains, ks)


def metrics_of_ranks(
    ranks: Float[Tensor, "Q P"], gains: Float[Tensor, "Q P"], ks: Sequence[int] = RECALL_AT
) -> dict[str, Float[Tensor, " Q"]]:
    """What the ranks of a query's right candidates are worth.

    Args:
        ranks: from 1, ascending; infinity for one that was not found.
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


class RankCounter:
    """Ranks of right candidates among wrong ones that come some at a time.

    Args:
        right: scores of each query's right candidates; -infinity for one that has none, which ranks
            nowhere.
        gains: how right each is; 0 is padding.
    """

    def __init__(self, right: Float[Tensor, "Q P"], gains: Float[Tensor, "Q P"]):
        # Best first; of equal scores the least right first, and padding behind all.
        order = gains.masked_fill(gains == 0, torch.inf).argsort(dim=1)
        right, gains = right.gather(1, order), gains.gather(1, order)
        self.right, order = right.sort(dim=1, descending=True, stable=True)
        self.gains = gains.gather(1, order)
        self._thresholds = self.right - ROUNDING * self.right.abs().clamp(min=1)
        self._thresholds[self.right == -torch.inf] = torch.inf
        self._before = torch.zeros(right.shape, dtype=torch.long, device=right.device)

    def add(self, scores: Float[Tensor, "Q n"], is_wrong: Bool[Tensor, "Q n"]) -> None:
        """Count those of some candidates that are wrong and rank before a right one.

        Args:
            scores: of each query with some candidates, each of which comes once.
            is_wrong: whether a query searches the candidate and it is not right.
        """
        wrong = scores.masked_fill(~is_wrong, -torch.inf).sort(dim=1).values
        self._before += scores.shape[1] - torch.searchsorted(wrong, self._thresholds)

    def ranks(self) -> Float[Tensor, "Q P"]:
        """Ranks from 1, best first; infinity for padding and for what has no score."""
        places = torch.arange(1, 1 + self.right.shape[1], device=self.right.device)
        return torch.where(self.right > -torch.inf, (self._before + places).float(), torch.inf)


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
        raise UserError("scores hold NaN or infinity: they cannot be ranked")
