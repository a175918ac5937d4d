"""Progress of a run: a bar in a terminal, lines in a pipe, notes for the watchdog."""

import json
import logging
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar

from metaembed_pl.data.collate import EvalBatch, TrainBatch
from metaembed_pl.data.datamodule import RetrievalDataModule
from metaembed_pl.training.watchdog import Watch

log = logging.getLogger(__name__)

NUM_KEYS = 5  # of a batch's pairs, as messages name them


class Speed(pl.Callback):
    """Pairs per second over all ranks, as a moving average, and the time left in training."""

    def __init__(self) -> None:
        self.pairs_per_s = 0.0
        self.left_s = float("nan")
        self._last: float | None = None
        self._step_s = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock after set-up, which is not part of the first step."""
        self._last = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps validation out of the training speed."""
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TrainBatch, *_: Any
    ) -> None:
        """Updates speed and time left, and logs the speed."""
        now = time.perf_counter()
        took = now - (self._last or now)
        self._last = now
        self._step_s = took if not self._step_s else 0.9 * self._step_s + 0.1 * took
        if self._step_s:
            self.pairs_per_s = len(batch.keys) * trainer.world_size / self._step_s
        # `estimated_stepping_batches` counts optimiser steps, as `global_step` does.
        left = trainer.estimated_stepping_batches - trainer.global_step
        self.left_s = left * self._step_s * trainer.accumulate_grad_batches
        pl_module.log("train/pairs_per_s", self.pairs_per_s, batch_size=len(batch.keys))

    def time_left(self) -> str:
        """Such as `0:03:12`; `?` before the first step."""
        return str(timedelta(seconds=round(self.left_s))) if self.left_s == self.left_s else "?"


class DrawnPairs(pl.Callback):
    """Logs at the end of a run how many pairs came from each source, resumed parts included."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the counts of the data module, also as the metrics `data/SOURCE/pairs`."""
        # Lightning sets `datamodule` from outside its class.
        data: RetrievalDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not trainer.is_global_zero:
            return
        metrics: dict[str, float] = {"data/bad_samples": len(data.bad_samples)}
        metrics["data/cut_texts"] = data.cut.num_cut
        if data.cut.num_cut:
            log.warning("in all: %s", data.cut)
        for source in data.plan.sources:
            drawn = data.num_drawn[source.name]
            log.info(
                "%s: %d pairs drawn, %.2f passes", source.name, drawn, drawn / source.num_pairs
            )
            metrics[f"data/{source.name}/pairs"] = drawn
        if trainer.logger is not None:
            trainer.logger.log_metrics(metrics, step=trainer.global_step)


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with the speed in pairs and the time left of the run."""

    def __init__(self, speed: Speed):
        super().__init__()
        self._speed = speed

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        """Adds what `Speed` knows, and drops Lightning's version number."""
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        if trainer.training:
            shown |= {"pairs/s": round(self._speed.pairs_per_s), "left": self._speed.time_left()}
        return shown


class ProgressLines(pl.Callback):
    """One line every `every_n_steps` steps, for logs and pipes."""

    def __init__(self, speed: Speed, every_n_steps: int):
        self._speed = speed
        self._every = every_n_steps
        self._losses: list[float] = []
        self._last_step = 0  # that has its line

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TrainBatch, *_: Any
    ) -> None:
        """Logs step, mean loss since the last line, speed and time left."""
        if not trainer.is_global_zero:
            return
        step = trainer.global_step  # the same for all batches that are accumulated
        self._losses.append(float(trainer.callback_metrics["train/loss"]))
        if step % self._every or step == self._last_step:
            return
        log.info(
            "step %d of %d, loss %.3f, %d pairs/s, %s left",
            step,
            trainer.estimated_stepping_batches,
            sum(self._losses) / len(self._losses),
            self._speed.pairs_per_s,
            self._speed.time_left(),
        )
        self._last_step = step
        self._losses.clear()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the headline metric."""
        if (value := _new_headline(trainer)) is not None:
            log.info("validated at step %d: val/headline %.3f", trainer.global_step, value)


def _new_headline(trainer: pl.Trainer) -> float | None:
    """The headline metric of a validation that just ended, on the first rank."""
    value = trainer.callback_metrics.get("val/headline")
    if value is None or trainer.sanity_checking or not trainer.is_global_zero:
        return None
    return float(value)


class WritesHeadline(pl.Callback):
    """Appends step and headline of each validation to a file of JSON Lines, which `tune` reads."""

    def __init__(self, file: str):
        self._file = Path(file)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes a line."""
        if (value := _new_headline(trainer)) is not None:
            said = json.dumps({"step": trainer.global_step, "headline": value})
            with self._file.open("a") as file:
                file.write(said + "\n")


class WatchdogCallback(pl.Callback):
    """Reports each step of training and evaluation to the watchdog of this rank.

    Args:
        watch: the watchdog.
        stall_timeout_s: longest time without progress, from the end of set-up on.
    """

    def __init__(self, watch: Watch, stall_timeout_s: float):
        self._watch = watch
        watch.timeout_s = stall_timeout_s

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Names the rank; loading weights may take any time."""
        self._watch.rank = f"rank {trainer.global_rank} of {trainer.world_size}"

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Rank 0 may take any time to write the results."""
        self._watch.rest()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """The first batch is waited for."""
        self._watch.note("training, before its first batch")

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainBatch, batch_idx: int
    ) -> None:
        """A training batch is there."""
        self._watch.note(f"training step {batch.step}, {_named(batch)}")

    def on_before_optimizer_step(self, trainer: pl.Trainer, *_: Any) -> None:
        """The gradients are there."""
        self._watch.note(f"{self._watch.doing}, with its gradients")

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: TrainBatch, *_: Any
    ) -> None:
        """The next batch is waited for."""
        self._watch.note(f"training, after step {batch.step}, {_named(batch)}")

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """A checkpoint is about to be written; the last one may take any time."""
        if not self._watch.rests:
            self._watch.note(f"writing the checkpoint of step {trainer.global_step}")

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: Any,
        batch: EvalBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """A validation or test batch is there."""
        what = "test" if trainer.testing else "validation"
        # Not the items' numbers: they may be on a GPU, and this thread must not wait for it.
        self._watch.note(f"{what}, batch {batch_idx} of {batch.dataset}, {batch.side}")

    on_test_batch_start = on_validation_batch_start


def _named(batch: TrainBatch) -> str:
    """The source and the first pairs of a batch.

    >>> _named(TrainBatch("pets", 3, ["a", "b"], {}, {}, *[None] * 5))
    'source pets, pairs a, b'
    """
    more = ", ..." if len(batch.keys) > NUM_KEYS else ""
    return f"source {batch.source}, pairs {', '.join(batch.keys[:NUM_KEYS])}{more}"
