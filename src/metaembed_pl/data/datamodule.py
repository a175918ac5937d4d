"""Lightning's data module: training batches by the plan, and evaluation sets.

The loaders do not use Lightning's samplers: the plan determines the pairs of each step, workers
take turns by step, and the checkpoint stores the next step.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from metaembed_pl.data.beir import is_retrieval_set, read_retrieval_set
from metaembed_pl.data.collate import (
    Cut,
    EvalBatch,
    Instructions,
    Process,
    TrainBatch,
    chosen_negatives,
    collate,
    decoded,
    with_positive_of,
)
from metaembed_pl.data.plan import Plan, PlannedBatch, PlannedSource
from metaembed_pl.data.recipe_tables import RecipeTable
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import HEAD_BYTES, ShardedPairs
from metaembed_pl.data.workers import Loader, workers_for
from metaembed_pl.errors import BadSample, Unreachable, UserError
from metaembed_pl.item import Pair

log = logging.getLogger(__name__)

Questions = int | Literal["all"]
"""Queries that come with a candidate at once."""


@dataclass
class TrainSource:
    """A folder of shards to train on, or a table, of which shards are made at the first `fit`.

    Args:
        path: the folder, or its address, such as `s3://bucket/pets`; of a table a file (Parquet,
            JSON Lines, CSV), a folder, an address, ORG/NAME of the hub, or `preset:NAME`.
        name: how logs call it; None takes the folder's manifest's.
        weight: share of the batches relative to the other sources; None for all: by size.
        num_negatives: hard negatives a query; None takes the data module's.
        questions: a candidate comes with up to so many of its queries at once, and is encoded
            once; `all` for all it has. None takes the data module's.
        first_step: the source joins the mixture at this step: names before scenes, say.
        last_step: the source leaves the mixture at this step; None: it stays.
        max_pairs: use only so many of its pairs; None for all.
        instruction: the model reads it before each query's text.
        candidate_instruction: likewise before each candidate's.
        columns: of a table: which column is what, such as `{query: question, positive: answer}`.
        files: of a table: pattern of its files, such as `data/train-*`.
        held_out: of a table: share of its candidates that only evaluation uses.
    """

    path: str
    name: str | None = None
    weight: float | None = None
    num_negatives: int | None = None
    questions: Questions | None = None
    first_step: int = 0
    last_step: int | None = None
    max_pairs: int | None = None
    instruction: str | None = None
    candidate_instruction: str | None = None
    columns: dict[str, str] | None = None
    files: str = "*"
    held_out: float = 0.0

    @property
    def table(self) -> RecipeTable | None:
        """The table it names; None: shards."""
        return RecipeTable.of(self.path, self.columns, self.files, self.held_out)

    @property
    def folder(self) -> str:
        """Its shards."""
        return self.path if self.table is None else str(self.table.shards("train"))

    def planned(self, shards: ShardedPairs, questions: Questions = 1) -> PlannedSource:
        """The source as the plan sees it, with so many questions where it does not say."""
        questions = questions if self.questions is None else self.questions
        found = PlannedSource(
            self.name or shards.name,
            tuple(shards.shard_sizes),
            self.weight,
            self.first_step,
            self.last_step,
            self.max_pairs,
            questions=None if questions == "all" else questions,
        )
        if questions == 1:
            return found
        candidates = shards.candidate_numbers()
        if candidates.max() + 1 == len(candidates):
            log.info(
                "%s: each of its candidates has only one question, so `questions` has no effect",
                found.name,
            )
        return replace(found, candidates=candidates)

    @property
    def instructions(self) -> Instructions:
        """Of both sides."""
        return Instructions(self.instruction, self.candidate_instruction)


@dataclass
class EvalSource:
    """What to evaluate on: a folder of shards, or a retrieval set as beir.py describes it.

    The queries of shards search the pool of their positives; those of a retrieval set its whole
    corpus, or where it has `candidates/` each its own list.

    Args:
        path: the folder; or a table, as in training.
        name: the DATASET of metric names; None takes the folder's manifest's.
        max_queries: only the first so many; None for all.
        max_candidates: a query searches no more than so many, its right ones included; None: all.
        where: only queries with these metadata, such as `{language: english}`; of retrieval sets.
        instruction: as in training.
        candidate_instruction: likewise.
        columns: of a table, as in training.
        files: likewise.
        held_out: the share that training leaves out, which is evaluated on; 0: everything.
    """

    path: str
    name: str | None = None
    max_queries: int | None = None
    max_candidates: int | None = None
    where: dict[str, str] | None = None
    instruction: str | None = None
    candidate_instruction: str | None = None
    columns: dict[str, str] | None = None
    files: str = "*"
    held_out: float = 0.0

    @property
    def table(self) -> RecipeTable | None:
        """The table it names; None: a folder."""
        return RecipeTable.of(self.path, self.columns, self.files, self.held_out)

    @property
    def folder(self) -> str:
        """Its shards or retrieval set."""
        return self.path if self.table is None else str(self.table.shards("test"))

    @property
    def instructions(self) -> Instructions:
        """Of both sides."""
        return Instructions(self.instruction, self.candidate_instruction)


class TrainingBatches(IterableDataset):
    """The batches of steps `first` to `last` that fall to one rank.

    A pair that cannot be read or decoded is replaced by the next one of its source that can.
    """

    def __init__(
        self,
        sources: list[ShardedPairs],
        num_negatives: list[int],
        plan: Plan,
        process: Process,
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
        processing: Any = getattr(self.process, "processing", None)
        if processing is not None:
            processing.cut = Cut()
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
        batch.faults = faults
        if processing is not None:
            batch.cut = processing.cut
        return batch

    def _costs(self, batch: PlannedBatch) -> list[int]:
        """About how many tokens each candidate has, with its questions and their negatives."""
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
        """Those of a candidate's pairs that can be used; where none can, the next one that can."""
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
        """Notes why a pair cannot be used, instead of raising it."""
        try:
            yield
        except Unreachable:
            raise
        except BadSample as fault:
            faults.append((fault.shard, fault.key, fault.reason))
        except UserError as error:
            faults.append((*self.sources[source].locate(position), str(error)))


class _ResumingLoader(Loader):
    """Asks where to start each time it is iterated, and tells Lightning the steps of an epoch."""

    def __init__(self, dataset: TrainingBatches, data: "RetrievalDataModule", **kwargs: Any):
        super().__init__(dataset, batch_size=None, **kwargs)
        self._batches, self._data = dataset, data

    def __iter__(self) -> Iterator[TrainBatch]:
        step, length = self._data.next_step, len(self)
        # Workers get a copy of the dataset as it is now.
        self._batches.first, self._batches.last = step, step - step % length + length
        return super().__iter__()

    def __len__(self) -> int:
        return self._data.epoch_length


class EvaluationBatches(Dataset):
    """One rank's batches of an evaluation set: first the candidates, then the queries.

    Every rank has equally many, so that no collective waits: the last ones may repeat an item,
    which the metric, going by index, counts once.
    """

    def __init__(
        self,
        pool: RetrievalSet,
        process: Process,
        batch_size: int,
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.pool, self.process = pool, process
        counts: dict[Literal["query", "candidate"], int] = {
            "candidate": len(pool.candidates),
            "query": len(pool.queries),
        }
        self.batches: list[tuple[Literal["query", "candidate"], list[int]]] = [
            (side, indices)
            for side, count in counts.items()
            for indices in _dealt(count, batch_size, rank, num_ranks)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> EvalBatch:
        side, indices = self.batches[i]
        items = self.pool.candidates if side == "candidate" else self.pool.queries
        inputs = self.process([items[index] for index in indices], side)
        return EvalBatch(self.pool.name, side, torch.tensor(indices), inputs)


def _dealt(count: int, batch_size: int, rank: int, num_ranks: int) -> list[list[int]]:
    """Indices of one rank's batches; all ranks get the same number, the last ones wrap around."""
    per_rank = -(-count // num_ranks)
    mine = [(rank * per_rank + i) % count for i in range(per_rank)]
    return [mine[start : start + batch_size] for start in range(0, per_rank, batch_size)]


class RetrievalDataModule(pl.LightningDataModule):
    """Training sources and evaluation sets.

    Args:
        train: what to train on.
        val: what to validate on during training.
        test: what to test on at the end; None: all of what `val` may have only a part of.
        global_batch_size: candidates of a step over all ranks, each with one or more queries; a
            query's in-batch negatives are the candidates of the others.
        eval_batch_size: items at a time in validation; changes speed and memory only.
        num_negatives: hard negatives per query, where a source does not say.
        questions: queries that come with a candidate, where a source does not say; see
            `TrainSource`.
        num_workers: processes that prepare batches on each rank; changes speed only. None: on GPUs
            as many as there are cores for, up to 8; else 1.
        seed: the order of the pairs.
        steps_per_epoch: None: as many as all pairs make.
        open_shards: see `Plan`.
        max_bad_samples: the run stops when more different pairs than this cannot be used.
        mixing_temperature: flattens the shares of sources without weights; see `Plan`.
    """

    def __init__(
        self,
        train: list[TrainSource] | None = None,
        val: list[EvalSource] | None = None,
        test: list[EvalSource] | None = None,
        global_batch_size: int = 128,
        eval_batch_size: int = 64,
        num_negatives: int = 1,
        questions: Questions = 1,
        num_workers: int | None = None,
        seed: int = 0,
        steps_per_epoch: int | None = None,
        open_shards: int = 16,
        max_bad_samples: int = 100,
        mixing_temperature: float = 1.0,
    ):
        super().__init__()
        counts = {"eval_batch_size": (eval_batch_size, 1), "num_negatives": (num_negatives, 0)}
        counts |= {"num_workers": (num_workers, 0), "max_bad_samples": (max_bad_samples, 0)}
        counts |= {"open_shards": (open_shards, 1), "steps_per_epoch": (steps_per_epoch, 1)}
        least = {"num_negatives": 0, "first_step": 0, "last_step": 1}
        least |= {"max_queries": 1, "max_candidates": 1}
        for source in [*(train or []), *(val or []), *(test or [])]:
            _ = source.table  # refuses what no table has
            for name in least.keys() & vars(source):
                counts[f"{source.path}: {name}"] = (getattr(source, name), least[name])
        for name, (count, at_least) in counts.items():
            if count is not None and count < at_least:
                raise UserError(f"data: {name} must be at least {at_least}, got {count}")
        self.train_sources = train or []
        val = val or []
        if test is None:
            test = [replace(source, max_queries=None, max_candidates=None) for source in val]
        self.eval_sources = {"val": val, "test": test}
        self.global_batch_size = global_batch_size
        self.eval_batch_size = eval_batch_size
        self.num_negatives = num_negatives
        self.questions: Questions = questions
        self.num_workers = num_workers
        self.seed = seed
        self.open_shards = open_shards
        self.max_bad_samples = max_bad_samples
        self.mixing_temperature = mixing_temperature
        self._steps_per_epoch = steps_per_epoch
        self.next_step = 0
        self.bad_samples: dict[tuple[str, str], str] = {}
        self.cut = Cut()
        self.num_drawn: Counter[str] = Counter()  # pairs of all ranks, by source
        self.eval_sets: dict[str, list[RetrievalSet]] = {}

    def prepare_data(self) -> None:
        """Makes shards of tables: one process of each machine does, and the others wait."""
        for table in self.tables():
            table.make()

    def tables(self) -> list[RecipeTable]:
        """The tables among the sources, each once."""
        sources = chain(self.train_sources, *self.eval_sources.values())
        return list({table.folder: table for s in sources if (table := s.table)}.values())

    def setup(self, stage: str) -> None:
        """Opens what the stage needs; all faults of the data show here, before any training."""
        if stage == "fit":
            self._open_training()
        for part in {"fit": ["val"], "validate": ["val"], "test": ["test"]}.get(stage, []):
            self.eval_sets[part] = [open_eval_set(source) for source in self.eval_sources[part]]

    def _open_training(self) -> None:
        if not self.train_sources:
            raise UserError("the recipe names no training source: set data.train")
        self._shards = [ShardedPairs(source.folder) for source in self.train_sources]
        pairs = zip(self.train_sources, self._shards, strict=True)
        self.plan = self.plan_of(
            [source.planned(shards, self.questions) for source, shards in pairs]
        )
        self.epoch_length = self._steps_per_epoch or self.plan.steps_per_epoch

    def shards_and_negatives(self) -> list[tuple[ShardedPairs, int]]:
        """The training sources, and the hard negatives of a query in each."""
        counts = [
            self.num_negatives if source.num_negatives is None else source.num_negatives
            for source in self.train_sources
        ]
        return list(zip(self._shards, counts, strict=True))

    def plan_of(self, sources: list[PlannedSource]) -> Plan:
        """The plan of these sources, with this module's settings."""
        return Plan(
            sources, self.global_batch_size, self.seed, self.open_shards, self.mixing_temperature
        )

    def _attached(self) -> pl.Trainer:
        assert self.trainer is not None, "loaders are made once a trainer has taken the data"
        return self.trainer

    def _process(self) -> Process:
        module: Any = self._attached().lightning_module
        return module.embedder.processor()

    def train_dataloader(self) -> DataLoader:
        """Batches from the next step of the plan on."""
        counts = [num_negatives for _, num_negatives in self.shards_and_negatives()]
        instructions = [source.instructions for source in self.train_sources]
        dataset = TrainingBatches(self._shards, counts, self.plan, self._process(), instructions)
        trainer = self._attached()
        dataset.rank, dataset.num_ranks = trainer.global_rank, trainer.world_size
        module: Any = trainer.lightning_module
        dataset.in_chunks = not module.embedder.packs
        dataset.max_chunk_tokens = module.max_chunk_tokens
        # An uneven division shows before workers start.
        self.plan.rank_batch(0, 0, dataset.num_ranks)
        return _ResumingLoader(dataset, self, **self._worker_settings())

    def val_dataloader(self) -> list[DataLoader]:
        """One loader a validation set."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        """One loader a test set."""
        return self._eval_loaders("test")

    def _eval_loaders(self, part: str) -> list[DataLoader]:
        trainer = self._attached()
        place = trainer.global_rank, trainer.world_size
        return [
            Loader(
                EvaluationBatches(pool, self._process(), self.eval_batch_size, *place),
                batch_size=None,
                **self._worker_settings(),
            )
            for pool in self.eval_sets[part]
        ]

    def _worker_settings(self) -> dict[str, Any]:
        on_gpu = torch.cuda.is_available()
        count = self.num_workers
        if count is None:
            count = workers_for(self._attached().num_devices) if on_gpu else 1
        return {"num_workers": count, "pin_memory": on_gpu}

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Leaves chunks where they are: they are brought to the device one by one."""
        if device.type == "cpu":
            return batch
        if not isinstance(batch, TrainBatch) or isinstance(batch.queries, dict):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        small = replace(batch, queries={}, candidates={})
        small = super().transfer_batch_to_device(small, device, dataloader_idx)
        return replace(small, queries=batch.queries, candidates=batch.candidates)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Notes how far the plan has been used, and what could not be."""
        if isinstance(batch, TrainBatch):
            if batch.cut.num_cut and not self.cut.num_cut:
                log.warning("%s, step %d: %s", batch.source, batch.step, batch.cut)
            self.cut += batch.cut
            self.next_step = batch.step + 1
            self.num_drawn[batch.source] += len(self.plan.batch(batch.step).positions)
            self._note_faults(batch)
        return batch

    def _note_faults(self, batch: TrainBatch) -> None:
        for shard, key, reason in batch.faults:
            if (shard, key) not in self.bad_samples:
                log.warning(
                    "replaced a bad sample: %s/%s, %s: %s", batch.source, shard, key, reason
                )
            self.bad_samples[shard, key] = reason
        if len(self.bad_samples) > self.max_bad_samples:
            shard, key, reason = batch.faults[-1]
            raise UserError(
                f"{len(self.bad_samples)} pairs could not be used, more than data.max_bad_samples "
                f"({self.max_bad_samples}); the last one: {batch.source}/{shard}, {key}: {reason}"
            )

    def state_dict(self) -> dict[str, Any]:
        """The next step of the plan, what was drawn so far, and the bad samples met."""
        bad = [[*where, reason] for where, reason in self.bad_samples.items()]
        return {
            "next_step": self.next_step,
            "num_drawn": dict(self.num_drawn),
            "bad_samples": bad,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on at the very next batch."""
        self.next_step = state_dict["next_step"]
        self.num_drawn = Counter(state_dict.get("num_drawn", {}))
        self.bad_samples = {(s, k): reason for s, k, reason in state_dict["bad_samples"]}


def open_eval_set(source: EvalSource) -> RetrievalSet:
    """The queries and candidates of an evaluation source.

    Raises:
        UserError: there is neither a shard nor a retrieval set, or it is not valid.
    """
    if is_retrieval_set(Path(source.folder)):
        found = read_retrieval_set(Path(source.folder), source.name, where=source.where)
        found = found.subset(source.max_queries, source.max_candidates)
        instructed = source.instructions.with_instruction
        queries = [instructed(query, "query") for query in found.queries]
        candidates = (
            found.candidates
        )  # in their file until they are needed, unless all get an instruction
        if source.candidate_instruction:
            candidates = [instructed(candidate, "candidate") for candidate in candidates]
        return replace(found, queries=queries, candidates=candidates)
    if source.where:
        raise UserError(f"{source.path}: `where` chooses queries of retrieval sets, not of shards")
    shards = ShardedPairs(source.folder)
    pairs = map(source.instructions.on, shards)
    pool = RetrievalSet.from_pairs(source.name or shards.name, pairs, source.max_queries)
    return pool.subset(max_candidates=source.max_candidates)
