"""Retrieval metrics at every group and width, gathered over all ranks; ranking.py defines them.

Q: queries    C: candidates    G: groups    B: rows of one update    R: vectors of a row    D: width
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from metaembed_pl.budget import Budget, budgets_of, parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.late_interaction import (
    SCORES_AT_A_TIME,
    cosines,
    maxsim,
    narrowed,
    nested_scores,
)
from metaembed_pl.ranking import METRICS, NUM_HITS, RECALL_AT, Ranked, rank


class RetrievalMetrics(Metric):
    """Ranks all candidates for all queries at every budget, across all ranks.

    Feed it each query and candidate by index, in any order, on any rank; a row that comes twice (a
    sampler that pads its last batch) counts once. `update` keeps the vectors, `compute` scores and
    leaves the values and hits of each query in `ranked`, by budget, and in `cosines`, by side, how
    similar the vectors of an item are. Items that cannot be read are in `unread`, by side: no query
    finds them, and they find nothing.

    Args:
        groups: nested budgets, smallest first.
        relevant: for each query the indices of its right candidates.
        num_candidates: how many there are.
        ks: the cut-offs of recall.
        gains: how right each right candidate is; None: all 1.
        lists: for each query the candidates it searches; None: all.
        itself: for each query a candidate that it does not search; -1: none. None: of no query.
        widths: at which the largest group is ranked as well, with the first components alone.
    """

    full_state_update = False
    higher_is_better = True

    def __init__(
        self,
        groups: Sequence[Budget | str | tuple[int, int]],
        relevant: Sequence[Sequence[int]],
        num_candidates: int,
        ks: Sequence[int] = RECALL_AT,
        gains: Sequence[Sequence[float]] | None = None,
        lists: Sequence[Sequence[int]] | None = None,
        itself: Sequence[int] | None = None,
        widths: Sequence[int] = (),
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.groups = parse_groups(groups)
        self.budgets = budgets_of(self.groups, widths)
        self.relevant, self.gains, self.lists = relevant, gains, lists
        self.itself = itself
        self.num_candidates = num_candidates
        self.ks = tuple(ks)
        self.ranked: dict[Budget, Ranked] = {}
        self.cosines: dict[str, list[list[float]]] = {}
        self.unread: dict[str, list[int]] = {}
        for side in ("query", "candidate"):
            self.add_state(f"{side}_index", [], dist_reduce_fx="cat")
            self.add_state(f"{side}_vectors", [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        # A rank that saw no row still takes part in the gather, with the dtype of the others. Rows
        # are kept flat, because it cannot know their width.
        for side in ("query", "candidate"):
            getattr(self, f"{side}_index").append(
                torch.empty(0, dtype=torch.int64, device=self.device)
            )
            getattr(self, f"{side}_vectors").append(torch.empty(0, device=self.device))

    def update(
        self,
        side: Literal["query", "candidate"],
        index: Int[Tensor, " B"],
        embeddings: Float[Tensor, "B R D"],
        unread: Collection[int] = (),
    ) -> None:
        """Keep the vectors of some queries or candidates.

        Args:
            side: which of the two.
            index: place of each row among all queries, or all candidates.
            embeddings: unit vectors, at least as many a row as the largest group takes.
            unread: rows whose item cannot be read.

        Raises:
            UserError: an index out of range, too few vectors, or vectors that are not finite.
        """
        total, vectors = self._sizes(side)
        if len(index) != len(embeddings):
            raise UserError(f"{len(index)} {side} indices came with {len(embeddings)} embeddings")
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < total:
            raise UserError(
                f"{side} indices must lie in 0 to {total - 1}, got {int(index.min())} to "
                f"{int(index.max())}"
            )
        if embeddings.shape[1] < vectors:
            raise UserError(
                f"group {self.groups[-1]} needs {vectors} vectors of a {side}, "
                f"got {embeddings.shape[1]}"
            )
        if not embeddings.isfinite().all():
            raise UserError(f"{side} embeddings contain NaN or infinity and cannot be ranked")
        kept = embeddings[:, :vectors].detach().float()
        kept = kept.index_fill(0, torch.tensor([*unread], dtype=torch.long).to(kept.device), 0.0)
        getattr(self, f"{side}_index").append(index.long())
        getattr(self, f"{side}_vectors").append(kept.flatten())

    def compute(self) -> dict[str, Float[Tensor, ""]]:
        """Means over queries, named `recall@1/4x8`, `mrr/4x8`, `ndcg@5/4x8` and so on.

        Raises:
            UserError: a query or candidate was never given, or scores are not finite.
        """
        queries, candidates = self._own_rows("query"), self._own_rows("candidate")
        read = {"query": queries.flatten(1).any(1), "candidate": candidates.flatten(1).any(1)}
        self.unread = {side: (~of).nonzero()[:, 0].tolist() for side, of in read.items()}
        step = max(1, SCORES_AT_A_TIME // (len(self.groups) * self.num_candidates))
        parts: dict[Budget, list[Ranked]] = {budget: [] for budget in self.budgets}
        for start in range(0, len(queries), step):
            chunk = slice(start, start + step)
            gains, lists = self.gains and self.gains[chunk], self.lists and self.lists[chunk]
            itself = self.itself and self.itself[chunk]
            for budget, scores in self._scores(queries[chunk], candidates):
                num_hits = NUM_HITS if budget in (self.budgets[0], self.budgets[-1]) else 0
                settings = gains, lists, itself, self.ks, num_hits, self.unread["candidate"]
                parts[budget].append(rank(scores, self.relevant[chunk], *settings))
        self.cosines = {
            "query": cosines(queries[read["query"]]).tolist(),
            "candidate": cosines(candidates[read["candidate"]]).tolist(),
        }
        self.ranked = {
            budget: Ranked.joined(found).finding_nothing(self.unread["query"])
            for budget, found in parts.items()
        }
        return {
            f"{name}/{budget}": values.mean()
            for budget, found in self.ranked.items()
            for name, values in found.values.items()
        }

    def _scores(
        self, queries: Float[Tensor, "q Rq D"], candidates: Float[Tensor, "C Rc D"]
    ) -> Iterator[tuple[Budget, Float[Tensor, "q C"]]]:
        """Scores of some queries at every group, then at every width."""
        yield from zip(self.groups, nested_scores(queries, candidates, self.groups), strict=True)
        for budget in self.budgets:
            if budget.width is not None:
                yield budget, maxsim(*(narrowed(of, budget.width) for of in (queries, candidates)))

    def _sizes(self, side: str) -> tuple[int, int]:
        """The number of rows of the side, and of vectors per row."""
        if side == "query":
            return len(self.relevant), self.groups[-1].r_q
        if side == "candidate":
            return self.num_candidates, self.groups[-1].r_c
        raise UserError(f'side is "query" or "candidate", got {side!r}')

    def _own_rows(self, side: str) -> Float[Tensor, "rows R D"]:
        """The vectors in the order of their index, each once; those of all ranks in `compute`."""
        total, vectors = self._sizes(side)
        index = dim_zero_cat(getattr(self, f"{side}_index"))
        rows = dim_zero_cat(getattr(self, f"{side}_vectors"))
        place = torch.full((total,), -1, device=index.device)
        place[index] = torch.arange(len(index), device=index.device)
        num_missing = int((place < 0).sum())
        if num_missing:
            raise UserError(
                f"{num_missing} of {total} {side} rows were never given, first of all "
                f"{int((place < 0).nonzero()[0])}: update the metric with every row; in a "
                "recipe use max_queries, not trainer.limit_val_batches or limit_test_batches"
            )
        return rows.view(len(index), vectors, -1)[place]


def headline(
    values: Mapping[str, Mapping[str, Tensor]], choice: str | None, budgets: Sequence[Budget]
) -> Float[Tensor, ""]:
    """The metric that selects the best checkpoint.

    Args:
        values: metrics by dataset.
        choice: a metric; at a budget if it ends in one, else at the largest; of one dataset if it
            begins with its name, else the mean over all. None: recall@1.
        budgets: see `budgets_of`.

    >>> values = {"a": {"mrr/1x1": torch.tensor(0.5)}, "b": {"mrr/1x1": torch.tensor(1.0)}}
    >>> groups = parse_groups(["1x1"])
    >>> headline(values, "mrr", groups), headline(values, "a/mrr", groups)
    (tensor(0.7500), tensor(0.5000))
    """
    datasets, name = check_headline(choice or "recall@1", list(values), budgets)
    return torch.stack([values[dataset][name] for dataset in datasets]).mean()


def check_headline(
    choice: str, datasets: Sequence[str], budgets: Sequence[Budget | str]
) -> tuple[list[str], str]:
    """The datasets and the metric of a headline; a UserError if there is no such metric."""
    chosen = [name for name in datasets if choice.startswith(f"{name}/")]
    metric = choice.removeprefix(f"{max(chosen, key=len)}/") if chosen else choice
    at = [f"{name}/{budget}" for budget in reversed(budgets) for name in METRICS]
    for name in (metric, f"{metric}/{budgets[-1]}"):
        if name in at:
            return [max(chosen, key=len)] if chosen else list(datasets), name
    raise UserError(
        f"model.headline: there is no metric {choice!r}; expected one of {', '.join(METRICS)}, "
        f"with /{' or /'.join(map(str, budgets))} behind it or one of {', '.join(datasets)} and / "
        "before it"
    )
