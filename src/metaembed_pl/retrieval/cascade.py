"""How a store is searched: one scan at a budget, or a cascade of ever larger budgets.

A cascade scans everything at a small budget and scores what is left at larger ones:

    >>> groups = [Budget(1, 1), Budget(4, 8), Budget(16, 64)]
    >>> [str(stage) for stage in parse_cascade("16x1:2000,4x8:200,16x64:10", groups)]
    ['16x1:2000', '4x8:200', '16x64:10']

Q: queries    Rq: their vectors    D: width    N: places that are searched    K: hits of a query
"""

import itertools
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from metaembed_pl.budget import Budget, check_budget
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.scoring import best_rows, fast_dtype, scan
from metaembed_pl.retrieval.snapshot import Snapshot


class Stage(NamedTuple):
    """One step of a cascade: score at a budget, keep the best."""

    budget: Budget
    keep: int

    def __str__(self) -> str:
        return f"{self.budget}:{self.keep}"


@dataclass(frozen=True)
class Hits:
    """What a search found, by query, best first.

    Args:
        ids: of the items.
        scores: MaxSim at the last budget; not divided by r_q unless that was asked for.
        rows: of the items in the store.
        stages: what was spent.
        milliseconds: of the search of all queries, without their encoding.
        bytes_read: of vectors, from disk or from the memory that the system keeps of it.
    """

    ids: list[list[str]]
    scores: list[list[float]]
    rows: list[list[int]]
    stages: tuple[Stage, ...]
    milliseconds: float
    bytes_read: int = field(compare=False)


class Found(NamedTuple):
    """What stages found, by query, best first.

    Args:
        scores: MaxSim at the last budget.
        places: where the hits stand in the store's files.
        bytes_read: of vectors.
        seconds: it took.
    """

    scores: Float[Tensor, "Q K"]
    places: Integer[Tensor, "Q K"]
    bytes_read: int
    seconds: float


def parse_cascade(
    value: str | Iterable[Stage | str], groups: Sequence[Budget]
) -> tuple[Stage, ...]:
    """Read the stages of a cascade, first to last, as text or a list.

    Raises:
        UserError: not stages, a budget the model was not trained for, or a stage that would keep
            more than the one before.
    """
    parts = value.split(",") if isinstance(value, str) else list(value)
    stages = [part if isinstance(part, Stage) else _parse_stage(part) for part in parts]
    stages = [Stage(check_budget(stage.budget, groups), stage.keep) for stage in stages]
    for before, stage in itertools.pairwise(stages):
        if stage.keep > before.keep:
            raise UserError(f"stage {stage} of a cascade keeps more than {before} before it")
    if not stages:
        raise UserError("a cascade has at least one stage, such as 16x1:2000")
    return tuple(stages)


def _parse_stage(text: str) -> Stage:
    budget, colon, keep = text.partition(":")
    if not colon or not keep.strip().isdecimal() or int(keep) < 1:
        raise UserError(
            f"a stage of a cascade is a budget and how many to keep, such as 4x8:200; got {text!r}"
        )
    return Stage(Budget.parse(budget), int(keep))


def choose_stages(
    groups: Sequence[Budget],
    budget: Budget | str | None = None,
    cascade: str | Iterable[Stage | str] | None = None,
    top: int | None = None,
) -> tuple[Stage, ...]:
    """The stages of a search that was given a budget or a cascade, or neither: all vectors.

    Raises:
        UserError: a model of these groups cannot serve them.
    """
    if top is not None and top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    if cascade is None:
        return (Stage(check_budget(budget or groups[-1], groups), top or 10),)
    if budget is not None:
        raise UserError(f"give a budget ({budget}) or a cascade, not both")
    stages = parse_cascade(cascade, groups)
    if top is not None and top > stages[-1].keep:
        raise UserError(f"the cascade's last stage {stages[-1]} keeps fewer than the top {top}")
    return stages


def run_stages(
    snapshot: Snapshot,
    queries: Float[Tensor, "Q Rq D"],
    stages: Sequence[Stage],
    places: Integer[Tensor, " N"],
) -> Found:
    """Search places stage by stage.

    The first stage multiplies in what the machine is fastest at. Where that is coarser than float32
    it keeps more than asked, and these are scored once more: scores that are returned, and the
    order, are those of float32.
    """
    started = time.perf_counter()
    first, *later = stages
    dtype = fast_dtype(queries.device)
    if dtype != torch.float32:
        later = [first, *later]
        first = Stage(first.budget, 2 * first.keep + 32)
    r_q, r_c = first.budget
    scored = scan(snapshot.planes, queries[:, :r_q], r_c, places, dtype)
    scores, found = best_rows(scored, first.keep)
    num_vectors = len(places) * r_c
    for (r_q, r_c), keep in later:
        num_vectors += found.numel() * r_c
        best = [
            best_rows(
                scan(snapshot.planes, query[None, :r_q], r_c, of_query.sort().values.cpu()), keep
            )
            for query, of_query in zip(queries, found, strict=True)
        ]
        scores, found = (torch.cat(of_all) for of_all in zip(*best, strict=True))
    seconds = time.perf_counter() - started
    return Found(scores, found, num_vectors * snapshot.vector_bytes, seconds)
