"""The recall and cost of each search plan, measured on the store itself.

Some queries are searched with all vectors; the recall of a plan is the share of their ten best
results that it finds as well. For plans that score every item, one pass over a sample of the rows
ranks these ten under every possible first stage, which gives the recall for any number of items
kept. In a sample of a tenth of the rows, a stage keeps a tenth of its items; that is harder, since
the ten best then reach ten times as far down the ranking. Plans that use an index are measured on
all rows.

Queries for several things are harder than queries for one thing, and texts of items ask for one:
so texts are joined by two and by three as well. The recall of a plan is that of the kind of query
it does worst at.

Q: queries    Rq: their vectors    A: questions of a query    D: width    T: the ten best
"""

import itertools
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from metaembed_pl.budget import Budget, check_budget
from metaembed_pl.errors import UserError
from metaembed_pl.files import write_text
from metaembed_pl.late_interaction import narrowed
from metaembed_pl.retrieval.cascade import Stage, parse_cascade, run_stages
from metaembed_pl.retrieval.index import Index, IndexUnusable
from metaembed_pl.retrieval.planes import read
from metaembed_pl.retrieval.searchable import VectorSpace
from metaembed_pl.retrieval.snapshot import Matching
from metaembed_pl.retrieval.store import Store
from metaembed_pl.samples import evenly_spread

CALIBRATION_FILE, QUERIES_FILE = "calibration.json", "queries.jsonl"
TOP = 10
TARGET = 0.98
"""Recall that a search without a budget should reach."""
NUM_QUERIES, LEAST_QUERIES, QUERIES_AT_A_TIME = 32, 16, 8
LOGGED_QUERIES = 96
JOINED_LENGTH = 80
"""Characters of a text that is joined with others."""
PRODUCTS_AT_MOST, PRODUCTS_WITH_INDEX = 2.5e11, 2e12
"""Multiplications of the exact search: some seconds on a core or two, or half a minute with an
index, which took minutes to build."""
SMALL, LARGE = 1e6, 1e12
"""Dot products of an exact search that takes some ten milliseconds; multiplications of a
measurement that takes too long to start it before a search."""
ROWS_AT_LEAST = 1000
CHANGED_AT_MOST = 0.1
"""Share of the items that may come or go before plans are measured again."""
TARGETS = (0.5, 0.8, 0.9, 0.95, 0.97, 0.98, 0.99, 0.995, 1)
"""The cheapest plan for each is saved."""
KEEPS = (50, 200, 1000, 4000, 16_000)
REACH = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3, 0.25, 0.2)
LISTS_AT_MOST = 0.25
"""Share of an index's lists; plans that read more are not measured."""
HITS = {True: (50, 100, 200, 400, 800, 1600), False: (25, 50, 100, 200, 400)}
"""Vectors for each question: for the sum of a query's vectors, and for each of them."""
TIMED = 3
BLOCK = 2**22
"""Products held at a time."""


Stages = tuple[Stage, ...]


class Measured(NamedTuple):
    """A search plan with its recall and cost.

    Args:
        plan: a budget, or the stages of a cascade.
        recall: share of the exact search's ten best, for the hardest kind of query.
        error: standard error of the recall.
        products: dot products per query on the complete store; a product of half the components
            counts half, a code of the index 1.
        bytes_read: per query, on the complete store.
        milliseconds: for one query, on the rows that were searched.
    """

    plan: str
    recall: float
    error: float
    products: float
    bytes_read: float
    milliseconds: float = 0.0


@dataclass(frozen=True)
class Calibration:
    """Search plans for a store, cheapest first.

    Args:
        groups: of the store's model.
        data: folder of the store's data.
        num_rows: items ever added to the store.
        num_deleted: how many of them were deleted.
        index: number of the index that was used; None: there was none.
        used: the queries and rows that were used, in words.
        measured: the plans.
    """

    groups: tuple[str, ...]
    data: str
    num_rows: int
    num_deleted: int
    index: int | None
    used: str
    measured: tuple[Measured, ...]

    def fits(self, store: Store) -> bool:
        """Whether it is still valid: few items came or went, and the store got no first index."""
        now = store.description
        changed = now.num_rows - self.num_rows + now.num_deleted - self.num_deleted
        is_same = now.data == self.data and changed <= CHANGED_AT_MOST * self.num_rows
        return is_same and (self.index is not None or usable_index(store) is None)

    def best(self, target_recall: float, with_index: bool = True) -> Measured:
        """The cheapest plan whose recall reaches a target.

        The recall less its standard error must reach it: among many plans that are measured with
        few queries, the cheapest that seems to reach the target was often lucky.

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
        """Save it beside the store's manifest."""
        write_text(store.folder / CALIBRATION_FILE, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, store: Store) -> "Calibration | None":
        """The saved calibration of a store; None: there is none, or it is no longer valid."""
        try:
            value = json.loads((store.folder / CALIBRATION_FILE).read_text())
            measured = tuple(Measured(*row) for row in value["measured"])
            found = cls(**{**value, "groups": tuple(value["groups"]), "measured": measured})
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        is_of_model = found.groups == tuple(map(str, store.groups))
        return found if is_of_model and found.fits(store) else None


class Choice(NamedTuple):
    """The stages of a search without a budget, and the reason in words."""

    stages: Stages
    note: str


def choose(
    store: Store, calibration: Calibration | None, target_recall: float = TARGET, top: int = TOP
) -> Choice:
    """The cheapest plan known to reach a recall on a store; the exact search if none is known.

    Args:
        store: to be searched.
        calibration: of this store; None: it was not measured.
        target_recall: share of the exact search's ten best.
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


def usable_index(store: Store) -> Index | None:
    """The index of a store, unless it has none or an unusable one."""
    try:
        return store.index()
    except IndexUnusable:
        return None


def needs_measuring(store: Store) -> bool:
    """Whether to measure an unmeasured store before it is searched.

    Not if it is small, or has an index and is so large that measuring takes minutes.
    """
    if _is_small(store):
        return False
    if usable_index(store) is None:
        return True
    last = store.groups[-1]
    return 3 * NUM_QUERIES * len(store) * last.r_q * last.r_c * store.width <= LARGE


def _is_small(store: Store) -> bool:
    return len(store) * store.groups[-1].r_q * store.groups[-1].r_c <= SMALL


def calibrate(
    store: Store,
    queries: Float[Tensor, "Q Rq D"] | Sequence[Float[Tensor, "_ Rq D"]] | None = None,
    described_as: str = "queries",
    go_on: Callable[[], None] = lambda: None,
) -> Calibration:
    """Measure search plans on a store.

    Args:
        store: not empty.
        queries: some dozens, such as users will ask, encoded by the store's model; or several such
            tensors, one for each kind of query. None: vectors of stored items.
        described_as: the queries in words, for reports.
        go_on: called about every second; an exception that it raises ends the measurement.

    Raises:
        UserError: the store is empty.
    """
    if not len(store):
        raise UserError(f"{store.folder} is empty: no items to measure plans on")
    if queries is None:
        kinds, described_as = [_stored_queries(store)], "stored items, by their own vectors"
    else:
        kinds = [queries] if isinstance(queries, Tensor) else queries
        kinds = [store.accept(some) for some in kinds]
    trial, index, snapshot = _Trial(store, kinds, go_on), usable_index(store), store.snapshot()
    last = store.groups[-1]
    a_row = len(trial.queries) * last.r_q * last.r_c * store.width
    # With an index, plans that score every item serve only if it is lost: a smaller sample.
    products = PRODUCTS_AT_MOST if index is None else PRODUCTS_AT_MOST / 4
    rows = evenly_spread(len(store), max(ROWS_AT_LEAST, int(products / a_row)))
    sample = Matching(snapshot.places[rows], snapshot.manifest.num_rows)
    plans = trial.scans(sample)
    if index is not None:
        every_nth = math.ceil(a_row * len(store) / PRODUCTS_WITH_INDEX)
        fewer = _Trial(store, [some[::every_nth] for some in kinds], go_on)
        plans |= fewer.index_plans(index)
    measured = []
    for stages, row in _worth_it(plans, store).items():
        go_on()
        matching = snapshot.every
        if stages[0].reach is None:
            stages, matching = _scaled(stages, len(rows) / len(store)), sample
        query = trial.queries[:1]
        runs = [run_stages(snapshot, query, stages, matching, index) for _ in range(TIMED)]
        seconds = min(run.seconds for run in runs)
        measured.append(row._replace(milliseconds=1000 * seconds))
    used = f"{len(kinds[0])} {described_as}, on {len(rows):,} of {len(store):,} items"
    return Calibration(
        tuple(map(str, store.groups)),
        snapshot.manifest.data,
        snapshot.manifest.num_rows,
        snapshot.manifest.num_deleted,
        None if index is None else index.manifest.number,
        used if index is None else f"{used} (plans that ask the index: on all)",
        tuple(measured),
    )


def measure(
    store: Store,
    encode: Callable[[Sequence[str]], Float[Tensor, "Q Rq D"]],
    go_on: Callable[[], None] = lambda: None,
) -> Calibration:
    """Measure search plans with the queries that `serve --log-queries` saved.

    If there are few, with texts of the items, alone and joined; if few items have one, with the
    vectors of items.

    Args:
        store: not empty.
        encode: encodes texts as queries, with the store's model.
        go_on: see `calibrate`.

    Raises:
        UserError: the store is empty.
    """
    logged = logged_queries(store)
    if len(logged) >= LEAST_QUERIES:
        return calibrate(store, encode(logged), "queries that were logged", go_on)
    rows = evenly_spread(len(store), 4 * NUM_QUERIES)
    queries = [
        metadata.get("asked_as") or metadata.get("text") for metadata in store.metadata(rows)
    ]
    texts = [text for text in queries if isinstance(text, str) and text.strip()]
    texts = list(dict.fromkeys(texts))[:NUM_QUERIES]
    if len(texts) < LEAST_QUERIES:
        return calibrate(store, go_on=go_on)
    kinds = [encode(some) for some in (texts, *joined(texts))]
    described_as = "texts of its items, alone and joined by two and by three"
    return calibrate(store, kinds, described_as, go_on)


def joined(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Queries for two things and for three, made of texts that ask for one thing each.

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
    """The last distinct text queries, if `serve --log-queries` logged them."""
    try:
        # Not splitlines: it also splits at characters within a text.
        lines = (store.folder / QUERIES_FILE).read_text(encoding="utf-8").split("\n")
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


class _Trial:
    """Measures plans with queries of several kinds."""

    def __init__(
        self, store: Store, kinds: Sequence[Float[Tensor, "_ Rq D"]], go_on: Callable[[], None]
    ):
        self.store, self.snapshot, self.go_on = store, store.snapshot(), go_on
        self.queries, self.sizes = torch.cat([*kinds]), [len(some) for some in kinds]
        self.end = Stage(store.groups[-1], TOP)

    def scans(self, sample: Matching) -> dict[Stages, Measured]:
        """Plans that score every item in their first stage."""
        exact = self._exact(sample)
        ranks = self._ranks(sample.places, exact)
        share = len(sample.places) / len(self.store)
        found: dict[Stages, Measured] = {}

        def add(*stages: Stage) -> None:
            # What is among the best of all is among the best of those that an earlier stage leaves.
            survives = torch.ones(exact.shape, dtype=torch.bool)
            for stage, scaled in zip(stages, _scaled(stages, share), strict=True):
                survives &= ranks[stage._replace(keep=0)] < scaled.keep
            found[stages] = self._measured(stages, survives)

        end = self.end
        price = {stage: _price(stage, self.store) for stage in (end, *ranks)}
        for first in ranks:
            if not first.pooled:
                add(first._replace(keep=TOP))
            for keep in KEEPS if price[first] < price[end] else ():
                if keep >= len(self.store):
                    break
                begun = first._replace(keep=keep)
                add(begun, end)
                for between in ranks if keep >= 10 * KEEPS[0] else ():
                    has_all_components = between.budget.width is None
                    if has_all_components and price[first] < price[between] < price[end]:
                        add(begun, between._replace(keep=keep // 10), end)
        return found

    def index_plans(self, index: Index) -> dict[Stages, Measured]:
        """Plans whose first stage asks an index."""
        every = self.snapshot.every
        exact = self._exact(every).numpy()
        allowed = every.allowed(index.num_rows, index.num_slots)
        is_not_indexed = torch.from_numpy(exact >= index.num_rows)
        found: dict[Stages, Measured] = {}
        for pooled, hits in HITS.items():
            for reach in REACH:
                self.go_on()
                stage = Stage(self.store.groups[-1], hits[-1], pooled, reach)
                questions = stage.query_vectors(self.queries).float().cpu().numpy()
                lists, products = index.lists_of(questions, reach)
                num_read = (lists >= 0).sum() / len(self.queries)
                if num_read > LISTS_AT_MOST * index.num_lists * questions.shape[1]:
                    break
                ids = index.nearest(questions, lists, products, hits[-1], allowed)
                items = np.where(ids < 0, -1, ids // index.num_slots)
                depth = torch.from_numpy(_depth(items, exact))
                for keep in hits:
                    rescored = float(np.mean([len(np.unique(one[:, :keep])) for one in items]))
                    stages = stage._replace(keep=keep), self.end
                    survives = (depth < keep) | is_not_indexed
                    found[stages] = self._measured(stages, survives, (index, num_read, rescored))
        return found

    def _exact(self, matching: Matching) -> Integer[Tensor, "Q T"]:
        """Places of the ten best."""
        found = []
        for some in self.queries.split(QUERIES_AT_A_TIME):
            self.go_on()
            found.append(run_stages(self.snapshot, some, [self.end], matching).places)
        return torch.cat(found).cpu()

    def _measured(
        self,
        stages: Stages,
        survives: Bool[Tensor, "Q T"],
        asks: tuple[Index, float, float] | None = None,
    ) -> Measured:
        """A plan, with the recall of the kind of query that it does worst at."""
        found = []
        for some in survives.double().mean(dim=1).split(self.sizes):
            error = some.std().item() / math.sqrt(len(some)) if len(some) > 1 else 0.0
            found.append((some.mean().item(), error))
        recall, error = min(found, key=lambda one: one[0] - one[1])
        return Measured(plan_name(stages), recall, error, *costs(stages, self.store, asks))

    def _ranks(
        self, places: Integer[Tensor, " N"], exact: Integer[Tensor, "Q T"]
    ) -> dict[Stage, Integer[Tensor, "Q T"]]:
        """How many of some items each first stage ranks before each of the ten best.

        One product of all vectors, for each width, serves every stage: the maximum runs over the
        candidate's vectors and the sum over the query's, and stops at each trained count.
        """
        planes, groups, queries = self.snapshot.planes, self.store.groups, self.queries
        last = groups[-1].r_c
        columns: dict[int | None, Tensor] = {}
        for width in (None, *self.store.widths):
            narrow = narrowed(queries, width).float()
            columns[width] = torch.cat([narrow, narrow.sum(dim=1, keepdim=True)], dim=1)

        def first_scores(places: Integer[Tensor, " n"]) -> dict[Stage, Float[Tensor, "n Q"]]:
            vectors, found = read(planes, last, places), {}
            for width, of_width in columns.items():
                found |= _first_scores(narrowed(vectors, width), of_width, groups, width)
            return found

        pick = torch.arange(len(queries)).repeat_interleave(exact.shape[1])
        rows = torch.arange(len(pick))
        limits = {
            # The same product may come out a little different among others.
            first: (scores[rows, pick] + 1e-5).view(exact.shape)
            for first, scores in first_scores(exact.flatten()).items()
        }
        before = {first: torch.zeros(exact.shape, dtype=torch.long) for first in limits}
        step = max(1, BLOCK // (len(queries) * (queries.shape[1] + 1) * last))
        last_report = time.perf_counter()
        for some in places.split(step):
            for first, scores in first_scores(some).items():
                before[first] += (scores.unsqueeze(2) > limits[first].to(scores)).sum(dim=0).cpu()
            if time.perf_counter() - last_report > 1:
                self.go_on()
                last_report = time.perf_counter()
        return before


def _depth(
    items: Integer[np.ndarray, "Q A K"], wanted: Integer[np.ndarray, "Q T"]
) -> Integer[np.ndarray, "Q T"]:
    """The first rank of each wanted item in the best of its query's results; K: it is in none."""
    is_found = (items[:, None] == wanted[:, :, None, None]).any(axis=2)
    return np.where(is_found.any(axis=2), is_found.argmax(axis=2), items.shape[2])


def _first_scores(
    vectors: Float[Tensor, "n R W"],
    columns: Float[Tensor, "Q _ W"],
    groups: Sequence[Budget],
    width: int | None,
) -> dict[Stage, Float[Tensor, "n Q"]]:
    """Scores of every possible first stage at a width."""
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


def _worth_it(plans: dict[Stages, Measured], store: Store) -> dict[Stages, Measured]:
    """The trained groups, and the cheapest plan for each target; cheapest first.

    With and without plans that ask the index: it may be lost.
    """
    ordered = sorted(plans, key=lambda stages: plans[stages][3:5])
    single = Budget(store.groups[-1].r_q, store.groups[0].r_c)
    names = {str(group) for group in (*store.groups, single)}
    chosen = {stages for stages in ordered if plans[stages].plan in names}
    for some in (ordered, [stages for stages in ordered if stages[0].reach is None]):
        for target in TARGETS:
            reach = (it for it in some if plans[it].recall - plans[it].error >= target)
            chosen.update(itertools.islice(reach, 1))
    return {stages: plans[stages] for stages in ordered if stages in chosen}


def costs(
    plan: Sequence[Stage], store: Store, asks: tuple[Index, float, float] | None = None
) -> tuple[float, float]:
    """The cost of a query on the complete store: dot products of full vectors, and bytes.

    Args:
        plan: its stages.
        store: that is searched.
        asks: if the first stage asks an index: the index, how many of its lists a query reads, and
            how many items it finds.
    """
    snapshot, products, bytes_read = store.snapshot(), 0.0, 0.0
    scored, stages = [len(store), *(stage.keep for stage in plan)], list(plan)
    if plan[0].reach is not None:
        assert asks is not None, "the cost depends on the index"
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


def _scaled(stages: Sequence[Stage], share: float) -> Stages:
    """The same stages for a share of the items."""
    return tuple(stage._replace(keep=max(TOP, math.ceil(share * stage.keep))) for stage in stages)


def stages_of(plan: str, space: VectorSpace, top: int) -> Stages:
    """The stages of a named plan: each keeps at least `top` items, the last exactly so many.

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
    # It was measured for ten results: for more it looks proportionally farther.
    return stage._replace(keep=math.ceil(stage.keep * max(1, top / TOP)))


def plan_name(plan: Sequence[Stage]) -> str:
    """A plan as users write it: a budget, or the stages of a cascade."""
    return str(plan[0].budget) if len(plan) == 1 else ",".join(map(str, plan))


def _stored_queries(store: Store) -> Float[Tensor, "Q Rq D"]:
    vectors = store.vectors(evenly_spread(len(store), NUM_QUERIES))
    # A query of more vectors than a candidate has asks with some of them twice.
    return vectors[:, torch.arange(store.groups[-1].r_q) % vectors.shape[1]]
