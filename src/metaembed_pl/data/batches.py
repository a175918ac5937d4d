"""One rank's batches: training batches by the plan, and batches of an evaluation set."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import chain

import torch
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from metaembed_pl.data.collate import (
    Cut,
    EvalBatch,
    Instructions,
    Preprocess,
    Side,
    TrainBatch,
    chosen_negatives,
    collate,
    decoded,
    with_positive_of,
)
from metaembed_pl.data.plan import Plan, PlannedBatch
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import HEAD_BYTES, ShardedPairs
from metaembed_pl.errors import BadSample, Unreachable, UserError
from metaembed_pl.item import Item, Pair

UNREADABLE = Item("unreadable")
"""Encoded in the place of an item that is, so that all ranks encode equally many."""


class TrainingBatches(IterableDataset):
    """One rank's batches of the steps from `first` to `last`.

    A pair that cannot be read or decoded is replaced by the next usable one of its source.
    """

    def __init__(
        self,
        sources: list[ShardedPairs],
        num_negatives: list[int],
        plan: Plan,
        process: Preprocess,
        instructions: list[Instructions] | None = None,
    ):
        self.sources = sources
        self.num_negatives = num_negatives
        self.instructions = instructions or [Instructions()] * len(sources)
        self.plan = plan
        self.process = process
        self.first, self.last, self.rank, self.num_ranks = 0, 0, 0, 1
        self.in_chunks = False
        self.max_chunk_tokens: int | None = None

    def __iter__(self) -> Iterator[TrainBatch]:
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first + offset, self.last, stride):
            yield self.load(step)

    def load(self, step: int) -> TrainBatch:
        """This rank's batch of a step."""
        planned = self.plan.rank_batch(step, self.rank, self.num_ranks, self._costs)
        faults: list[tuple[str, str, str]] = []
        self.process.cut = Cut()
        questions = [
            self._usable(planned.source, positions.tolist(), step, faults)
            for positions in planned.questions
        ]
        batch = collate(
            questions,
            self.process,
            source=self.plan.sources[planned.source].name,
            step=step,
            in_chunks=self.in_chunks,
            max_chunk_tokens=self.max_chunk_tokens,
        )
        batch.faults, batch.cut = faults, self.process.cut
        return batch

    def _costs(self, batch: PlannedBatch) -> list[int]:
        """Estimated tokens of each candidate, with its questions and their hard negatives."""
        return [
            sum(self._cost(batch, number, position) for number, position in enumerate(positions))
            for positions in batch.questions
        ]

    def _cost(self, batch: PlannedBatch, number: int, position: int) -> int:
        count, pairs = self.num_negatives[batch.source], self.sources[batch.source]
        try:
            choose = partial(chosen_negatives, count=count, turn=batch.step)
            pair = pairs.read(position, choose, HEAD_BYTES)
        except BadSample:
            return 0  # noted when it is read
        candidates = [*([pair.positive] if number == 0 else []), *pair.negatives]
        length = self.process.rough_length
        return length(pair.query, "query") + sum(length(item, "candidate") for item in candidates)

    def _usable(self, source: int, positions: list[int], step: int, faults: list) -> list[Pair]:
        """The usable pairs of a candidate; if there are none, the next usable pair."""
        found: list[Pair] = []
        total = len(self.sources[source])
        choose = partial(chosen_negatives, count=self.num_negatives[source], turn=step)
        others = range(positions[-1] + 1, positions[-1] + total)
        for number, position in enumerate(chain(positions, others)):
            if found and number >= len(positions):
                break
            pair = None
            with self._noting_faults(source, position % total, faults):
                pair = self.sources[source].read(position % total, choose)
            if pair is None:
                continue
            pair = self.instructions[source].on(pair)
            if found:
                pair = with_positive_of(pair, found[0])
            with self._noting_faults(source, position % total, faults):
                found.append(decoded(pair))
        if not found:
            raise UserError(f"{self.sources[source].folder}: none of its {total} pairs can be used")
        return found

    @contextmanager
    def _noting_faults(self, source: int, position: int, faults: list) -> Iterator[None]:
        """Record why a pair cannot be used, instead of raising the error."""
        try:
            yield
        except Unreachable:
            raise
        except BadSample as fault:
            faults.append((fault.shard, fault.key, fault.reason))
        except UserError as error:
            faults.append((*self.sources[source].locate(position), str(error)))


class EvaluationBatches(Dataset):
    """One rank's batches of an evaluation set: first the candidates, then the queries.

    Every rank has equally many, so that collectives match: the last batches may repeat items, which
    the metric counts once, by their index. Items that cannot be read count as missed.
    """

    def __init__(
        self,
        pool: RetrievalSet,
        process: Preprocess,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.pool, self.process = pool, process
        counts: dict[Side, int] = {"candidate": len(pool.candidates), "query": len(pool.queries)}
        self.batches: list[tuple[Side, list[int]]] = [
            (side, indices)
            for side, count in counts.items()
            for indices in _dealt(count, batch_size, rank, num_ranks)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> EvalBatch:
        side, indices = self.batches[i]
        items = self.pool.candidates if side == "candidate" else self.pool.queries
        found: list[Item] = []
        unread: dict[int, str] = {}
        for row, index in enumerate(indices):
            try:
                item = items[index]
                found.append(replace(item, image=item.load_image()))
            except UserError as error:
                found.append(UNREADABLE)
                unread[row] = str(error)
        inputs = self.process(found, side)
        return EvalBatch(self.pool.name, side, torch.tensor(indices), inputs, unread)


def _dealt(count: int, batch_size: int, rank: int, num_ranks: int) -> list[list[int]]:
    """Indices of one rank's batches; all ranks get the same number, the last ones wrap around."""
    per_rank = -(-count // num_ranks)
    mine = [(rank * per_rank + i) % count for i in range(per_rank)]
    return [mine[start : start + batch_size] for start in range(0, per_rank, batch_size)]
