"""The plan: the pairs of the global batch of any step t, computed from the seed alone.

Training makes repeated passes over a source; each pass uses every pair exactly once, in an order
drawn from (seed, source, pass). A batch holds pairs of one source. Which source a step belongs to
follows the mixing weights, evenly spaced; without weights, the sources' sizes and a temperature.
Nothing depends on the number of workers or ranks: the ranks share the candidates of a global batch,
equally many each, and resuming at step t means asking for step t.

A batch consists of candidates. Each comes with one question (a pair) or, where the source says
`questions`, with several of the pairs that share it.
"""

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from metaembed_pl.errors import UserError


@dataclass(frozen=True)
class PlannedSource:
    """A source of the plan.

    Args:
        name: of the source; with the seed, it determines the order of its pairs.
        shard_sizes: pairs in each of its shards.
        weight: share of the batches, relative to the other sources; None: by its size.
        first_step: the source joins at this step; before, the others share the batches.
        last_step: the source leaves at this step; None: it stays to the end.
        max_pairs: use only so many pairs: a sample drawn from the seed, the same in each pass.
        candidates: the number of each pair's candidate; needed for several questions.
        questions: a candidate comes with up to so many of its pairs at a time; None: with all.
    """

    name: str
    shard_sizes: tuple[int, ...]
    weight: float | None = None
    first_step: int = 0
    last_step: int | None = None
    max_pairs: int | None = None
    candidates: Int[np.ndarray, " N"] | None = field(default=None, compare=False)
    questions: int | None = 1

    @property
    def num_pairs(self) -> int:
        """Pairs in all its shards, but at most `max_pairs`."""
        found = sum(self.shard_sizes)
        return found if self.max_pairs is None else min(found, self.max_pairs)

    @property
    def groups(self) -> Int[np.ndarray, " N"] | None:
        """The candidate of each pair; None if each pair comes by itself."""
        return None if self.questions == 1 else self.candidates


@dataclass(frozen=True)
class PlannedBatch:
    """The pairs of one global batch, or of one rank's part of it.

    Args:
        step: its number in the run.
        source: an index into the sources.
        positions: the places of its pairs in the source; pairs of one candidate are consecutive.
        candidates: the candidate of each pair, counted from 0.
    """

    step: int
    source: int
    positions: Int[np.ndarray, " Q"]
    candidates: Int[np.ndarray, " Q"]

    @property
    def questions(self) -> list[Int[np.ndarray, " _"]]:
        """The positions, grouped by candidate."""
        return np.split(self.positions, np.flatnonzero(np.diff(self.candidates)) + 1)


CostsOf = Callable[[PlannedBatch], Sequence[float]]
"""The cost of encoding each candidate of a batch, with its questions and their hard negatives."""


def dealt(costs: Float[np.ndarray, " C"], num_ranks: int) -> Int[np.ndarray, "W c"]:
    """The candidates of each rank, equally many, with about equal costs.

    The most expensive are assigned first, each to the rank with the lowest cost that is not full.

    Args:
        costs: of the candidates.
        num_ranks: divides their number.

    >>> dealt(np.array([9.0, 1.0, 8.0, 2.0]), 2).tolist()
    [[0, 1], [2, 3]]
    """
    size = len(costs) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = np.zeros(num_ranks)
    for candidate in np.argsort(-costs, kind="stable").tolist():
        rank = int(loads.argmin())
        ranks[rank].append(candidate)
        loads[rank] += costs[candidate] if len(ranks[rank]) < size else np.inf
    return np.sort(np.array(ranks), axis=1)


class _Pass(NamedTuple):
    """One pass over a source.

    Args:
        positions: its pairs; those that come at the same time are consecutive.
        ends: the end of each candidate's questions in `positions`.
    """

    positions: Int[np.ndarray, " N"]
    ends: Int[np.ndarray, " C"]

    def __getitem__(self, places: slice) -> list[Int[np.ndarray, " _"]]:
        ends = self.ends[places]
        first = self.ends[places.start - 1] if places.start else 0
        return np.split(self.positions[first : ends[-1]], ends[:-1] - first) if len(ends) else []


class Plan:
    """The sequence of global batches.

    Args:
        sources: at least one, none empty; weights for all or for none.
        global_batch_size: candidates over all ranks, each with one or more questions; a source
            with fewer is refused, since a batch would contain one of them twice.
        seed: determines the order of pairs; the same on every machine.
        open_shards: pairs are shuffled within so many shards at a time, so that only a few files
            are read at a time, however large the source is.
        mixing_temperature: without weights, a source's weight is its number of pairs (or of
            candidates, if they come with several questions) to the power of one over this: 1 mixes
            by size, larger values give small sources more batches, infinity mixes all equally.
    """

    def __init__(
        self,
        sources: Sequence[PlannedSource],
        global_batch_size: int,
        seed: int = 0,
        open_shards: int = 16,
        mixing_temperature: float = 1.0,
    ):
        _check(sources, global_batch_size, mixing_temperature)
        self.sources = tuple(sources)
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.open_shards = open_shards
        self._sample = lru_cache(maxsize=None)(self._drawn)
        self._pass = lru_cache(maxsize=2 * len(sources))(self._shuffled)
        self._sizes = [self._num_candidates(number) for number in range(len(sources))]
        _check_sizes(sources, self._sizes, global_batch_size)
        weights = [
            size ** (1 / mixing_temperature) if s.weight is None else s.weight
            for s, size in zip(sources, self._sizes, strict=True)
        ]
        self._weights = np.array(weights, dtype=np.float64)
        self._first_steps = np.array([source.first_step for source in sources])
        self._last_steps = np.array(
            [np.inf if s.last_step is None else s.last_step for s in sources]
        )
        self._due = np.zeros(len(sources))  # batches each source should have had so far
        self._order = np.empty(0, dtype=np.int64)  # source of each step so far
        self._turns = np.zeros(len(sources), dtype=np.int64)
        self._rounds = np.empty(0, dtype=np.int64)  # batches its source had before each step

    @property
    def steps_per_epoch(self) -> int:
        """Steps for one pass over as many pairs as there are, rounded up."""
        return -(-sum(self._sizes) // self.global_batch_size)

    @property
    def questions_per_candidate(self) -> list[float]:
        """The mean number of questions per candidate, by source."""
        return [s.num_pairs / size for s, size in zip(self.sources, self._sizes, strict=True)]

    def batch(self, step: int) -> PlannedBatch:
        """The global batch of a step, counted from 0 over the entire run."""
        self._extend(step + 1)
        source, round_ = int(self._order[step]), int(self._rounds[step])
        size = self._sizes[source]
        # A batch may straddle two passes: cut it where the first one ends.
        start = round_ * self.global_batch_size
        parts: list[Int[np.ndarray, " _"]] = []
        while (missing := self.global_batch_size - len(parts)) > 0:
            turn, offset = divmod(start, size)
            found = self._pass(source, turn)[offset : offset + missing]
            parts += found
            start += len(found)
        candidates = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        return PlannedBatch(step, source, np.concatenate(parts), candidates)

    def rank_batch(
        self, step: int, rank: int, num_ranks: int, costs_of: CostsOf | None = None
    ) -> PlannedBatch:
        """This rank's part of the global batch of a step; every rank has equally many candidates.

        Args:
            step: of the plan.
            rank: counted from 0.
            num_ranks: ranks that share the global batch.
            costs_of: the cost of encoding each candidate with its questions, so that no rank waits
                long for another; must be the same on every rank. None: all cost the same.

        Raises:
            UserError: the global batch cannot be divided evenly.
        """
        if self.global_batch_size % num_ranks:
            raise UserError(
                f"global_batch_size {self.global_batch_size} cannot be divided evenly over "
                f"{num_ranks} ranks; choose a multiple of {num_ranks}"
            )
        batch = self.batch(step)
        if num_ranks == 1:
            return batch
        costs = np.array(costs_of(batch)) if costs_of else np.ones(self.global_batch_size)
        own = np.isin(batch.candidates, dealt(costs, num_ranks)[rank])
        candidates = np.unique(batch.candidates[own], return_inverse=True)[1]
        return PlannedBatch(step, batch.source, batch.positions[own], candidates)

    def _extend(self, num_steps: int) -> None:
        """Assign each further step to the source that lags furthest behind its share."""
        known = len(self._order)
        if num_steps <= known:
            return
        num_steps = max(num_steps, 2 * known, 1024)
        order, rounds = np.empty((2, num_steps), dtype=np.int64)
        order[:known], rounds[:known] = self._order, self._rounds
        for step in range(known, num_steps):
            present = (self._first_steps <= step) & (step < self._last_steps)
            weights = np.where(present, self._weights, 0.0)
            self._due += weights / weights.sum()
            source = int(np.argmax(np.where(present, self._due - self._turns, -np.inf)))
            order[step], rounds[step] = source, self._turns[source]
            self._turns[source] += 1
        self._order, self._rounds = order, rounds

    def _shuffled(self, source: int, turn: int) -> _Pass:
        """The order of one pass: shards are shuffled, then candidates within windows of shards."""
        random = self._random(source, turn)
        by_shard = self._sample(source)
        shards = random.permutation(len(by_shard))
        windows = []
        for first in range(0, len(shards), self.open_shards):
            pairs = [by_shard[shard] for shard in shards[first : first + self.open_shards]]
            windows.append(random.permutation(np.concatenate(pairs)))
        planned = self.sources[source]
        if planned.groups is None:
            positions = np.concatenate(windows)
            return _Pass(positions, np.arange(1, len(positions) + 1))
        grouped = [
            _grouped(window, planned.groups[window], planned.questions, random)
            for window in windows
        ]
        positions, counts = (np.concatenate(parts) for parts in zip(*grouped, strict=True))
        return _Pass(positions, np.cumsum(counts))

    def _num_candidates(self, source: int) -> int:
        """How often candidates come in one pass, all candidates together."""
        planned = self.sources[source]
        if planned.groups is None:
            return planned.num_pairs
        pairs = np.concatenate(self._sample(source))
        counts = np.unique(planned.groups[pairs], return_counts=True)[1]
        return int(_num_turns(counts, planned.questions).sum())

    def _drawn(self, source: int) -> list[Int[np.ndarray, " N"]]:
        """The pairs that are used, by shard, ascending; a candidate's pairs are with its first."""
        planned, groups = self.sources[source], self.sources[source].groups
        ends = np.cumsum(planned.shard_sizes)
        pairs = np.arange(ends[-1])
        if planned.num_pairs < len(pairs):
            random = self._random(source, 0, 1)  # no pass has this second number
            if groups is None:
                pairs = np.sort(random.choice(pairs, planned.num_pairs, replace=False))
            else:  # complete candidates, so that each keeps its questions
                first_come = random.permutation(groups.max() + 1)[groups]
                pairs = np.sort(np.argsort(first_come, kind="stable")[: planned.num_pairs])
        shards = np.searchsorted(ends, pairs, side="right")
        if groups is not None:
            _, first, group = np.unique(groups[pairs], return_index=True, return_inverse=True)
            shards = shards[first[group]]
        order = np.argsort(shards, kind="stable")
        return np.split(pairs[order], np.searchsorted(shards[order], np.arange(1, len(ends))))

    def _random(self, source: int, *turn: int) -> np.random.Generator:
        name = zlib.crc32(self.sources[source].name.encode())
        return np.random.Generator(np.random.PCG64([self.seed, name, *turn]))


def _num_turns(counts: Int[np.ndarray, " C"], questions: int | None) -> Int[np.ndarray, " C"]:
    """How often candidates with so many questions each come in a pass."""
    return np.ones_like(counts) if questions is None else -(-counts // questions)


def _grouped(
    pairs: Int[np.ndarray, " N"],
    candidates: Int[np.ndarray, " N"],
    questions: int | None,
    random: np.random.Generator,
) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " U"]]:
    """Group shuffled pairs by candidate, in shuffled order.

    A candidate with more questions than may come at a time comes several times, with about equal
    shares and at about equal distances: seldom twice in a batch.

    Returns:
        The pairs, those of a group consecutive, and the sizes of the groups.
    """
    by_candidate = np.argsort(candidates, kind="stable")
    _, starts, counts = np.unique(candidates[by_candidate], return_index=True, return_counts=True)
    turns = _num_turns(counts, questions)
    place = np.arange(len(pairs)) - np.repeat(starts, counts)  # among its candidate's questions
    turn = place * np.repeat(turns, counts) // np.repeat(counts, counts)
    unit = np.repeat(np.cumsum(turns) - turns, counts) + turn
    sizes = np.bincount(unit)
    which = np.arange(len(sizes)) - np.repeat(np.cumsum(turns) - turns, turns)
    shuffled = np.argsort((which + random.random(len(sizes))) / np.repeat(turns, turns))
    order = np.argsort(np.argsort(shuffled)[unit], kind="stable")
    return pairs[by_candidate][order], sizes[shuffled]


def _check(
    sources: Sequence[PlannedSource], global_batch_size: int, mixing_temperature: float
) -> None:
    if not sources:
        raise UserError("expected at least one training source, got none")
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise UserError(f"source names must differ, got {', '.join(names)}")
    if global_batch_size < 2:
        raise UserError(
            f"global_batch_size must be at least 2, got {global_batch_size}: "
            "the other pairs of a batch are the negatives"
        )
    _check_weights(sources, mixing_temperature)
    _check_presence(sources)
    for source in sources:
        if source.max_pairs is not None and source.max_pairs < 1:
            raise UserError(f"source {source.name}: max_pairs must be at least 1, if given")
        if source.questions is not None and source.questions < 1:
            raise UserError(
                f"source {source.name}: questions must be at least 1 or all, got {source.questions}"
            )


def _check_sizes(
    sources: Sequence[PlannedSource], sizes: Sequence[int], global_batch_size: int
) -> None:
    for source, size in zip(sources, sizes, strict=True):
        if size >= global_batch_size:
            continue
        has = f"{source.num_pairs} pairs"
        if size < source.num_pairs:
            has += f" of {size} candidates (questions: {source.questions or 'all'})"
        raise UserError(
            f"source {source.name} has {has}, fewer than one global batch of {global_batch_size}; "
            "lower global_batch_size or leave the source out"
        )


def _check_weights(sources: Sequence[PlannedSource], mixing_temperature: float) -> None:
    for source in sources:
        if source.weight is not None and not 0 < source.weight < float("inf"):
            raise UserError(f"source {source.name}: weight must be positive, got {source.weight}")
    if len({source.weight is None for source in sources}) > 1:
        raise UserError("give a weight to every training source or to none")
    if not mixing_temperature >= 1:
        raise UserError(
            f"mixing_temperature must be at least 1 (1: in proportion to the sizes); got "
            f"{mixing_temperature}"
        )
    if mixing_temperature != 1 and sources[0].weight is not None:
        raise UserError(
            f"mixing_temperature {mixing_temperature} computes weights from sizes, but the sources "
            "have their own weights: leave out one of them"
        )


def _check_presence(sources: Sequence[PlannedSource]) -> None:
    """Refuse sources that are never active, and steps without an active source."""
    for source in sources:
        if source.last_step is not None and source.last_step <= source.first_step:
            raise UserError(
                f"source {source.name}: last_step {source.last_step} must come after first_step "
                f"{source.first_step}"
            )
    covered = 0
    for source in sorted(sources, key=lambda source: source.first_step):
        if source.first_step > covered:
            break
        if source.last_step is None:
            return
        covered = max(covered, source.last_step)
    raise UserError(
        f"no training source is active at step {covered}: set first_step to 0 for at least one, "
        "and "
        "leave last_step out of one that stays"
    )
