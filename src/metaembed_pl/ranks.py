"""The processes of a job, as torchrun starts them; in one process every function does nothing."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def wait_for_ranks() -> None:
    """Returns when every rank has called it."""
    if rank_and_world()[1] > 1:
        dist.barrier()


def gather_objects(value: T) -> list[T]:
    """The values of all ranks, in order, on rank 0; an empty list on the others."""
    rank, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] | None = None if rank else [None] * world
    dist.gather_object(value, values)
    return values or []


@contextmanager
def connected_ranks() -> Iterator[tuple[int, int]]:
    """While open, the ranks that torchrun started, if it did, can talk; gives `rank_and_world`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    # What is sent is on the CPU: embeddings on their way to the disk.
    dist.init_process_group("gloo")
    try:
        yield rank_and_world()
    finally:
        dist.destroy_process_group()
