"""Search plans: one scan at a budget, or a cascade of stages, cheapest first.

A stage scores the items kept by the previous stage, and keeps the best:

    4x8:200      MaxSim of 4 query and 8 candidate vectors; the 200 best items
    4x8x64:200   the same with the first 64 components of each, where the model was trained so
    poolx16:200  the sum of all query vectors, against 16 candidate vectors; the 200 best items;
                 poolx16x64:200 with 64 components
    pool@.7:200  the sum asks the index, which reads the lists whose centres score at least .7 of
                 the best centre's; the items of the 200 best candidate vectors in them
    each@.7:50   every query vector asks the index; the items of the 50 best vectors of each

Only the first stage can use the index, and the last one scores at a budget. Pooling the query costs
one product per candidate vector instead of r_q, and loses little if a query's vectors are similar.

    >>> groups = [Budget(1, 1), Budget(4, 8), Budget(16, 64)]
    >>> [str(stage) for stage in parse_cascade("poolx8:2000,4x8:200,16x64:10", groups)]
    ['poolx8:2000', '4x8:200', '16x64:10']

Q: queries    Rq: their vectors    D: width    N: places that are searched    K: hits of a query
"""

import itertools
import re
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from metaembed_pl.budget import Budget, check_budget
from metaembed_pl.errors import UserError
from metaembed_pl.late_interaction import narrowed
from metaembed_pl.retrieval.index import Index
from metaembed_pl.retrieval.scoring import FEW, best_columns, best_rows, fast_dtype, scan, score_few
from metaembed_pl.retrieval.searchable import VectorSpace
from metaembed_pl.retrieval.snapshot import Matching, Snapshot

_STAGE = re.compile(
    r"\s*(?:poolx(?P<r_c>\d+)(?:x(?P<width>\d+))?|(?P<asks>pool|each)@(?P<reach>\d*\.?\d+)|(?P<budget>[^:@]+))"
    r"\s*:\s*(?P<keep>\d+)\s*"
)
PASSED_OVER = 1.2
"""What an index spends on looking whether a filter lets a vector through, in dot products."""


class Stage(NamedTuple):
    """One step of a cascade.

    Args:
        budget: query and candidate vectors that are used, and their components.
        keep: items that are kept; where the index is asked, vectors for each question.
        pooled: the query's vectors are summed first.
        reach: which lists of the index are read, see `Index.search`; None: every item is scored.
    """

    budget: Budget
    keep: int
    pooled: bool = False
    reach: float | None = None

    def __str__(self) -> str:
        if self.reach is not None:
            return f"{'pool' if self.pooled else 'each'}@{self.reach:g}:{self.keep}"
        pooled = str(self.budget).partition("x")[2]
        return f"{f'poolx{pooled}' if self.pooled else self.budget}:{self.keep}"

    @property
    def products(self) -> int:
        """Dot products for an item that is scored."""
        one = self.pooled or self.budget.r_c == 1
        return self.budget.r_c * (1 if one else self.budget.r_q)

    def asked(self, queries: Float[Tensor, "Q Rq D"]) -> Float[Tensor, "Q _ _"]:
        """The vectors that the stage asks with."""
        queries = narrowed(queries[:, : self.budget.r_q], self.budget.width)
        return queries.sum(dim=1, keepdim=True) if self.pooled else queries


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


class StageResult(NamedTuple):
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
    value: str | Iterable[Stage | str], groups: Sequence[Budget], widths: Iterable[int] = ()
) -> tuple[Stage, ...]:
    """Read the stages of a cascade, first to last, as text or a list.

    Raises:
        UserError: not stages, a budget the model was not trained for, or a stage that would keep
            more than the one before.
    """
    parts = value.split(",") if isinstance(value, str) else list(value)
    stages = tuple(part if isinstance(part, Stage) else _parse(part, groups[-1]) for part in parts)
    if not stages:
        raise UserError("a cascade has at least one stage, such as poolx8:200")
    for stage in stages:
        check_budget(stage.budget, groups, widths)
    for before, stage in itertools.pairwise(stages):
        if stage.reach is not None:
            raise UserError(f"only the first stage of a cascade can use the index, not {stage}")
        if stage.keep > before.keep and before.reach is None:
            raise UserError(f"stage {stage} of a cascade keeps more than {before} before it")
    if stages[-1].pooled or stages[-1].reach is not None:
        raise UserError(
            f"the last stage of a cascade scores at a budget, such as {groups[-1]}:10; "
            f"got {stages[-1]}"
        )
    return stages


@lru_cache(maxsize=256)
def _parse(text: str, every: Budget) -> Stage:
    match = _STAGE.fullmatch(text)
    if match is None or int(match["keep"]) < 1 or not 0 <= float(match["reach"] or 0) <= 1:
        raise UserError(
            "a stage of a cascade says what is scored and how many are kept, such as 4x8:200, "
            f"poolx8:200, pool@.7:200 or each@.7:50; got {text!r}"
        )
    keep = int(match["keep"])
    if match["reach"]:
        return Stage(every, keep, match["asks"] == "pool", float(match["reach"]))
    if match["r_c"]:
        width = int(match["width"]) if match["width"] else None
        return Stage(Budget(every.r_q, int(match["r_c"]), width), keep, pooled=True)
    return Stage(Budget.parse(match["budget"]), keep)


def choose_stages(
    space: VectorSpace,
    budget: Budget | str | None = None,
    cascade: str | Iterable[Stage | str] | None = None,
    top: int | None = None,
) -> tuple[Stage, ...]:
    """The stages of a search that was given a budget or a cascade, or neither: all vectors.

    Raises:
        UserError: the model of these vectors cannot serve them.
    """
    groups, widths = space.groups, space.widths
    if top is not None and top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    if cascade is None:
        return (Stage(check_budget(budget or groups[-1], groups, widths), top or 10),)
    if budget is not None:
        raise UserError(f"give a budget ({budget}) or a cascade, not both")
    stages = parse_cascade(cascade, groups, widths)
    if top is not None and top > stages[-1].keep:
        raise UserError(f"the cascade's last stage {stages[-1]} keeps fewer than the top {top}")
    return stages


def run_stages(
    snapshot: Snapshot,
    queries: Float[Tensor, "Q Rq D"],
    stages: Sequence[Stage],
    matching: Matching,
    index: Index | None = None,
) -> StageResult:
    """Search stage by stage.

    A first stage that scores every item multiplies in what the machine is fastest at. Where that is
    coarser than float32 it keeps more than asked, and these are scored once more: scores that are
    returned, and the order, are those of float32.

    Args:
        snapshot: of the store.
        queries: as the store accepted them.
        stages: what to do, first to last.
        matching: which items are searched.
        index: of the snapshot; needed where the first stage asks it.
    """
    started = time.perf_counter()
    first, *later = stages
    if first.reach is not None:
        assert index is not None, "a plan that asks an index is chosen where there is one"
        at_least = min(stages[-1].keep, len(matching.places))
        places, bytes_read = _ask(snapshot, index, queries, first, matching, at_least)
        found = [(places.new_empty(0).float(), places) for places in places]
    else:
        dtype = fast_dtype(queries.device)
        if dtype != torch.float32:
            later = [first, *later]
            first = first._replace(keep=2 * first.keep + 32)
        r_c = first.budget.r_c
        scored = scan(snapshot.planes, first.asked(queries), r_c, matching.places, dtype)
        found = list(zip(*best_rows(scored, first.keep), strict=True))
        bytes_read = len(matching.places) * snapshot.item_bytes(first.budget)
    for stage in later:
        a_row = snapshot.item_bytes(stage.budget)
        bytes_read += sum(len(places) for _, places in found) * a_row
        found = [
            _best_of(snapshot, stage, query, places)
            for query, (_, places) in zip(queries, found, strict=True)
        ]
    scores, places = (torch.stack(of_all) for of_all in zip(*found, strict=True))
    return StageResult(scores, places, bytes_read, time.perf_counter() - started)


def _best_of(
    snapshot: Snapshot, stage: Stage, query: Float[Tensor, "Rq D"], places: Integer[Tensor, " n"]
) -> tuple[Float[Tensor, " K"], Integer[Tensor, " K"]]:
    """The best of some places for one query."""
    places = places.sort().values.cpu()
    asked = stage.asked(query[None])
    if len(places) <= FEW:
        scores = score_few(snapshot.planes, asked[0], stage.budget.r_c, places)
        scores, best = best_columns(scores[None], stage.keep)
        return scores[0], places[best[0].cpu()]
    scores, best = best_rows(scan(snapshot.planes, asked, stage.budget.r_c, places), stage.keep)
    return scores[0], best[0]


def _ask(
    snapshot: Snapshot,
    index: Index,
    queries: Float[Tensor, "Q Rq D"],
    stage: Stage,
    matching: Matching,
    at_least: int,
) -> tuple[list[Integer[Tensor, " n"]], int]:
    """Places that the index finds, by query, and the bytes read.

    Items that are not in the index yet are all scored.
    """
    assert stage.reach is not None
    allowed = matching.allowed(index.num_rows, index.num_slots)
    at_least = min(at_least, matching.num_below(index.num_rows))
    # Under a filter more lists hold as many items.
    widened = len(snapshot.places) / len(matching.places)
    found, bytes_read = index.search(
        stage.asked(queries), stage.reach, stage.keep, allowed, at_least, widened
    )
    tail = matching.places[matching.num_below(index.num_rows) :]
    if len(tail):
        _, best = best_rows(scan(snapshot.planes, queries, stage.budget.r_c, tail), stage.keep)
        found = [torch.cat([*both]) for both in zip(found, best.cpu(), strict=True)]
        bytes_read += len(tail) * snapshot.item_bytes(stage.budget)
    return found, bytes_read


def for_filter(
    stages: tuple[Stage, ...], index: Index, queries: Float[Tensor, "Q Rq D"], share: float
) -> tuple[Stage, ...]:
    """Stages that ask an index, where a filter lets a share of the items through.

    Many more lists are read then. Where that costs more than to score them all, they are all
    scored.
    """
    first, last = stages[0], stages[-1]
    if share == 1 or first.reach is None:
        return stages
    all_of_them = share * index.num_rows * last.products
    a_list = index.num_rows * index.num_slots / index.num_lists * (PASSED_OVER + share)
    if all_of_them <= min(1 / share, index.num_lists) * a_list:
        return (last,)  # a single list, widened, costs more: no need to look which are near
    asked = first.asked(queries).float().cpu().numpy()
    lists, _ = index.lists_of(asked, first.reach, 1 / share)
    num_read = (lists >= 0).sum() / len(queries)
    return (last,) if all_of_them <= num_read * a_list else stages
