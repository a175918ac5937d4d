"""Processes of a test, one a rank, forked from one that has imported everything already.

Importing is most of what a short run costs.
"""

import importlib.util
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOADED = ["metaembed_pl.cli.train", "deepspeed", "faults", "ranks"]  # as far as they are there
TIMEOUT_S = 300


class Ranks:
    """Processes that call a function with their rank and the given arguments.

    Args:
        count: of processes; a single one is not told that there are ranks.
        folder: gets what each of them prints.
        function: stands at the top of a module.
        arguments: of the function, after the rank.
    """

    def __init__(self, count: int, folder: Path, function: Callable, *arguments: Any):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        environment = dict(os.environ)
        if count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = str(free.getsockname()[1])
            environment |= {"WORLD_SIZE": str(count), "NODE_RANK": "0"}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"said.{rank}" for rank in range(count)]
        self.processes = []
        for rank, file in enumerate(self.files):
            place = {"LOCAL_RANK": str(rank), "RANK": str(rank)} if count > 1 else {}
            of_rank = (environment | place, str(file), function, rank, *arguments)
            self.processes.append(context.Process(target=_run, args=of_rank))
        for process in self.processes:
            process.start()

    def end(self, timeout_s: float = TIMEOUT_S) -> list[tuple[int, str]]:
        """Exit status of each and what it printed, once all have ended."""
        deadline = time.monotonic() + timeout_s
        try:
            for process in self.processes:
                process.join(deadline - time.monotonic())
                assert process.exitcode is not None, f"a rank hangs: {self._said()}"
        finally:
            self.kill()
        statuses = [process.exitcode for process in self.processes]
        return list(zip(statuses, self._said(), strict=True))

    def end_with_the_first_killed(self) -> list[tuple[int, str]]:
        """The same, but all are killed as soon as one of them was."""
        running = self.processes
        while running and all((process.exitcode or 0) >= 0 for process in self.processes):
            assert connection.wait([p.sentinel for p in running], TIMEOUT_S), "nothing ends"
            running = [process for process in running if process.exitcode is None]
        self.kill()
        return self.end()

    def kill(self) -> None:
        """SIGKILL to those that are there still."""
        for process in self.processes:
            process.kill()

    def _said(self) -> list[str]:
        return [file.read_text() if file.exists() else "" for file in self.files]


def command_line(count: int, folder: Path, *arguments: str, first: Callable | None = None) -> Ranks:
    """`metaembed-pl ARGUMENTS` on each rank, after it has called `first`."""
    return Ranks(count, folder, _command_line, first, arguments)


def on_two_ranks(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `function(rank)` returns on rank 0 and on rank 1 of a gloo group.

    `function` stands at the top of its file. A rank that hangs or raises fails the test.
    """
    # By file and name: what pytest calls a test's module, another process cannot import.
    task = function.__code__.co_filename, function.__name__, str(folder)
    for status, said in Ranks(2, folder, _in_group, *task).end():
        assert status == 0, said
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _run(environment: dict[str, str], file: str, function: Callable, rank: int, *rest: Any) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # `nohup make test` and `make test &` would have them ignored.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    said = os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(said, stream)
    sys.stdout, sys.stderr = (os.fdopen(stream, "w", buffering=1) for stream in (1, 2))
    function(rank, *rest)


def _command_line(rank: int, first: Callable | None, arguments: tuple[str, ...]) -> None:
    from metaembed_pl.cli.main import main

    if first is not None:
        first()
    sys.exit(main(list(arguments)))


def _in_group(rank: int, file: str, name: str, folder: str) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("of_two_ranks", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    within = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=within)
    torch.save(getattr(module, name)(rank), Path(folder) / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
