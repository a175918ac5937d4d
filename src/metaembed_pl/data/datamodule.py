"""Lightning's data module: training batches by the plan, and evaluation sets.

The loaders do not use Lightning's samplers: the plan determines the pairs of each step, workers
take turns by step, and the checkpoint stores the next step.
"""

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from metaembed_pl.data.batches import EvaluationBatches, TrainingBatches
from metaembed_pl.data.collate import Cut, Preprocess, TrainBatch
from metaembed_pl.data.plan import Plan, PlannedSource
from metaembed_pl.data.recipe_sources import (
    EvalSource,
    Questions,
    TrainSource,
    look_at_eval_set,
    open_eval_set,
    refuse_missing,
    refuse_other_shares,
    refuse_same_names,
)
from metaembed_pl.data.recipe_tables import RecipeTable
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.data.workers import Loader, workers_for
from metaembed_pl.errors import UserError, about_key

log = logging.getLogger(__name__)

LEAST = {"num_negatives": 0, "first_step": 0, "last_step": 1, "max_queries": 1, "max_candidates": 1}
"""The smallest numbers that a source may have."""


class _ResumingLoader(Loader):
    """Starts at the plan's next step each time it is iterated; its length is that of an epoch."""

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


class RetrievalDataModule(pl.LightningDataModule):
    """Training sources and evaluation sets.

    Args:
        train: sources to train on.
        val: sources to validate on during training.
        test: sources to test on at the end; None: those of `val`, complete.
        global_batch_size: candidates per step over all ranks, each with one or more queries; a
            query's in-batch negatives are the candidates of the others.
        eval_batch_size: items encoded at a time in validation; changes speed and memory only.
        num_negatives: hard negatives per query, for sources without a number of their own.
        questions: queries per candidate, for sources without a number of their own; `all`: every
            query of a candidate.
        num_workers: processes per rank that prepare batches; changes speed only. None: with GPUs
            one per core, up to 8 per rank; otherwise 1.
        seed: determines the order of the pairs.
        steps_per_epoch: steps per epoch; None: one pass over all pairs.
        open_shards: number of shards of a source among which pairs are shuffled at a time.
        max_bad_samples: the run stops after more different unusable pairs than this.
        mixing_temperature: weights sources by size^(1/T); 1: in proportion to their size;
            infinity: equally.
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
        counts = [
            ("eval_batch_size", eval_batch_size, 1),
            ("num_negatives", num_negatives, 0),
            ("num_workers", num_workers, 0),
            ("max_bad_samples", max_bad_samples, 0),
            ("open_shards", open_shards, 1),
            ("steps_per_epoch", steps_per_epoch, 1),
        ]
        for source in [*(train or []), *(val or []), *(test or [])]:
            _ = source.table  # refuses invalid keys of tables
            for name in LEAST.keys() & vars(source):
                counts.append((f"{source.path}: {name}", getattr(source, name), LEAST[name]))
        for name, count, at_least in counts:
            if count is not None and count < at_least:
                raise UserError(f"data: {name} must be at least {at_least}, got {count}")
        self.train_sources = train or []
        val = val or []
        if test is None:
            test = [replace(source, max_queries=None, max_candidates=None) for source in val]
        self.eval_sources = {"val": val, "test": test}
        refuse_other_shares(self.train_sources, [*val, *test])
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
        self._looked_at: dict[str, list[RetrievalSet | ShardedPairs]] = {}

    def prepare_data(self) -> None:
        """Make shards of tables: one process on each machine does it, and the others wait."""
        for table in self.tables():
            table.make()

    def tables(self) -> list[RecipeTable]:
        """The tables among the sources, each once."""
        sources = chain(self.train_sources, *self.eval_sources.values())
        return list({table.folder: table for s in sources if (table := s.table)}.values())

    def setup(self, stage: str) -> None:
        """Open the data of a stage; all their faults are reported here, before any training."""
        if stage == "fit":
            self._open_training()
        for part in {"fit": ["val"], "validate": ["val"], "test": ["test"]}.get(stage, []):
            with about_key(f"data.{part}"):
                found = self._looked_at.pop(part, None) or self._look_at(part)
                pairs = zip(self.eval_sources[part], found, strict=True)
                self.eval_sets[part] = [open_eval_set(*source) for source in pairs]
        if stage == "fit":
            with about_key("data.test"):
                self._looked_at["test"] = self._look_at("test")

    def _look_at(self, part: str) -> list[RetrievalSet | ShardedPairs]:
        sources, key = self.eval_sources[part], f"data.{part}"
        refuse_missing(key, sources)
        found = [*map(look_at_eval_set, sources)]
        refuse_same_names(key, zip(sources, found, strict=True))
        return found

    def _open_training(self) -> None:
        if not self.train_sources:
            raise UserError("the recipe names no training source: set data.train")
        refuse_missing("data.train", self.train_sources)
        self._shards = [ShardedPairs(source.folder) for source in self.train_sources]
        pairs = zip(self.train_sources, self._shards, strict=True)
        self.plan = self.plan_of(
            [source.planned(shards, self.questions) for source, shards in pairs]
        )
        self.epoch_length = self._steps_per_epoch or self.plan.steps_per_epoch

    def shards_and_negatives(self) -> list[tuple[ShardedPairs, int]]:
        """The training sources, each with its number of hard negatives per query."""
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

    def _process(self) -> Preprocess:
        module: Any = self._attached().lightning_module
        return module.embedder.processor()

    def train_dataloader(self) -> DataLoader:
        """Batches from the next step of the plan onwards."""
        counts = [num_negatives for _, num_negatives in self.shards_and_negatives()]
        instructions = [source.instructions for source in self.train_sources]
        dataset = TrainingBatches(self._shards, counts, self.plan, self._process(), instructions)
        trainer = self._attached()
        dataset.rank, dataset.num_ranks = trainer.global_rank, trainer.world_size
        module: Any = trainer.lightning_module
        dataset.in_chunks = not module.embedder.packs
        dataset.max_chunk_tokens = module.max_chunk_tokens
        # An uneven division is refused before workers start.
        self.plan.rank_batch(0, 0, dataset.num_ranks)
        return _ResumingLoader(dataset, self, **self._worker_settings())

    def val_dataloader(self) -> list[DataLoader]:
        """One loader per validation set."""
        return self._eval_loaders("val")

    def test_dataloader(self) -> list[DataLoader]:
        """One loader per test set."""
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
        """Leave chunks where they are: the module moves them to the device one by one."""
        if device.type == "cpu":
            return batch
        if not isinstance(batch, TrainBatch) or isinstance(batch.queries, dict):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        small = replace(batch, queries={}, candidates={})
        small = super().transfer_batch_to_device(small, device, dataloader_idx)
        return replace(small, queries=batch.queries, candidates=batch.candidates)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Record the progress in the plan, and the pairs that could not be used."""
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
        """The next step of the plan, the pairs drawn so far, and the bad samples."""
        bad = [[*where, reason] for where, reason in self.bad_samples.items()]
        return {
            "next_step": self.next_step,
            "num_drawn": dict(self.num_drawn),
            "bad_samples": bad,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume at the next batch."""
        self.next_step = state_dict["next_step"]
        self.num_drawn = Counter(state_dict.get("num_drawn", {}))
        self.bad_samples = {(s, k): reason for s, k, reason in state_dict["bad_samples"]}
