"""The training objective: the MMR loss, and the options beyond the paper.

Q: queries of this rank    C: candidates of this rank    P: candidates of all ranks    G: groups
M: hard negatives of this rank    N: maximum per query    Rq, Rc: vectors of a query, of a candidate
D: width
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from metaembed_pl.budget import Budget
from metaembed_pl.errors import UserError
from metaembed_pl.late_interaction import mean_cosine, narrowed, nested_scores, paired_scores
from metaembed_pl.ranks import gather, rank_and_world
from metaembed_pl.training.loss import MMRLoss, MMRLossOutput, OfTerm, Term
from metaembed_pl.training.loss_terms import (
    QuantizationConfig,
    SelfDistillationConfig,
    SpreadConfig,
    TeacherConfig,
    divergence,
    likeness,
    margin_error,
    rounded,
)


@dataclass
class LossConfig:
    """The loss; the defaults are the paper's.

    Args:
        temperature: scores are divided by it; above 0.
        weights: weights of the groups' losses; None: 1 each.
        both_directions: average with the loss in the other direction, of finding the query.
        mean_over_query: divide scores by r_q, so that the logits of all groups have the same scale.
        false_negative_margin: exclude negatives that score higher than the positive by more than
            this, in cosine units; None: exclude none.
        temperature_bounds: learn the temperature between these two bounds; None: it is fixed.
        learn_weights: learn the groups' weights, starting from `weights`.
        query_spread: penalise vectors of a query that are alike, so that they specialise.
        candidate_spread: the same for the vectors of a candidate.
        self_distillation: distil the largest group into the smaller ones.
        teacher: distil a reranker's scores or another model into all groups.
        widths: also train the first components of each vector, such as [64, 32]; a store can then
            keep only these. The loss is the mean over all widths.
        quantization: quantize candidates in a share of the steps, as a store in int8 does.
    """

    temperature: float = 0.03
    weights: list[float] | None = None
    both_directions: bool = False
    mean_over_query: bool = False
    false_negative_margin: float | None = None
    temperature_bounds: tuple[float, float] | None = None
    learn_weights: bool = False
    query_spread: SpreadConfig | None = None
    candidate_spread: SpreadConfig | None = None
    self_distillation: SelfDistillationConfig | None = None
    teacher: TeacherConfig | None = None
    widths: list[int] | None = None
    quantization: QuantizationConfig | None = None


class Taught(NamedTuple):
    """A teacher model's vectors of this rank's batch; `group` is the budget it scores at."""

    group: Budget
    queries: Float[Tensor, "Q Tq Dt"]
    positives: Float[Tensor, "C Tc Dt"]
    negatives: Float[Tensor, "M Tc Dt"] | None


class Objective(nn.Module):
    """The MMR loss at every width, plus the optional terms of the recipe.

    Args:
        groups: nested budgets, smallest first.
        config: of the recipe.
    """

    def __init__(
        self, groups: Sequence[Budget | str | tuple[int, int]], config: LossConfig | None = None
    ):
        super().__init__()
        self.config = config = config or LossConfig()
        self.mmr = MMRLoss(
            groups,
            config.temperature,
            config.weights,
            config.both_directions,
            config.mean_over_query,
            config.false_negative_margin,
            config.temperature_bounds,
            config.learn_weights,
        )
        self.groups = self.mmr.groups
        self.both_directions = config.both_directions
        self.widths = check_widths(config.widths)
        largest = self.groups[-1]
        for side, spread, count in (
            ("query", config.query_spread, largest.r_q),
            ("candidate", config.candidate_spread, largest.r_c),
        ):
            if spread and count < 2:
                raise UserError(
                    f"{side}_spread keeps the vectors of a {side} apart: it needs at least 2 of "
                    f"them, and the largest group is {largest}"
                )
        if config.self_distillation and len(self.groups) < 2:
            raise UserError(
                "self_distillation lets the largest group teach smaller ones: it needs at least 2 "
                f"groups, and there is {largest} alone"
            )

    def forward(
        self,
        queries: Float[Tensor, "Q Rq D"],
        positives: Float[Tensor, "C Rc D"],
        negatives: Float[Tensor, "M Rc D"] | None = None,
        *,
        step: int = 0,
        scores: Float[Tensor, "Q _"] | None = None,
        taught: Taught | None = None,
        **batch: Any,
    ) -> MMRLossOutput:
        """The loss of this rank's queries; its mean over ranks is that of the global batch.

        Args:
            queries: unit vectors.
            positives: unit vectors.
            negatives: unit vectors.
            step: of the plan: some terms start later, some are in a share of the steps.
            scores: a teacher's, of each query with its positive and its hard negatives, in the
                order of `negatives_of`; NaN: unknown.
            taught: the teacher model's vectors of the batch.
            batch: further arguments of `MMRLoss`.
        """
        r_q, r_c, _ = self.groups[-1]
        queries, positives = queries[:, :r_q], positives[:, :r_c]
        terms = list(self._terms(step, scores, taught, batch.get("negatives_of")))
        found = [
            self.mmr(
                narrowed(queries, width),
                self._stored(positives, width, step),
                None if negatives is None else self._stored(negatives[:, :r_c], width, step),
                terms=terms,
                **batch,
            )
            for width in (None, *self.widths)
        ]
        output = found[0]
        also = output.also | {
            "cosine/query": mean_cosine(queries.detach()),
            "cosine/candidate": mean_cosine(positives.detach()),
        }
        also |= {
            f"recall@1/{self.groups[-1]}x{width}": one.recall[-1]
            for width, one in zip(self.widths, found[1:], strict=True)
        }
        loss = torch.stack([one.loss for one in found]).mean()
        if self.config.query_spread:
            loss = loss + _penalty(self.config.query_spread, queries) * _share(queries)
        if self.config.candidate_spread:
            loss = loss + _penalty(self.config.candidate_spread, positives)
        return output._replace(loss=loss, also=also)

    def _stored(self, vectors: Float[Tensor, "N R D"], width: int | None, step: int) -> Tensor:
        """Candidates' vectors as a store returns them."""
        vectors, quantization = narrowed(vectors, width), self.config.quantization
        is_rounded = quantization and quantization.is_on(step)
        return rounded(vectors, quantization.bits) if quantization and is_rounded else vectors

    def _terms(
        self,
        step: int,
        scores: Float[Tensor, "Q _"] | None,
        taught: Taught | None,
        negatives_of: Int[Tensor, "Q N"] | None,
    ) -> Iterator[Term]:
        own, teacher = self.config.self_distillation, self.config.teacher
        if own and own.weight_at(step):
            yield Term(
                "self_distillation",
                own.weight_at(step),
                lambda logits, *_: divergence(logits, logits[-1].detach(), own.temperature),
            )
        if teacher is None:
            return
        if teacher.model is None:
            yield Term("teacher", teacher.weight, _by_scores(teacher, _known(scores)))
        elif taught is not None:
            yield Term("teacher", teacher.weight, _by_model(teacher, taught, negatives_of))


def _by_scores(teacher: TeacherConfig, scores: Float[Tensor, "Q _"]) -> OfTerm:
    """Distillation from given scores of each query's positive and hard negatives."""

    def of(logits: Tensor, own: Tensor, rows: slice) -> Tensor:
        theirs = torch.full_like(logits[0], -torch.inf)
        known = scores[rows].to(theirs.dtype)
        num_hard = known.shape[1] - 1
        theirs = theirs.scatter(1, own[:, None], known[:, :1])
        theirs = torch.cat([theirs[:, : theirs.shape[1] - num_hard], known[:, 1:]], dim=1)
        return _taught(teacher, logits, theirs, own)

    return of


def _by_model(
    teacher: TeacherConfig, taught: Taught, negatives_of: Int[Tensor, "Q N"] | None
) -> OfTerm:
    """Distillation from a model's scores of all candidates of a query."""
    positives = gather(taught.positives)

    def of(logits: Tensor, own: Tensor, rows: slice) -> Tensor:
        queries, groups = taught.queries[rows], [taught.group]
        theirs = nested_scores(queries, positives, groups)[0]
        if taught.negatives is not None and negatives_of is not None:
            index = negatives_of[rows].clamp(min=0)
            hard = taught.negatives[index.flatten()].unflatten(0, index.shape)
            theirs = torch.cat([theirs, paired_scores(queries, hard, groups)[0]], dim=1)
        return _taught(teacher, logits, theirs.to(logits.dtype) / taught.group.r_q, own)

    return of


def _taught(teacher: TeacherConfig, logits: Tensor, scores: Tensor, own: Tensor) -> Tensor:
    if teacher.objective == "kl":
        return divergence(logits, scores / teacher.temperature)
    return margin_error(logits, scores / teacher.temperature, own)


def _known(scores: Float[Tensor, "Q _"] | None) -> Float[Tensor, "Q _"]:
    if scores is None or bool(scores.isnan().any()):
        raise UserError(
            "model.loss.teacher learns from the `score` of each pair's positive and hard "
            "negatives, and some have none: let `mine` write them, or name a teacher.model"
        )
    if scores.shape[1] < 2:
        raise UserError(
            "model.loss.teacher learns how far a positive scores above its hard negatives, and the "
            "batch has none: raise num_negatives, or mine them"
        )
    return scores


def _penalty(spread: SpreadConfig, vectors: Float[Tensor, "N R D"]) -> Float[Tensor, ""]:
    return spread.weight * likeness(vectors, spread.margin).mean()


def _share(rows: Float[Tensor, "N R D"]) -> float:
    """The number of rows of this rank, relative to the mean over ranks."""
    total = gather(torch.tensor([len(rows)], device=rows.device)).sum()
    return len(rows) * rank_and_world()[1] / int(total)


def check_widths(widths: Sequence[int] | None, width: int | None = None) -> list[int]:
    """The widths; a UserError if they are not nested, or not below a known `width` of the model."""
    found = list(widths or [])
    if sorted(set(found), reverse=True) != found or (found and found[-1] < 1):
        raise UserError(
            f"model.loss.widths are nested, largest first and at least 1, such as [64, 32]; got "
            f"{found}"
        )
    if width is not None and found and found[0] >= width:
        raise UserError(
            f"model.loss.widths {found} must be below the {width} components that the meta "
            "embeddings have"
        )
    return found
