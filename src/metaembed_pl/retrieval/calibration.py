"""What each budget and cascade finds and costs on a store, measured on the store itself.

Some queries are searched for with all vectors, and with every cheaper plan; a plan's recall is the
share of the first ten that it finds too. Only so many rows are searched that this takes seconds. In
a sample of a tenth of the rows a stage keeps a tenth of what it would keep: that asks more of it,
not less, as the ten best then reach ten times as far down.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget, check_budget
from metaembed_pl.errors import UserError
from metaembed_pl.files import write_text
from metaembed_pl.retrieval.cascade import Stage, parse_cascade, run_stages
from metaembed_pl.retrieval.store import Store

CALIBRATION_FILE = "calibration.json"
TOP = 10
NUM_QUERIES, ASKED_AT_A_TIME = 32, 8
PRODUCTS_AT_MOST = 2.5e11
"""Multiplications that the exact search may take: some seconds on a core or two."""
ROWS_AT_LEAST = 1000
KEPT_FIRST = (50, 200, 1000, 4000, 16_000)


class Measured(NamedTuple):
    """A plan, and what came of it.

    Args:
        plan: a budget, or the stages of a cascade.
        recall: share of the first ten of the exact search, over all queries.
        products: multiplications a query on the whole store, in units of the width.
        bytes_read: a query, on the whole store.
        milliseconds: a query, on the rows that were searched.
    """

    plan: str
    recall: float
    products: float
    bytes_read: float
    milliseconds: float


@dataclass(frozen=True)
class Calibration:
    """Plans for a store, cheapest first.

    Args:
        generation: of the store.
        groups: of its model.
        used: which queries and rows were measured, in words.
        measured: each plan.
    """

    generation: int
    groups: tuple[str, ...]
    used: str
    measured: tuple[Measured, ...]

    def choose(self, target_recall: float, top: int = TOP) -> tuple[Stage, ...]:
        """The cheapest plan that finds at least so many of the first ten.

        Raises:
            UserError: the target is not a share.
        """
        if not 0 < target_recall <= 1:
            raise UserError(f"a target recall lies above 0 and up to 1, got {target_recall}")
        plan = next(row.plan for row in self.measured if row.recall >= target_recall)
        return stages_of(plan, [Budget.parse(group) for group in self.groups], top)

    def save(self, store: Store) -> None:
        """Keep it beside the store's manifest."""
        write_text(store.folder / CALIBRATION_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, store: Store) -> "Calibration | None":
        """That of this generation of a store, where it was kept."""
        try:
            value = json.loads(Path(store.folder / CALIBRATION_FILE).read_text())
            measured = tuple(Measured(*row) for row in value["measured"])
            found = cls(value["generation"], tuple(value["groups"]), value["used"], measured)
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return found if found.generation == store.generation else None


def plans(groups: Sequence[Budget], num_rows: int) -> list[tuple[Stage, ...]]:
    """What is tried: each group, the summed query, and cascades that end with all vectors.

    >>> groups = [Budget(1, 1), Budget(4, 8), Budget(16, 64)]
    >>> [",".join(map(str, plan)) for plan in plans(groups, 500)][-2:]
    ['16x1:50,16x64:10', '16x1:200,4x8:20,16x64:10']
    """
    last = groups[-1]
    first = Budget(last.r_q, groups[0].r_c)
    single = dict.fromkeys([groups[0], first, *groups[1:]])
    found: list[tuple[Stage, ...]] = [(Stage(budget, TOP),) for budget in single]
    between = groups[len(groups) // 2]
    for keep in KEPT_FIRST:
        if keep >= num_rows or first == last:
            break
        fits = keep >= 10 * TOP and first.r_c < between.r_c < last.r_c
        middle = [Stage(between, keep // 10)] if fits else []
        found.append((Stage(first, keep), *middle, Stage(last, TOP)))
    return found


def calibrate(
    store: Store,
    queries: Float[Tensor, "Q Rq D"] | None = None,
    asked_by: str = "queries",
    go_on: Callable[[], None] = lambda: None,
) -> Calibration:
    """Measure plans on a store.

    Args:
        store: not empty.
        queries: of the store's model, some dozens; None: stored items ask, with their own vectors.
        asked_by: what the queries are, in words.
        go_on: called every second or so; what it raises ends the measurement.

    Raises:
        UserError: the store is empty.
    """
    if not len(store):
        raise UserError(f"{store.folder} is empty: there is nothing to calibrate on")
    if queries is None:
        queries, asked_by = _stored_queries(store), "stored items, by their own vectors"
    else:
        queries = store.accept(queries)
    snapshot = store.snapshot()
    r_q, r_c = store.groups[-1]
    affordable = int(PRODUCTS_AT_MOST / (len(queries) * r_q * r_c * store.width))
    rows = spread(len(store), max(ROWS_AT_LEAST, affordable))
    places = snapshot.places[rows]

    def search(plan: Sequence[Stage]) -> tuple[Tensor, float]:
        """What a plan finds, and the seconds it takes."""
        parts = []
        for some in queries.split(ASKED_AT_A_TIME):
            go_on()
            parts.append(run_stages(snapshot, some, plan, places))
        return torch.cat([part.places for part in parts]), sum(part.seconds for part in parts)

    exact, _ = search([Stage(store.groups[-1], TOP)])
    measured = []
    for plan in plans(store.groups, len(store)):
        share = len(rows) / len(store)
        scaled = [Stage(budget, max(TOP, math.ceil(share * keep))) for budget, keep in plan]
        found, seconds = search(scaled)
        hits = (exact.unsqueeze(2) == found.unsqueeze(1)).any(dim=2)
        recall, milliseconds = hits.float().mean().item(), 1000 * seconds / len(queries)
        measured.append(Measured(plan_name(plan), recall, *costs(plan, store), milliseconds))
    return Calibration(
        store.generation,
        tuple(map(str, store.groups)),
        f"{len(queries)} {asked_by}, on {len(rows):,} of {len(store):,} items",
        tuple(sorted(measured, key=lambda row: (row.products, row.bytes_read))),
    )


def costs(plan: Sequence[Stage], store: Store) -> tuple[int, int]:
    """What a query costs on a whole store: multiplications, in units of the width, and bytes."""
    # What a stage scores is what the stage before it keeps.
    scored = list(zip([len(store), *(stage.keep for stage in plan)], plan, strict=False))
    products = sum(n * b.r_c * (1 if b.r_c == 1 else b.r_q) for n, (b, _) in scored)
    return products, sum(n * b.r_c for n, (b, _) in scored) * store.snapshot().vector_bytes


def stages_of(plan: str, groups: Sequence[Budget], top: int) -> tuple[Stage, ...]:
    """The stages of a plan that was named, each keeping at least `top`, the last just that.

    >>> groups = [Budget(1, 1), Budget(4, 8)]
    >>> [",".join(map(str, stages_of(plan, groups, 60))) for plan in ("4x1", "4x1:50,4x8:10")]
    ['4x1:60', '4x1:60,4x8:60']

    Raises:
        UserError: not a plan, or a budget the model was not trained for.
    """
    if ":" not in plan:
        return (Stage(check_budget(plan, groups), top),)
    *first, last = parse_cascade(plan, groups)
    kept = [Stage(stage.budget, max(stage.keep, top)) for stage in first]
    return (*kept, Stage(last.budget, top))


def measure(
    store: Store,
    encode: Callable[[Sequence[str]], Float[Tensor, "Q Rq D"]],
    go_on: Callable[[], None] = lambda: None,
) -> Calibration:
    """Calibrate with texts that items of a store have as queries; where few have one, without.

    Args:
        store: not empty.
        encode: gives texts' vectors, as queries of the store's model.
        go_on: see `calibrate`.

    Raises:
        UserError: the store is empty.
    """
    rows = spread(len(store), 4 * NUM_QUERIES).tolist()
    said = [metadata.get("asked_as") or metadata.get("text") for metadata in store.metadata(rows)]
    texts = [text for text in said if isinstance(text, str) and text.strip()][:NUM_QUERIES]
    if len(texts) < NUM_QUERIES // 2:
        return calibrate(store, go_on=go_on)
    return calibrate(store, encode(texts), "texts of its items", go_on)


def plan_name(plan: Sequence[Stage]) -> str:
    """A plan as a user would ask for it: a budget, or the stages of a cascade."""
    return str(plan[0].budget) if len(plan) == 1 else ",".join(map(str, plan))


def spread(count: int, at_most: int) -> Tensor:
    """Numbers below `count`, evenly spread, ascending.

    >>> spread(100, 3), spread(2, 3)
    (tensor([ 0, 49, 99]), tensor([0, 1]))
    """
    return torch.linspace(0, count - 1, min(count, at_most), dtype=torch.float64).long()


def _stored_queries(store: Store) -> Float[Tensor, "Q Rq D"]:
    vectors = store.vectors(spread(len(store), NUM_QUERIES).tolist())
    # A query of more vectors than a candidate has asks with some of them twice.
    return vectors[:, torch.arange(store.groups[-1].r_q) % vectors.shape[1]]
