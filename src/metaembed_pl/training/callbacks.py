"""What a run shows while it trains: a progress bar in a terminal, plain lines in a pipe."""

import logging
import time
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar

from metaembed_pl.data.collate import TrainBatch
from metaembed_pl.data.datamodule import RetrievalDataModule

log = logging.getLogger(__name__)


class Speed(pl.Callback):
    """Pairs a second over all ranks, as a smoothed mean, and the time left until the last step."""

    def __init__(self) -> None:
        self.pairs_per_s = 0.0
        self.left_s = float("nan")
        self._last: float | None = None
        self._step_s = 0.0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the clock after set-up, so that the first step is not charged with it."""
        self._last = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Keeps validation out of the training speed."""
        self._last = time.perf_counter()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainBatch,
        batch_idx: int,
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
    """Says at the end of a run how many pairs came from each source, in all its parts.

    In the logs and, as `data/SOURCE/pairs`, in MLflow.
    """

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs what the data module has counted."""
        # Lightning sets `datamodule` from outside its class.
        data: RetrievalDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not trainer.is_global_zero:
            return
        metrics: dict[str, float] = {"data/bad_samples": len(data.bad_samples)}
        for source in data.plan.sources:
            drawn = data.num_drawn[source.name]
            log.info(
                "%s: %d pairs drawn, %.2f passes", source.name, drawn, drawn / source.num_pairs
            )
            metrics[f"data/{source.name}/pairs"] = drawn
        if trainer.logger is not None:
            trainer.logger.log_metrics(metrics, step=trainer.global_step)


class ProgressBar(RichProgressBar):
    """Lightning's bar with the speed in pairs and the time left of the whole run."""

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
    """One line every so many steps, for logs and pipes."""

    def __init__(self, speed: Speed, every_n_steps: int):
        self._speed = speed
        self._every = every_n_steps
        self._losses: list[float] = []

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: TrainBatch,
        batch_idx: int,
    ) -> None:
        """Logs step, mean loss since the last line, speed and time left."""
        step = trainer.global_step
        self._losses.append(float(trainer.callback_metrics["train/loss"]))
        if step % self._every == 0 and trainer.is_global_zero:
            log.info(
                "step %d of %d, loss %.3f, %d pairs/s, %s left",
                step,
                trainer.estimated_stepping_batches,
                sum(self._losses) / len(self._losses),
                self._speed.pairs_per_s,
                self._speed.time_left(),
            )
            self._losses.clear()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs the headline metric."""
        value = trainer.callback_metrics.get("val/headline")
        if value is not None and not trainer.sanity_checking and trainer.is_global_zero:
            log.info("validated at step %d: val/headline %.3f", trainer.global_step, float(value))
