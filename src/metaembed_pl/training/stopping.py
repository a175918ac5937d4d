"""Stop a run on a signal, at the end of its step and with a checkpoint.

Batch systems and containers send SIGTERM, or the signal of `#SBATCH --signal`, some time before
they kill a job; users press Ctrl-C. The exit status is 128 and the signal's number: 143, 138, 130.
"""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
SIGNALS += [signal.SIGXCPU]


class Stopped(SystemExit):
    """The run was stopped by a signal; `code` is the exit status."""

    def __init__(self, number: int):
        super().__init__(128 + number)
        self.name = signal.Signals(number).name


class StopsOnSignal(pl.Callback):
    """Handles signals inside its block: in training at the end of a step, otherwise at once.

    Args:
        last: the checkpoint to write before the run stops; None: none.
    """

    def __init__(self, last: Path | None = None):
        self.last = last
        self.saved_step: int | None = None
        self._number = 0
        self._waits = False
        self._trainer: pl.Trainer | None = None
        self._process = os.getpid()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopsOnSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in SIGNALS}
            self._take()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self) -> None:
        for number, before in self._before.items():
            if before is not signal.SIG_IGN:  # as `nohup` leaves SIGHUP
                signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that prepares batches: ends with this one
            return
        twice, self._number = self._number == number == signal.SIGINT, number
        launcher = self._trainer and self._trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and number != signal.SIGINT:
            launcher.kill(number)  # a terminal sends Ctrl-C to all processes
        if not self._waits or twice:
            raise Stopped(number)
        message = f"metaembed-pl: {signal.Signals(number).name}: stopping at the end of this step\n"
        os.write(2, message.encode())

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """From now on a step is finished first; Lightning has replaced our handlers."""
        self._trainer, self._waits = trainer, True
        self._take()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stops between two steps, on all ranks or on none."""
        if not trainer.fit_loop.epoch_loop._should_accumulate():
            self._stop_if_signalled(trainer)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        """Stops during a validation, which is repeated when the run resumes."""
        if self._waits and not trainer.sanity_checking and self._is_signalled(trainer):
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()
            self._stop(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remembers the step of the checkpoint."""
        self.saved_step = trainer.global_step

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """After training, a signal stops the run at once."""
        self._waits = False
        self._stop_if_signalled(trainer)

    def _is_signalled(self, trainer: pl.Trainer) -> bool:
        if trainer.world_size > 1:
            number = torch.tensor([self._number], device=trainer.strategy.root_device)
            dist.all_reduce(number, dist.ReduceOp.MAX)
            self._number = int(number)
        return bool(self._number)

    def _stop_if_signalled(self, trainer: pl.Trainer) -> None:
        if self._is_signalled(trainer):
            self._stop(trainer)

    def _stop(self, trainer: pl.Trainer) -> None:
        self._waits = False
        if self.last is not None:
            trainer.save_checkpoint(self.last, weights_only=False)
        raise Stopped(self._number)

    def saved(self) -> str:
        """What was saved of the run, and how to resume."""
        if self.last is None or not self.last.exists():
            return "nothing was saved: start it again"
        step = "" if self.saved_step is None else f" of step {self.saved_step}"
        return f"{self.last}{step} is saved: resume with --ckpt_path last"
