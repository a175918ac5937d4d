"""What goes wrong on real machines, for a recipe's `trainer.callbacks` to ask for."""

import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import lightning.pytorch as pl

TIMEOUT_S = 240
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
            held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (held + LEFT_BYTES, held + LEFT_BYTES))


def run_on_ranks(count: int, arguments: list[str], folder: Path) -> list[tuple[int, str]]:
    """Exit status and standard error of `metaembed-pl ARGUMENTS` on each of one or two ranks.

    They are forked from a process that has imported everything already: that costs most.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metaembed_pl.cli.train", "faults"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    files = [folder / f"stderr.{rank}" for rank in range(count)]
    ranks = [
        context.Process(target=_rank, args=(rank, count, port, arguments, str(file)))
        for rank, file in enumerate(files)
    ]
    for process in ranks:
        process.start()
    deadline = time.monotonic() + TIMEOUT_S
    try:
        for process in ranks:
            process.join(deadline - time.monotonic())
            assert process.exitcode is not None, "a rank hangs"
    finally:
        for process in ranks:
            process.kill()
    return [
        (process.exitcode, file.read_text()) for process, file in zip(ranks, files, strict=True)
    ]


def _rank(rank: int, count: int, port: int, arguments: list[str], stderr: str) -> None:
    os.dup2(os.open(stderr, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if count > 1:
        os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(count)}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    from metaembed_pl.cli.main import main

    sys.exit(main(arguments))
