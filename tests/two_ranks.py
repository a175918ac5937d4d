"""Runs a function on two gloo processes."""

import importlib.util
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

TIMEOUT_S = 120


def free_port() -> int:
    """A port of this machine that nobody listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def on_two_ranks(function: Callable[[int], Any], folder: Path) -> list[Any]:
    """What `function(rank)` returns on rank 0 and on rank 1.

    `function` stands at the top of its file. A rank that hangs or raises fails the test.
    """
    # By file and name: what pytest calls a test's module, another process cannot import.
    task = function.__code__.co_filename, function.__name__, folder
    context = mp.spawn(_rank, task, nprocs=2, join=False)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < deadline, "two ranks hang"
    finally:
        for process in context.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


def _rank(rank: int, file: str, name: str, folder: Path) -> None:
    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("of_two_ranks", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=TIMEOUT_S),
    )
    torch.save(getattr(module, name)(rank), folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
