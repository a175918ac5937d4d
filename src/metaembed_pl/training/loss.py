"""MMR: InfoNCE at every nested group, summed. The loss that makes every prefix a good embedding.

Each query must find its own positive among the candidates of all ranks and its own hard negatives,
at every group (r_q, r_c) separately. Queries may share a candidate, whose vectors then occur once.

Q: queries of this rank    C: candidates of this rank    P: candidates of all ranks    G: groups
M: hard negatives of this rank    N: maximum per query    Rq, Rc: vectors of a query, of a candidate
D: width    K: ids that are right for a query    A, An: ids that a candidate, a negative answers
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from metaembed_pl.budget import Budget, parse_groups
from metaembed_pl.data.collate import NOTHING_ASKED
from metaembed_pl.errors import UserError
from metaembed_pl.late_interaction import nested_scores, paired_scores
from metaembed_pl.ranks import (
    gather,
    gather_ragged,
    gather_with_gradient,
    maximum_over_ranks,
    rank_and_world,
)

PADDING = -1
"""Pads `answers`; an id is never negative."""
CPU_BLOCK_ELEMENTS = 2**20
GPU_BLOCK_ELEMENTS = 2**26
"""Scores of all groups held at a time: 4 and 256 MB, about three times as much in the backward."""


class MMRLossOutput(NamedTuple):
    """What a training step needs and what it logs.

    Args:
        loss: the weighted sum of `per_group` and of the terms beside it; what to minimise.
        per_group: InfoNCE of each group, unweighted and detached.
        num_in_batch: other queries' candidates that a query is compared with, before masking.
        num_hard: hard negatives per query of this rank, on average, before masking.
        num_masked: negatives of both kinds left out as false negatives, on average.
        recall: of each group, the share of this rank's queries whose positive scores highest.
        also: further metrics to log, by name.
    """

    loss: Float[Tensor, ""]
    per_group: Float[Tensor, " G"]
    num_in_batch: int
    num_hard: float
    num_masked: float
    recall: Float[Tensor, " G"]
    also: dict[str, Float[Tensor, ""]]


OfTerm = Callable[[Tensor, Tensor, slice], Tensor]


class Term(NamedTuple):
    """A term that is added to the InfoNCE of each group.

    Args:
        name: for logs.
        weight: that of InfoNCE is 1.
        of: from the logits (G, q, P + N) of some queries with all candidates and their hard
            negatives (-infinity where one is left out), the column of each positive, and the slice
            of queries, to the value (G, q) of each group and query.
    """

    name: str
    weight: float
    of: OfTerm


class MMRLoss(nn.Module):
    """The MMR loss over in-batch negatives of all ranks and own hard negatives.

    With the one group (1, 1) it is the InfoNCE of a single-vector model.

    Args:
        groups: nested budgets, smallest first.
        temperature: scores are divided by it; above 0. At the paper's 0.03 the logits of (16, 64)
            reach 533, hence the softmax in float32.
        weights: of the groups' losses; None weighs each 1, as the paper does.
        both_directions: average with the loss of each positive finding its query among all
            queries; other queries that share the positive are left out. The paper: False.
        mean_over_query: divide scores by r_q, so that logits of all groups are of one size. The
            paper: False.
        false_negative_margin: leave out candidates that score higher than the positive by more than
            this, as likely answers that nobody marked. In units of one vector's cosine: scores of
            the largest group over r_q; a smaller group's mistake is no evidence. At least 0; None,
            as the paper: leave out none. Qwen3-Embedding, arXiv 2506.05176, has 0.1.
        temperature_bounds: learn the temperature between these two, from `temperature` on. None, as
            the paper: it stays.
        learn_weights: learn the groups' weights from `weights` on, each by how well its group can
            be learned (Kendall et al., arXiv 1705.07115). The paper: False.

    Raises:
        UserError: a setting out of range.

    Source: MetaEmbed, arXiv 2509.18095, section 3.
    """

    def __init__(
        self,
        groups: Sequence[Budget | str | tuple[int, int]],
        temperature: float = 0.03,
        weights: Sequence[float] | None = None,
        both_directions: bool = False,
        mean_over_query: bool = False,
        false_negative_margin: float | None = None,
        temperature_bounds: Sequence[float] | None = None,
        learn_weights: bool = False,
    ):
        super().__init__()
        self.groups = parse_groups(groups)
        _check_temperature(temperature, temperature_bounds)
        self._start, self._bounds = temperature, temperature_bounds
        self.weights = _check_weights(weights, len(self.groups))
        if learn_weights and not all(self.weights):
            raise UserError(f"weights that are learned start above 0, got {self.weights}")
        # Of what is learned: where the temperature is between its bounds, and the logs of weights.
        place = torch.tensor(0.0 if self._bounds is None else _place(temperature, *self._bounds))
        self.place = nn.Parameter(place) if self._bounds else None
        logs = torch.tensor(self.weights).log()
        self.log_weights = nn.Parameter(logs) if learn_weights else None
        self.both_directions = both_directions
        self.mean_over_query = mean_over_query
        if false_negative_margin is not None and not 0 <= false_negative_margin < float("inf"):
            raise UserError(
                f"false_negative_margin must be at least 0, got {false_negative_margin}"
            )
        self.false_negative_margin = false_negative_margin

    @property
    def temperature(self) -> float | Float[Tensor, ""]:
        """What scores are divided by."""
        if self.place is None or self._bounds is None:
            return self._start
        low, high = self._bounds
        return low * (high / low) ** self.place.float().sigmoid()

    def forward(
        self,
        queries: Float[Tensor, "Q Rq D"],
        positives: Float[Tensor, "C Rc D"],
        negatives: Float[Tensor, "M Rc D"] | None = None,
        *,
        positive_of: Int[Tensor, " Q"] | None = None,
        negatives_of: Int[Tensor, "Q N"] | None = None,
        asks: Int[Tensor, "Q K"] | None = None,
        answers: Int[Tensor, "C A"] | None = None,
        negative_answers: Int[Tensor, "M An"] | None = None,
        terms: Sequence[Term] = (),
    ) -> MMRLossOutput:
        """The loss of this rank's queries; its mean over ranks is the loss of the global batch.

        Every query of the global batch counts alike, also where ranks bring different numbers.

        Args:
            queries: unit vectors.
            positives: unit vectors of the candidates that the queries match, each once. Every rank
                brings equally many.
            negatives: unit vectors of the hard negatives.
            positive_of: the row of `positives` that each query matches; None: its own row.
            negatives_of: the rows of `negatives` that each query is compared with, filled up with
                -1; no other query is.
            asks: ids (at least 0) of what each query asks for, padded with -2. A candidate that
                answers one of them is no negative and is left out.
            answers: ids of all things each positive answers, padded with -1.
            negative_answers: likewise of the hard negatives.
            terms: what to add to the loss of each group.

        Raises:
            UserError: shapes that do not fit together, or scores that are not finite.
        """
        if positive_of is None:
            positive_of = torch.arange(len(queries), device=queries.device)
        _check_batch(
            queries,
            positives,
            negatives,
            positive_of,
            negatives_of,
            asks,
            answers,
            negative_answers,
        )
        rank, world = rank_and_world()
        num_queries = gather(torch.tensor([len(queries)], device=queries.device)).tolist()
        own = positive_of + rank * len(positives)
        all_answers = None if answers is None else gather(_pad(answers))
        all_positives = gather_with_gradient(positives)
        others = None
        if self.both_directions:
            others = _Others(
                gather_ragged(queries, num_queries),
                gather_ragged(own, num_queries),
                None if asks is None else gather_ragged(_pad(asks, NOTHING_ASKED), num_queries),
                first_own=sum(num_queries[:rank]),
            )
        blocks = self._blocks(len(queries), len(all_positives), queries.is_cuda)

        def of_block(rows: slice) -> tuple[Float[Tensor, "_ G"], Int[Tensor, " 1+G"]]:
            scores = nested_scores(queries[rows], all_positives, self.groups)
            answered = _is_answered(_at(asks, rows), all_answers)
            hard = None
            if negatives is not None and negatives_of is not None:
                hard = self._hard(
                    queries[rows], negatives, negatives_of[rows], _at(asks, rows), negative_answers
                )
            losses, counts, logits = self._info_nce(scores, own[rows], answered, hard)
            beside = [term.of(logits, own[rows], rows).sum(dim=1) for term in terms]
            if others is not None:
                # Where these are all scores there are, the other direction has them, transposed.
                reusable = scores if world == 1 and len(blocks) == 1 else None
                of_positives = positives, positive_of[rows], answers
                losses = (losses + self._reverse(others, rows, *of_positives, reusable)) / 2
            return torch.stack([losses, *beside]), counts

        sums, counts = _summed(of_block, blocks)
        # The mean over ranks of what each returns is the mean over all queries.
        sums = sums * (world / sum(num_queries))
        num_hard = 0 if negatives_of is None else int((negatives_of >= 0).sum())
        return MMRLossOutput(
            loss=self._weighted(sums, terms),
            per_group=sums[0].detach(),
            num_in_batch=len(all_positives) - 1,
            num_hard=num_hard / len(queries),
            num_masked=float(counts[0] / len(queries)),
            recall=counts[1:] / len(queries),
            also={
                f"{term.name}/{group}": value.detach()
                for term, of_groups in zip(terms, sums[1:], strict=True)
                for group, value in zip(self.groups, of_groups, strict=True)
            }
            | self._learned(),
        )

    def _weighted(self, sums: Float[Tensor, "_ G"], terms: Sequence[Term]) -> Float[Tensor, ""]:
        """The weighted sum over terms, then over groups."""
        # Not as a dot product: autocast would round it to bf16.
        factors = sums.new_tensor([1.0, *(term.weight for term in terms)])[:, None]
        per_group = (sums * factors).sum(dim=0)
        if self.log_weights is None:
            return (per_group * sums.new_tensor(self.weights)).sum()
        logs = self.log_weights.to(sums.dtype)
        return (per_group * logs.exp() - logs).sum()

    def _learned(self) -> dict[str, Float[Tensor, ""]]:
        """The learned temperature and weights, for logs."""
        found = {}
        if isinstance(self.temperature, Tensor):
            found["temperature"] = self.temperature.detach()
        if self.log_weights is not None:
            weights = self.log_weights.detach().exp()
            found |= {f"weight/{g}": w for g, w in zip(self.groups, weights, strict=True)}
        return found

    def _hard(
        self,
        queries: Float[Tensor, "q Rq D"],
        negatives: Float[Tensor, "M Rc D"],
        negatives_of: Int[Tensor, "q N"],
        asks: Int[Tensor, "q K"] | None,
        negative_answers: Int[Tensor, "M An"] | None,
    ) -> tuple[Float[Tensor, "G q N"], Bool[Tensor, "q N"] | None, Bool[Tensor, "q N"]]:
        """Scores of some queries with their hard negatives, which are answers, and which exist."""
        # A query with fewer than N is scored with the first one, and the score left out.
        rows = negatives_of.clamp(min=0)
        own = negatives.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        hard = paired_scores(queries, own, self.groups)
        answered = None
        if asks is not None and negative_answers is not None:
            answered = (asks[:, None, :, None] == negative_answers[rows][:, :, None, :]).flatten(2)
            answered = answered.any(dim=2)
        return hard, answered, negatives_of >= 0

    def _reverse(
        self,
        others: "_Others",
        rows: slice,
        positives: Float[Tensor, "C Rc D"],
        positive_of: Int[Tensor, " q"],
        answers: Int[Tensor, "C A"] | None,
        scores: Float[Tensor, "G Q C"] | None,
    ) -> Float[Tensor, " G"]:
        """The loss of positives finding their own among all queries, summed over some of them."""
        if scores is None:
            found, column = positive_of.unique(return_inverse=True)
            scores = nested_scores(others.queries, positives[found], self.groups)
            answers = None if answers is None else answers[found]
        else:
            column = positive_of
        own = torch.arange(len(positive_of), device=positive_of.device)
        own = own + (others.first_own + rows.start)
        # Of the scores, a column for each query: the vectors are not repeated.
        of_positives = scores.mT[:, column]
        no_negative = others.positives == others.positives[own][:, None]
        answered = _is_answered(others.asks, answers)
        if answered is not None:
            no_negative = no_negative | answered.T[column]
        return self._info_nce(of_positives, own, no_negative)[0]

    def _blocks(self, num_rows: int, num_columns: int, on_gpu: bool) -> list[slice]:
        """Blocks of rows of the scores that fit the memory limit."""
        elements = GPU_BLOCK_ELEMENTS if on_gpu else CPU_BLOCK_ELEMENTS
        step = max(1, elements // (len(self.groups) * num_columns))
        return [slice(i, i + step) for i in range(0, num_rows, step)]

    def _info_nce(
        self,
        scores: Float[Tensor, "G q P"],
        own: Int[Tensor, " q"],
        answered: Bool[Tensor, "q P"] | None,
        hard: tuple[Tensor, Tensor | None, Tensor] | None = None,
    ) -> tuple[Float[Tensor, " G"], Int[Tensor, " 1+G"], Float[Tensor, "G q _"]]:
        """The loss of each group, summed over some rows; counts; and the logits.

        The counts: candidates left out, then of each group the rows whose positive ranks first.

        Args:
            scores: of the rows with all candidates.
            own: the column of each row's positive.
            answered: candidates that are no negatives.
            hard: see `_hard`.
        """
        own_scores = scores[-1].detach().gather(1, own[:, None])
        # The own positive answers what is asked, but is never left out.
        mask = self._mask(scores, own_scores, answered).scatter(1, own[:, None], False)
        logits, num_masked = self._logits(scores, mask), mask.sum()
        if hard is not None:
            hard_scores, hard_answered, exists = hard
            mask = self._mask(hard_scores, own_scores, hard_answered)
            num_masked = num_masked + (mask & exists).sum()
            logits = torch.cat([logits, self._logits(hard_scores, mask | ~exists)], dim=2)
        losses = F.cross_entropy(logits.flatten(0, 1), own.repeat(len(logits)), reduction="none")
        on_top = (logits.detach().argmax(dim=2) == own).sum(dim=1)
        counts = torch.cat([num_masked[None], on_top])
        return losses.view(len(logits), -1).sum(dim=1), counts, logits

    def _mask(
        self,
        scores: Float[Tensor, "G Q P"],
        own_scores: Float[Tensor, "Q 1"],
        answered: Bool[Tensor, "Q P"] | None,
    ) -> Bool[Tensor, "Q P"]:
        """Candidates that are no negatives: they answer the query, or likely do."""
        largest = scores[-1].detach()
        mask = torch.zeros_like(largest, dtype=torch.bool) if answered is None else answered
        if self.false_negative_margin is None:
            return mask
        return mask | (largest > own_scores + self.false_negative_margin * self.groups[-1].r_q)

    def _logits(
        self, scores: Float[Tensor, "G Q P"], mask: Bool[Tensor, "Q P"]
    ) -> Float[Tensor, "G Q P"]:
        """Scores over temperature, -inf where masked."""
        finite = scores.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            raise UserError(
                f"scores of group {self.groups[finite.index(False)]} are not finite: the "
                "embeddings hold NaN or infinity; lower the learning rate or the precision's risk "
                "(bf16 instead of fp16)"
            )
        if self.mean_over_query:
            scores = scores / scores.new_tensor([r_q for r_q, *_ in self.groups]).view(-1, 1, 1)
        return (scores / self.temperature).masked_fill(mask, -torch.inf)


class _Others(NamedTuple):
    """The queries of all ranks, for the other direction.

    Args:
        queries: their vectors.
        positives: the index of each one's positive among those of all ranks.
        asks: see `MMRLoss.forward`.
        first_own: the index of this rank's first query.
    """

    queries: Float[Tensor, "A Rq D"]
    positives: Int[Tensor, " A"]
    asks: Int[Tensor, "A K"] | None
    first_own: int


def _summed(
    of_block: Callable[[slice], tuple[Tensor, Tensor]], blocks: list[slice]
) -> tuple[Tensor, Tensor]:
    """Sums over all blocks; with several, scores are recomputed in the backward pass."""
    if len(blocks) == 1:
        return of_block(blocks[0])
    found = [
        checkpoint(of_block, rows, use_reentrant=False, preserve_rng_state=False) for rows in blocks
    ]
    losses, counts = zip(*found, strict=True)
    return torch.stack(losses).sum(dim=0), torch.stack(counts).sum(dim=0)


def _at(values: Tensor | None, rows: slice) -> Tensor | None:
    return None if values is None else values[rows]


def _is_answered(
    asks: Int[Tensor, "Q K"] | None, answers: Int[Tensor, "P A"] | None
) -> Bool[Tensor, "Q P"] | None:
    """Which candidates answer which query; None if that is not given."""
    if asks is None or answers is None:
        return None
    return (asks[:, None, :, None] == answers[None, :, None, :]).flatten(2).any(dim=2)


def _pad(ids: Int[Tensor, "B A"], padding: int = PADDING) -> Int[Tensor, "B W"]:
    """Pads to the width of the widest rank."""
    width = maximum_over_ranks(ids.shape[1], ids.device)
    return F.pad(ids, (0, width - ids.shape[1]), value=padding)


def _check_temperature(temperature: float, bounds: Sequence[float] | None) -> None:
    if not 0 < temperature < float("inf"):
        raise UserError(f"the temperature must be a number above 0, got {temperature}")
    if bounds is None:
        return
    if len(bounds) != 2 or not 0 < bounds[0] < temperature < bounds[1] < float("inf"):
        raise UserError(
            "temperature_bounds are two numbers with the temperature between them: expected "
            f"0 < low < {temperature} < high, got {list(bounds)}"
        )


def _place(temperature: float, low: float, high: float) -> float:
    """The parameter whose sigmoid is the temperature's (logarithmic) place between the bounds."""
    share = math.log(temperature / low) / math.log(high / low)
    return math.log(share / (1 - share))


def _check_weights(weights: Sequence[float] | None, num_groups: int) -> list[float]:
    weights = [1.0] * num_groups if weights is None else [float(weight) for weight in weights]
    in_range = all(0 <= weight < float("inf") for weight in weights)
    if len(weights) != num_groups or not in_range or not any(weights):
        raise UserError(
            f"expected {num_groups} loss weights, one a group, none below 0 and not all 0; "
            f"got {weights}"
        )
    return weights


def _check_batch(
    queries: Tensor,
    positives: Tensor,
    negatives: Tensor | None,
    positive_of: Tensor,
    negatives_of: Tensor | None,
    asks: Tensor | None,
    answers: Tensor | None,
    negative_answers: Tensor | None,
) -> None:
    if len(queries) == 0:
        raise UserError("the batch is empty: the loss needs at least one pair")
    num_negatives = 0 if negatives is None else len(negatives)
    for name, rows, count, of in (
        ("positive_of", positive_of, len(queries), "queries"),
        ("negatives_of", negatives_of, len(queries), "queries"),
        ("asks", asks, len(queries), "queries"),
        ("answers", answers, len(positives), "positives"),
        ("negative_answers", negative_answers, num_negatives, "hard negatives"),
    ):
        if rows is not None and len(rows) != count:
            raise UserError(f"{count} {of} came with {len(rows)} rows of {name}")
    _check_rows("positive_of", positive_of, 0, len(positives))
    if (negatives is None) != (negatives_of is None):
        raise UserError("negatives and negatives_of come together: one says whose the other are")
    if negatives_of is not None:
        _check_rows("negatives_of", negatives_of, -1, num_negatives)
    if (asks is None) != (answers is None):
        raise UserError("asks and answers come together: one says what the other is masked by")
    if negative_answers is not None and (negatives is None or asks is None):
        raise UserError("negative_answers needs the hard negatives and asks")


def _check_rows(name: str, rows: Tensor, least: int, end: int) -> None:
    """Refuses row numbers out of range; on a GPU they are trusted, to avoid a synchronisation."""
    if rows.is_cuda or rows.numel() == 0:
        return
    if rows.min() < least or rows.max() >= end:
        raise UserError(
            f"{name} must hold rows from {least} to {end - 1}, got {rows.min()} to {rows.max()}"
        )
