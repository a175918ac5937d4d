"""Optional terms of the loss besides InfoNCE, and optional transformations of vectors.

All are off by default.

N: inputs    R: meta embeddings of an input    D: width    G: groups    Q: queries
C: candidates that a query is compared with
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from metaembed_pl.errors import UserError

UNKNOWN = -1e9
"""A logit that no softmax sees; unlike -infinity it may be subtracted from itself."""


@dataclass
class SpreadConfig:
    """A penalty on an input's own meta embeddings where they are alike.

    Args:
        weight: weight of the penalty; the loss of a group has weight 1.
        margin: cosines up to this are not penalised, -1 to below 1.
    """

    weight: float = 10.0
    margin: float = 0.5

    def __post_init__(self) -> None:
        _check_positive("", weight=self.weight)
        if not -1 <= self.margin < 1:
            raise UserError(f"margin is a cosine, -1 to below 1, got {self.margin}")


def likeness(vectors: Float[Tensor, "N R D"], margin: float) -> Float[Tensor, " N"]:
    """How far cosines between an input's unit vectors exceed the margin, the mean over all pairs.

    >>> likeness(torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]]), margin=0.7)
    tensor([0.0333])
    """
    first, second = torch.triu_indices(*[vectors.shape[1]] * 2, offset=1, device=vectors.device)
    with torch.autocast(vectors.device.type, enabled=False):
        cosines = vectors @ vectors.transpose(1, 2)
    return (cosines[:, first, second] - margin).clamp(min=0).mean(dim=1)


@dataclass
class SelfDistillationConfig:
    """Distillation: smaller groups learn how the largest one ranks the candidates of a batch.

    Args:
        weight: weight of the divergence; the loss of a group has weight 1.
        temperature: logits of teacher and student are divided by it; above 1, candidates below the
            first one count more.
        first_step: the step at which it starts, once the teacher has learned something.
        warmup_steps: number of steps over which its weight rises from 0.
    """

    weight: float = 1.0
    temperature: float = 1.0
    first_step: int = 0
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        _check_positive("self_distillation.", weight=self.weight, temperature=self.temperature)
        if min(self.first_step, self.warmup_steps) < 0:
            raise UserError(
                "self_distillation: first_step and warmup_steps are at least 0, got "
                f"{self.first_step} and {self.warmup_steps}"
            )

    def weight_at(self, step: int) -> float:
        """Its weight in a step of the plan.

        >>> config = SelfDistillationConfig(weight=2.0, first_step=1, warmup_steps=2)
        >>> [config.weight_at(step) for step in range(4)]
        [0.0, 1.0, 2.0, 2.0]
        """
        done = step + 1 - self.first_step
        return self.weight * min(1.0, max(0, done) / max(1, self.warmup_steps))


@dataclass
class TeacherConfig:
    """Distillation from a teacher's scores.

    Args:
        model: folder of a trained model that scores the same batch. None: the `score` of each
            pair's positive and hard negatives, such as a reranker's.
        weight: weight of this term; the loss of a group has weight 1.
        objective: `kl` compares distributions over candidates; `margin_mse` how far the positive is
            above each other candidate, in logits.
        temperature: the teacher's scores are divided by it; a model's are first divided by r_q.

    Source: MarginMSE: Hofstätter et al., arXiv 2010.02666.
    """

    model: str | None = None
    weight: float = 1.0
    objective: Literal["kl", "margin_mse"] = "kl"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        _check_positive("teacher.", weight=self.weight, temperature=self.temperature)


@dataclass
class QuantizationConfig:
    """Rounds candidates in a share of the steps, as a store with fewer bits does.

    Args:
        bits: bits per component: 8, with one scale per vector, or 1, the sign.
        share: share of the steps in which candidates are quantized.
    """

    bits: int = 8
    share: float = 0.5

    def __post_init__(self) -> None:
        if self.bits not in (1, 8):
            raise UserError(f"quantization.bits is 8 or 1, got {self.bits}")
        if not 0 < self.share <= 1:
            raise UserError(f"quantization.share is a share, above 0 to 1, got {self.share}")

    def is_on(self, step: int) -> bool:
        """Whether a step is one of the share: evenly spaced, the same on every rank.

        >>> [QuantizationConfig(share=0.5).is_on(step) for step in range(4)]
        [False, True, False, True]
        """
        return math.floor((step + 1) * self.share) > math.floor(step * self.share)


def _check_positive(before: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < float("inf"):
            raise UserError(f"{before}{name} must be positive, got {value}")


def divergence(
    logits: Float[Tensor, "G Q C"], teacher: Float[Tensor, "Q C"], temperature: float = 1.0
) -> Float[Tensor, "G Q"]:
    """KL of the teacher's distribution over candidates from each group's.

    Candidates with -infinity on either side are ignored. The result is multiplied by the squared
    temperature, so that gradients keep their size (Hinton et al., arXiv 1503.02531).

    >>> teacher = torch.tensor([[0.0, 0.0]])
    >>> divergence(torch.tensor([[[0.0, 0.0]], [[0.0, 5.0]]]), teacher)
    tensor([[0.0000],
            [1.8136]])
    """
    unknown = ~(teacher.isfinite() & logits[0].isfinite())
    expected = (teacher / temperature).masked_fill(unknown, UNKNOWN).log_softmax(dim=-1)
    found = (logits / temperature).masked_fill(unknown, UNKNOWN).log_softmax(dim=-1)
    apart = F.kl_div(found, expected.expand_as(found), log_target=True, reduction="none")
    return temperature**2 * apart.sum(dim=-1)


def margin_error(
    logits: Float[Tensor, "G Q C"], teacher: Float[Tensor, "Q C"], own: Int[Tensor, " Q"]
) -> Float[Tensor, "G Q"]:
    """MarginMSE: the squared error of the margins between the positive and each other candidate.

    The mean over candidates with finite logits of student and teacher.

    Args:
        logits: of the student.
        teacher: its logits; -infinity where unknown.
        own: the index of each query's positive.
    """
    index = own[:, None]
    known = (teacher.isfinite() & logits[0].isfinite()).scatter(1, index, False)
    theirs = teacher.gather(1, index) - teacher
    ours = logits.gather(2, index.expand(len(logits), -1, -1)) - logits
    error = (ours - theirs).masked_fill(~known, 0.0).square()
    return error.sum(dim=2) / known.sum(dim=1).clamp(min=1)


def rounded(vectors: Float[Tensor, "N R D"], bits: int) -> Float[Tensor, "N R D"]:
    """Vectors as a store with so many bits returns them; the gradient passes through unchanged.

    >>> rounded(torch.tensor([[[0.6, -0.8]]]), 1)
    tensor([[[ 0.7071, -0.7071]]])
    """
    exact = vectors.detach()
    if bits == 1:
        stored = torch.where(exact < 0, -1.0, 1.0).to(exact.dtype) / exact.shape[-1] ** 0.5
    else:
        scale = exact.abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 127
        stored = (exact / scale).round() * scale
    return vectors + (stored - exact)
