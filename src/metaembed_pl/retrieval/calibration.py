"""The recall and cost of each plan, measured on the store itself.

Some queries are searched for with all vectors; a plan's recall is the share of their first ten that
it finds too. One pass over some rows gives, for every first stage that there is, the place of each
of these ten in its order, and so the recall of any number kept. In a sample of a tenth of the rows
a stage keeps a tenth of its items, which is harder, because the ten best then reach ten times as
far down the ranking. Plans that use an index are measured on all rows.

Queries for several things are harder than those for one, and texts of items ask for one thing each:
so two and three of them are joined to one query as well. A plan's recall is that of the kind of
query it does worst at.

Q: queries    Rq: their vectors    A: questions of a query    D: width    T: the first ten
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from metaembed_pl.budget import Budget, check_budget
from metaembed_pl.errors import UserError
from metaembed_pl.files import write_text
from metaembed_pl.late_interaction import narrowed
from metaembed_pl.retrieval.cascade import Stage, parse_cascade, run_stages
from metaembed_pl.retrieval.index import Index, IndexUnusable
from metaembed_pl.retrieval.planes import read
from metaembed_pl.retrieval.searchable import VectorSpace
from metaembed_pl.retrieval.snapshot import Matching, Snapshot
from metaembed_pl.retrieval.store import Store
from metaembed_pl.samples import evenly_spread

CALIBRATION_FILE, QUERIES_FILE = "calibration.json", "queries.jsonl"
TOP = 10
TARGET = 0.98
"""Recall that a search without a budget is to reach."""
NUM_QUERIES, LEAST_QUERIES, ASKED_AT_A_TIME = 32, 16, 8
LOGGED_QUERIES = 96
JOINED_LENGTH = 80
"""Characters of each text that is joined with others to one query."""
PRODUCTS_AT_MOST, PRODUCTS_WITH_INDEX = 2.5e11, 2e12
"""Multiplications that the exact search may take: some seconds on a core or two, or half a minute
where an index was built, which took minutes."""
SMALL, LARGE = 1e6, 1e12
"""Dot products of an exact search that takes some ten milliseconds, and multiplications of a
measurement that takes longer than a search may wait for."""
ROWS_AT_LEAST = 1000
CHANGED_AT_MOST = 0.1
"""Share of the items that may come or go before the plans are measured anew."""
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 1)
"""The cheapest plan is kept for each."""
KEPT = (50, 200, 1000, 4000, 16_000)
REACH = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
LISTS_AT_MOST = 0.25
"""Share of an index's lists above which a plan that reads them is not worth measuring."""
HITS = {True: (50, 100, 200, 400, 800, 1600), False: (25, 50, 100, 200, 400)}
"""Vectors for each question: for the sum of a query's vectors, and for each of them."""
TIMED = 3
BLOCK = 2**22
"""Products held at a time."""


class Measured(NamedTuple):
    """A plan, and what came of it.

    Args:
        plan: a budget, or the stages of a cascade.
        recall: share of the first ten of the exact search, over the queries of the hardest kind.
        error: standard error of it.
        products: dot products per query on the complete store; half the components count half,
            reading a code of the index 1.
        bytes_read: per query, on the complete store.
        milliseconds: a query by itself, on the rows that were searched.
    """

    plan: str
    recall: float
    error: float
    products: float
    bytes_read: float
    milliseconds: float


@dataclass(frozen=True)
class Calibration:
    """Plans for a store, cheapest first.

    Args:
        groups: of its model.
        data: folder of the store's data.
        num_rows: items ever added to it.
        num_deleted: of these.
        index: number of the index that was asked; None: there was none.
        used: which queries and rows were measured, in words.
        measured: each plan.
    """

    groups: tuple[str, ...]
    data: str
    num_rows: int
    num_deleted: int
    index: int | None
    used: str
    measured: tuple[Measured, ...]

    def fits(self, store: Store) -> bool:
        """Whether it still tells what the store needs: little has changed, no index was made."""
        now = store.description
        if now.data != self.data:
            return False
        changed = now.num_rows - self.num_rows + now.num_deleted - self.num_deleted
        try:
            index = store.index()
        except IndexUnusable:
            index = None
        same = index is None or index.manifest.number == self.index
        grown = index is not None and self.index is not None
        return (same or grown) and changed <= CHANGED_AT_MOST * self.num_rows

    def best(self, target_recall: float, with_index: bool = True) -> Measured:
        """The cheapest plan that finds at least so many of the first ten.

        Its recall less its standard error must reach the target: of many plans that are measured
        with few queries, the cheapest that seems to reach it is often one that was lucky.

        Raises:
            UserError: the target is not a share.
        """
        if not 0 < target_recall <= 1:
            raise UserError(f"a target recall must be above 0 and at most 1, got {target_recall}")
        exact = self.groups[-1]
        return next(
            row
            for row in self.measured
            if (row.recall - row.error >= target_recall or row.plan == exact)
            and (with_index or "@" not in row.plan)
        )

    def save(self, store: Store) -> None:
        """Keep it beside the store's manifest."""
        write_text(store.folder / CALIBRATION_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, store: Store) -> "Calibration | None":
        """That of a store, where it was kept and still fits."""
        try:
            value = json.loads(Path(store.folder / CALIBRATION_FILE).read_text())
            measured = tuple(Measured(*row) for row in value.pop("measured"))
            groups = tuple(value.pop("groups"))
            found = cls(**value, groups=groups, measured=measured)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return (
            found if found.groups == tuple(map(str, store.groups)) and found.fits(store) else None
        )


class Choice(NamedTuple):
    """What a search without a budget does, and why, in words."""

    stages: tuple[Stage, ...]
    note: str


def choose(
    store: Store, calibration: Calibration | None, target_recall: float = TARGET, top: int = TOP
) -> Choice:
    """The cheapest plan known to reach a recall on a store; the exact one where none is known.

    Args:
        store: to be searched.
        calibration: of it; None: it was not measured.
        target_recall: of the first ten of the exact search.
        top: results.
    """
    exact = stages_of(str(store.groups[-1]), store.description, top)
    if _is_small(store):
        return Choice(exact, "exact: the store is small")
    if calibration is None:
        return Choice(
            exact,
            "exact: plans have not been measured on the current store; "
            f"`index --store {store.folder}` measures them",
        )
    try:
        with_index, why = store.index() is not None, ""
    except IndexUnusable as error:
        with_index, why = False, f"; the index is not used: {error}"
    row = calibration.best(target_recall, with_index)
    if row.plan == str(store.groups[-1]):
        note = f"exact: no cheaper plan reached recall {target_recall:g}, by {calibration.used}"
    else:
        note = f"recall {row.recall:.3f} +- {row.error:.3f}, measured with {calibration.used}"
    return Choice(stages_of(row.plan, store.description, top), note + why)


def has_index(store: Store) -> bool:
    """Whether a store has an index that can be used."""
    try:
        return store.index() is not None
    except IndexUnusable:
        return False


def needs_measuring(store: Store) -> bool:
    """Whether a store that was not measured is to be measured before it is searched.

    A small one is not, and one so large that this takes minutes is not either.
    """
    if _is_small(store):
        return False
    try:
        if store.index() is None:
            return True
    except IndexUnusable:
        return True
    last = store.groups[-1]
    return 3 * NUM_QUERIES * len(store) * last.r_q * last.r_c * store.width <= LARGE


def _is_small(store: Store) -> bool:
    return len(store) * store.groups[-1].r_q * store.groups[-1].r_c <= SMALL


class Kinds(NamedTuple):
    """Queries to measure with.

    Args:
        vectors: by kind, as the store accepted them.
        said: what they are, in words.
    """

    vectors: list[Float[Tensor, "_ Rq D"]]
    said: str


def calibrate(
    store: Store,
    queries: Float[Tensor, "Q Rq D"] | None = None,
    asked_by: str = "queries",
    go_on: Callable[[], None] = lambda: None,
) -> Calibration:
    """Measure plans on a store.

    Args:
        store: not empty.
        queries: such as will be asked, of the store's model, some dozens; None: stored items ask,
            with their own vectors.
        asked_by: what the queries are, in words.
        go_on: called every second or so; what it raises ends the measurement.

    Raises:
        UserError: the store is empty.
    """
    _check_filled(store)
    if queries is None:
        queries, asked_by = _stored_queries(store), "stored items, by their own vectors"
    else:
        queries = store.accept(queries)
    return calibrate_kinds(store, Kinds([queries], f"{len(queries)} {asked_by}"), go_on)


def measure(
    store: Store,
    encode: Callable[[Sequence[str]], Float[Tensor, "Q Rq D"]],
    go_on: Callable[[], None] = lambda: None,
) -> Calibration:
    """Measure plans with what users asked, where `serve --log-queries` kept it.

    Else with texts that items have, alone and joined; where few have one, with stored items.

    Args:
        store: not empty.
        encode: gives texts' vectors, as queries of the store's model.
        go_on: see `calibrate`.

    Raises:
        UserError: the store is empty.
    """
    _check_filled(store)
    logged = logged_queries(store)
    if len(logged) >= LEAST_QUERIES:
        return calibrate(store, encode(logged), "queries that were logged", go_on)
    rows = evenly_spread(len(store), 4 * NUM_QUERIES)
    said = [metadata.get("asked_as") or metadata.get("text") for metadata in store.metadata(rows)]
    texts = [text for text in said if isinstance(text, str) and text.strip()]
    texts = list(dict.fromkeys(texts))[:NUM_QUERIES]
    if len(texts) < LEAST_QUERIES:
        return calibrate(store, go_on=go_on)
    queries = [store.accept(encode(some)) for some in (texts, *joined(texts))]
    said = f"{len(texts)} texts of its items, alone and joined by two and by three"
    return calibrate_kinds(store, Kinds(queries, said), go_on)


def joined(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Queries for two things and for three, made of texts that ask for one each.

    >>> joined(["cat", "dog", "owl"])
    (['cat and owl', 'dog and cat', 'owl and dog'],
     ['cat, owl and dog', 'dog, cat and owl', 'owl, dog and cat'])
    """
    short = [text[:JOINED_LENGTH] for text in texts]
    step = 7 if len(short) > 14 else max(1, len(short) // 3)  # a text is not joined with itself
    others = [short[-step * shift :] + short[: -step * shift] for shift in (1, 2)]
    two = [f"{one} and {other}" for one, other in zip(short, others[0], strict=True)]
    three = [f"{one}, {a} and {b}" for one, a, b in zip(short, *others, strict=True)]
    return two, three


def logged_queries(store: Store) -> list[str]:
    """The last distinct text queries, if `serve --log-queries` kept them."""
    try:
        lines = (store.folder / QUERIES_FILE).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return []
    texts = []
    for line in lines[-10 * LOGGED_QUERIES :]:
        try:
            text = json.loads(line)["text"]
        except (ValueError, KeyError, TypeError):
            continue
        if isinstance(text, str) and text.strip():
            texts.append(text)
    return list(dict.fromkeys(reversed(texts)))[:LOGGED_QUERIES]


def calibrate_kinds(
    store: Store, kinds: Kinds, go_on: Callable[[], None] = lambda: None
) -> Calibration:
    """Measure plans with queries of several kinds; see `calibrate`."""
    snapshot, last = store.snapshot(), store.groups[-1]
    queries = torch.cat(kinds.vectors)
    a_row = len(queries) * last.r_q * last.r_c * store.width
    try:
        index = store.index()
    except IndexUnusable:
        index = None
    # With an index, plans that score every item are what is left if it is lost: a smaller sample.
    products = PRODUCTS_AT_MOST if index is None else PRODUCTS_AT_MOST / 4
    rows = evenly_spread(len(store), max(ROWS_AT_LEAST, int(products / a_row)))
    sample = Matching(snapshot.places[rows], snapshot.manifest.num_rows)
    sizes = [len(some) for some in kinds.vectors]
    plans = _scans(store, queries, sample, sizes, go_on)
    if index is not None:
        every_nth = math.ceil(a_row * len(store) / PRODUCTS_WITH_INDEX)
        asked = [some[::every_nth] for some in kinds.vectors]
        plans += _index_plans(store, index, asked, go_on)
    share = len(rows) / len(store)
    measured = []
    for plan in _worth_it(plans, store):
        go_on()
        on_all = plan.stages[0].reach is not None
        stages = plan.stages if on_all else _scaled(plan.stages, share)
        matching = snapshot.every if on_all else sample
        seconds = min(
            run_stages(snapshot, queries[:1], stages, matching, index).seconds for _ in range(TIMED)
        )
        cost = plan.products, plan.bytes_read
        name = plan_name(plan.stages)
        measured.append(Measured(name, plan.recall, plan.error, *cost, 1000 * seconds))
    on = f"on {len(rows):,} of {len(store):,} items"
    if index is not None:
        on += " (plans that ask the index: on all)"
    return Calibration(
        tuple(map(str, store.groups)),
        snapshot.manifest.data,
        snapshot.manifest.num_rows,
        snapshot.manifest.num_deleted,
        None if index is None else index.manifest.number,
        f"{kinds.said}, {on}",
        tuple(measured),
    )


class _Plan(NamedTuple):
    stages: tuple[Stage, ...]
    recall: float
    error: float
    products: float
    bytes_read: float


def _scans(
    store: Store,
    queries: Float[Tensor, "Q Rq D"],
    sample: Matching,
    sizes: Sequence[int],
    go_on: Callable[[], None],
) -> list[_Plan]:
    """Plans that score every item in their first stage."""
    snapshot, last = store.snapshot(), store.groups[-1]
    exact = _exact(snapshot, queries, Stage(last, TOP), sample, go_on)
    ranks = _ranks(store, queries, sample.places, exact, go_on)
    share = len(sample.places) / len(store)
    found = []

    def add(*stages: Stage) -> None:
        # What is among the best of all is among the best of those that an earlier stage leaves.
        survives = torch.ones(exact.shape, dtype=torch.bool)
        for stage, scaled in zip(stages, _scaled(stages, share), strict=True):
            survives &= ranks[stage._replace(keep=0)] < scaled.keep
        recall = _hardest(survives, sizes)
        found.append(_Plan(stages, *recall, *costs(stages, store)))

    end = Stage(last, TOP)
    price = {stage: _price(stage, store) for stage in (end, *ranks)}
    for first in ranks:
        if not first.pooled:
            add(first._replace(keep=TOP))
        for keep in KEPT if price[first] < price[end] else ():
            if keep >= len(store):
                break
            begun = first._replace(keep=keep)
            add(begun, end)
            for between in ranks if keep >= 10 * KEPT[0] else ():
                is_whole = between.budget.width is None
                if is_whole and price[first] < price[between] < price[end]:
                    add(begun, between._replace(keep=keep // 10), end)
    return found


def _index_plans(
    store: Store,
    index: Index,
    kinds: Sequence[Float[Tensor, "_ Rq D"]],
    go_on: Callable[[], None],
) -> list[_Plan]:
    """Plans that ask an index: how far down its answers the ten best stand."""
    snapshot, end = store.snapshot(), Stage(store.groups[-1], TOP)
    queries, sizes = torch.cat([*kinds]), [len(some) for some in kinds]
    exact = _exact(snapshot, queries, end, snapshot.every, go_on).numpy()
    allowed = snapshot.every.allowed(index.num_rows, index.num_slots)
    in_any_case = torch.from_numpy(exact >= index.num_rows)
    found = []
    for pooled, hits in HITS.items():
        for reach in REACH:
            go_on()
            stage = Stage(store.groups[-1], hits[-1], pooled, reach)
            asked = stage.asked(queries).float().cpu().numpy()
            lists, products = index.lists_of(asked, reach)
            num_read = (lists >= 0).sum() / len(queries)
            if num_read > LISTS_AT_MOST * index.num_lists * asked.shape[1]:
                break
            ids = index.nearest(asked, lists, products, hits[-1], allowed)
            items = np.where(ids < 0, -1, ids // index.num_slots)
            depth = torch.from_numpy(_depth(items, exact))
            for some in hits:
                recall = _hardest((depth < some) | in_any_case, sizes)
                rescored = float(np.mean([len(np.unique(one[:, :some])) for one in items]))
                stages = stage._replace(keep=some), end
                asks = index, num_read, rescored
                found.append(_Plan(stages, *recall, *costs(stages, store, asks)))
    return found


def _depth(items: Integer[np.ndarray, "Q A K"], wanted: Integer[np.ndarray, "Q T"]) -> np.ndarray:
    """Where in the best of its query's answers an item first stands; beyond them if nowhere."""
    depth = np.full(wanted.shape, items.shape[2])
    for query, item in np.ndindex(*wanted.shape):
        places = np.nonzero(items[query] == wanted[query, item])[1]
        if len(places):
            depth[query, item] = places.min()
    return depth


def _exact(
    snapshot: Snapshot,
    queries: Float[Tensor, "Q Rq D"],
    stage: Stage,
    matching: Matching,
    go_on: Callable[[], None],
) -> Integer[Tensor, "Q T"]:
    """Places of the ten best."""
    found = []
    for some in queries.split(ASKED_AT_A_TIME):
        go_on()
        found.append(run_stages(snapshot, some, [stage], matching).places)
    return torch.cat(found).cpu()


def _ranks(
    store: Store,
    queries: Float[Tensor, "Q Rq D"],
    places: Integer[Tensor, " N"],
    exact: Integer[Tensor, "Q T"],
    go_on: Callable[[], None],
) -> dict[Stage, Integer[Tensor, "Q T"]]:
    """How many of some items each first stage puts before each of the ten best.

    One product of all vectors, for each width, serves every stage: the maximum runs over the
    candidate's vectors and the sum over the query's, and stops at each trained count.
    """
    planes, groups = store.snapshot().planes, store.groups
    last = groups[-1].r_c
    columns: dict[int | None, Tensor] = {}
    for width in (None, *store.widths):
        asked = narrowed(queries, width).float()
        columns[width] = torch.cat([asked, asked.sum(dim=1, keepdim=True)], dim=1)

    def first_scores(places: Integer[Tensor, " n"]) -> dict[Stage, Float[Tensor, "n Q"]]:
        vectors, found = read(planes, last, places), {}
        for width, asked in columns.items():
            found |= _first_scores(narrowed(vectors, width), asked, groups, width)
        return found

    own = first_scores(exact.flatten())
    pick = torch.arange(len(queries)).repeat_interleave(exact.shape[1])
    rows = torch.arange(len(pick))
    limits = {
        # The same product may come out a little different among others.
        first: (scores[rows, pick] + 1e-5).view(exact.shape)
        for first, scores in own.items()
    }
    before = {first: torch.zeros(exact.shape, dtype=torch.long) for first in limits}
    step = max(1, BLOCK // (len(queries) * (queries.shape[1] + 1) * last))
    last_report = time.perf_counter()
    for some in places.split(step):
        for first, scores in first_scores(some).items():
            before[first] += (scores.unsqueeze(2) > limits[first].to(scores)).sum(dim=0).cpu()
        if time.perf_counter() - last_report > 1:
            go_on()
            last_report = time.perf_counter()
    return before


def _first_scores(
    vectors: Float[Tensor, "n R W"],
    columns: Float[Tensor, "Q _ W"],
    groups: Sequence[Budget],
    width: int | None,
) -> dict[Stage, Float[Tensor, "n Q"]]:
    """Scores of every first stage that there is at a width."""
    num_queries, num_columns, _ = columns.shape
    r_q = num_columns - 1
    vectors = vectors.to(columns.device)
    products = vectors.flatten(0, 1) @ columns.flatten(0, 1).T
    products = products.view(len(vectors), -1, num_queries, num_columns)
    found: dict[Stage, Tensor] = {}
    best, done = products[:, 0], 1
    for r_c in sorted({group.r_c for group in groups}):
        if r_c > done:
            best, done = torch.maximum(best, products[:, done:r_c].amax(dim=1)), r_c
        sums = best[:, :, :r_q].cumsum(dim=2)
        for some in sorted({group.r_q for group in groups}):
            found[Stage(Budget(some, r_c, width), 0)] = sums[:, :, some - 1]
        if r_c > 1:
            found[Stage(Budget(r_q, r_c, width), 0, pooled=True)] = best[:, :, r_q]
    return found


def _hardest(survives: Tensor, sizes: Sequence[int]) -> tuple[float, float]:
    """Recall of the kind of query that does worst, and its standard error."""
    found = []
    for some in survives.double().mean(dim=1).split(list(sizes)):
        error = some.std().item() / math.sqrt(len(some)) if len(some) > 1 else 0.0
        found.append((some.mean().item(), error))
    return min(found, key=lambda one: one[0] - one[1])


def _worth_it(plans: Sequence[_Plan], store: Store) -> list[_Plan]:
    """The trained groups, and for some targets the cheapest plans, cheapest first.

    Once with those that ask the index and once without: it may be lost.
    """
    plans = sorted(plans, key=lambda plan: (plan.products, plan.bytes_read))
    single = Budget(store.groups[-1].r_q, store.groups[0].r_c)
    names = {str(group) for group in (*store.groups, single)}
    chosen = {plan.stages for plan in plans if plan_name(plan.stages) in names}
    for some in (plans, [plan for plan in plans if plan.stages[0].reach is None]):
        for target in TARGETS:
            reach = (plan.stages for plan in some if plan.recall - plan.error >= target)
            chosen.update(itertools.islice(reach, 1))
    return [plan for plan in plans if plan.stages in chosen]


def costs(
    plan: Sequence[Stage], store: Store, asks: tuple[Index, float, float] | None = None
) -> tuple[float, float]:
    """The cost of a query on the complete store: dot products of full vectors, and bytes.

    Args:
        plan: its stages.
        store: that is searched.
        asks: where its first stage asks an index: that, the lists that a query reads of it, and the
            items that this leaves.
    """
    snapshot, products, bytes_read = store.snapshot(), 0.0, 0.0
    scored, stages = [len(store), *(stage.keep for stage in plan)], list(plan)
    if plan[0].reach is not None:
        assert asks is not None, "its cost depends on the index"
        index, num_read, left = asks
        questions = 1 if plan[0].pooled else plan[0].budget.r_q
        share = num_read / index.num_lists
        products = questions * index.num_lists + share * index.num_rows * index.num_slots
        bytes_read = share * index.size_bytes
        stages, scored = stages[1:], [left, *scored[2:]]
    for stage, num_items in zip(stages, scored, strict=False):
        products += num_items * _price(stage, store)
        bytes_read += num_items * snapshot.item_bytes(stage.budget)
    return products, bytes_read


def _price(stage: Stage, store: Store) -> float:
    """Dot products of full vectors for an item that is scored."""
    return stage.products * (stage.budget.width or store.width) / store.width


def _scaled(stages: Sequence[Stage], share: float) -> list[Stage]:
    """The same for a share of the items."""
    return [stage._replace(keep=max(TOP, math.ceil(share * stage.keep))) for stage in stages]


def stages_of(plan: str, space: VectorSpace, top: int) -> tuple[Stage, ...]:
    """The stages of a plan that was named, each keeping at least `top`, the last just that.

    >>> space = VectorSpace("some model", (Budget(1, 1), Budget(4, 8)), width=128)
    >>> [",".join(map(str, stages_of(plan, space, 60))) for plan in ("4x1", "4x1:50,4x8:10")]
    ['4x1:60', '4x1:60,4x8:60']

    Raises:
        UserError: not a plan, or a budget the model was not trained for.
    """
    if ":" not in plan:
        return (Stage(check_budget(plan, space.groups, space.widths), top),)
    *first, last = parse_cascade(plan, space.groups, space.widths)
    return (*(_for_top(stage, top) for stage in first), last._replace(keep=top))


def _for_top(stage: Stage, top: int) -> Stage:
    if stage.reach is None:
        return stage._replace(keep=max(stage.keep, top))
    # It was measured for ten: for more results it looks as much farther.
    return stage._replace(keep=math.ceil(stage.keep * max(1, top / TOP)))


def plan_name(plan: Sequence[Stage]) -> str:
    """A plan as a user would ask for it: a budget, or the stages of a cascade."""
    return str(plan[0].budget) if len(plan) == 1 else ",".join(map(str, plan))


def _check_filled(store: Store) -> None:
    if not len(store):
        raise UserError(f"{store.folder} is empty: no items to measure plans on")


def _stored_queries(store: Store) -> Float[Tensor, "Q Rq D"]:
    vectors = store.vectors(evenly_spread(len(store), NUM_QUERIES))
    # A query of more vectors than a candidate has asks with some of them twice.
    return vectors[:, torch.arange(store.groups[-1].r_q) % vectors.shape[1]]
