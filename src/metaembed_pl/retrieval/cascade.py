"""Search plans: one scan at a budget, or a cascade of stages, cheapest first.

A stage scores the items kept by the previous stage, and keeps the best:

    4x8:200      MaxSim of 4 query and 8 candidate vectors; the 200 best items
    4x8x64:200   the same with the first 64 components of each, where the model was trained so
    poolx16:200  the sum of all query vectors with 16 candidate vectors; the 200 best items;
                 poolx16x64:200 with 64 components
    pool@.7:200  the index, queried with the sum, reads the lists whose centres score at least .7 of
                 the best centre's score; the items of the 200 best candidate vectors in them
    each@.7:50   the index, queried with each query vector; the items of the 50 best vectors of each

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
"""Cost of checking in the index whether a vector passes a filter, in dot products."""


class Stage(NamedTuple):
    """One step of a cascade.

    Args:
        budget: query and candidate vectors to use, and their components.
        keep: items to keep; with the index, vectors to take for each question.
        pooled: sum the query's vectors first.
        reach: lists of the index to read, see `Index.search`; None: score every item.
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
        """Dot products per scored item."""
        one = self.pooled or self.budget.r_c == 1
        return self.budget.r_c * (1 if one else self.budget.r_q)

    def query_vectors(self, queries: Float[Tensor, "Q Rq D"]) -> Float[Tensor, "Q _ _"]:
        """The query vectors of this stage."""
        queries = narrowed(queries[:, : self.budget.r_q], self.budget.width)
        return queries.sum(dim=1, keepdim=True) if self.pooled else queries


@dataclass(frozen=True)
class Hits:
    """The hits of a search by query, best first.

    Args:
        ids: ids of the items.
        scores: MaxSim at the last budget; divided by r_q only with `normalised`.
        rows: rows of the items in the store, such as `Store.metadata` takes.
        stages: stages that the search ran.
        milliseconds: time for all queries, without encoding.
        bytes_read: bytes of the vectors read, from disk or the system's cache.
    """

    ids: list[list[str]]
    scores: list[list[float]]
    rows: list[list[int]]
    stages: tuple[Stage, ...]
    milliseconds: float
    bytes_read: int = field(compare=False)


class StageResult(NamedTuple):
    """The hits of stages by query, best first; `places` are rows of the store's files."""

    scores: Float[Tensor, "Q K"]
    places: Integer[Tensor, "Q K"]
    bytes_read: int
    seconds: float


def parse_cascade(
    value: str | Iterable[Stage | str], groups: Sequence[Budget], widths: Iterable[int] = ()
) -> tuple[Stage, ...]:
    """Read the stages of a cascade, first to last, as text or a list.

    Raises:
        UserError: not stages, a budget the model was not trained for, or a stage that keeps more
            than the one before.
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
    """The stages of a search at a budget, or in a cascade; with neither, at all vectors.

    Raises:
        UserError: the model was not trained for them.
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

    A first stage that scores every item multiplies in the machine's fastest dtype. If that is
    coarser than float32, it keeps more items, which are scored again: the scores returned, and
    their order, are those of float32.

    Args:
        snapshot: of the store.
        queries: returned by `Searchable.accept`.
        stages: first to last.
        matching: the items to search.
        index: of the snapshot; needed if the first stage uses it.
    """
    started = time.perf_counter()
    first, *later = stages
    if first.reach is not None:
        assert index is not None, "a plan with an index is only chosen if there is one"
        at_least = min(stages[-1].keep, len(matching.places))
        places, bytes_read = _ask(snapshot, index, queries, first, matching, at_least)
        found = [(places.new_empty(0).float(), places) for places in places]
    else:
        dtype = fast_dtype(queries.device)
        if dtype != torch.float32:
            later = [first, *later]
            first = first._replace(keep=2 * first.keep + 32)
        r_c = first.budget.r_c
        scored = scan(snapshot.planes, first.query_vectors(queries), r_c, matching.places, dtype)
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
    vectors = stage.query_vectors(query[None])
    if len(places) <= FEW:
        scores = score_few(snapshot.planes, vectors[0], stage.budget.r_c, places)
        scores, best = best_columns(scores[None], stage.keep)
        return scores[0], places[best[0].cpu()]
    scores, best = best_rows(scan(snapshot.planes, vectors, stage.budget.r_c, places), stage.keep)
    return scores[0], best[0]


def _ask(
    snapshot: Snapshot,
    index: Index,
    queries: Float[Tensor, "Q Rq D"],
    stage: Stage,
    matching: Matching,
    at_least: int,
) -> tuple[list[Integer[Tensor, " n"]], int]:
    """The places that the index finds, by query, and the bytes read.

    Items that are not in the index yet are all scored.
    """
    assert stage.reach is not None
    allowed = matching.allowed(index.num_rows, index.num_slots)
    num_indexed = matching.num_below(index.num_rows)
    # With a filter, more lists are needed for as many items.
    widened = len(snapshot.places) / len(matching.places)
    found, bytes_read = index.search(
        stage.query_vectors(queries),
        stage.reach,
        stage.keep,
        allowed,
        min(at_least, num_indexed),
        widened,
    )
    tail = matching.places[num_indexed:]
    if len(tail):
        scored = scan(snapshot.planes, queries, stage.budget.r_c, tail)
        _, best = best_rows(scored, max(stage.keep, at_least))
        found = [torch.cat([*both]) for both in zip(found, best.cpu(), strict=True)]
        bytes_read += len(tail) * snapshot.item_bytes(stage.budget)
    return found, bytes_read


def for_filter(
    stages: tuple[Stage, ...], index: Index, queries: Float[Tensor, "Q Rq D"], share: float
) -> tuple[Stage, ...]:
    """The stages of a search with an index, if a filter selects a share of the items.

    Many more lists are read then; if that costs more than scoring all items, all are scored.
    """
    first, last = stages[0], stages[-1]
    if share == 1 or first.reach is None:
        return stages
    all_of_them = share * index.num_rows * last.products
    a_list = index.num_rows * index.num_slots / index.num_lists * (PASSED_OVER + share)
    if all_of_them <= min(1 / share, index.num_lists) * a_list:
        return (last,)  # even a single widened list costs more
    questions = first.query_vectors(queries).float().cpu().numpy()
    lists, _ = index.lists_of(questions, first.reach, 1 / share)
    num_read = (lists >= 0).sum() / len(queries)
    return (last,) if all_of_them <= num_read * a_list else stages
