"""What goes wrong on real machines, for a recipe's `trainer.callbacks` or a process to ask for."""

import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import safetensors.torch
import torch

LEFT_BYTES = 32 * 2**20  # of memory, to a process that starves


class Fault(pl.Callback):
    """In a step, one rank (or all: -1) sleeps, is killed, starves for memory or loses files."""

    def __init__(self, what: str, step: int, rank: int = -1, files: list[str] | None = None):
        self.what, self.step, self.rank, self.files = what, step, rank, files or []

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step != self.step or self.rank not in (-1, trainer.global_rank):
            return
        if self.what == "sleep":
            time.sleep(600)
        elif self.what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        for file in self.files:
            Path(file).unlink()

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.what == "starve" and trainer.global_step == self.step:
            starve(LEFT_BYTES)


def starve(left: int = 200 * 2**20) -> None:
    """From now on the process gets only so many more bytes of memory."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + left, held + left))


def die_in_checkpoint(part: str) -> None:
    """From now on the process dies with half of a file written that has this in its path."""
    torch.save = _dying(torch.save, part)


def die_in_model_folder(part: str) -> None:
    """The same of files of weights."""
    safetensors.torch.serialize_file = _dying(safetensors.torch.serialize_file, part)


def _dying(write: Callable, part: str) -> Callable:
    def write_or_die(content: Any, path: Any, *arguments: Any, **settings: Any) -> Any:
        if part in str(path):
            Path(path).write_bytes(b"half of a")
            os.kill(os.getpid(), signal.SIGKILL)
        return write(content, path, *arguments, **settings)

    return write_or_die


def _stop_at(hook, step):
    """In the process: SIGTERM to itself in a hook of Lightning's."""
    from metaembed_pl.training.stopping import StopsOnSignal

    plain = getattr(StopsOnSignal, hook)

    def stopping(self, trainer, *rest):
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(self, trainer, *rest)

    setattr(StopsOnSignal, hook, stopping)


def stop_in_training():
    _stop_at("on_train_batch_end", 2)


def stop_in_validation():
    _stop_at("on_validation_batch_end", 4)


STOPS = {
    "on_train_batch_end": stop_in_training,
    "on_validation_batch_end": stop_in_validation,
}
