"""The processes of a job: their ranks, and their tensors and objects gathered on every rank.

In one process every function does nothing, so callers need not know about ranks.

B: rows of this rank    WB: rows of all ranks
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

from metaembed_pl.errors import UserError

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
    """Connect the ranks that torchrun started, if any; returns `rank_and_world`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    # Only data on the CPU is sent: embeddings on their way to disk.
    dist.init_process_group("gloo")
    try:
        yield rank_and_world()
    finally:
        dist.destroy_process_group()


def gather(x: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "WB ..."]:
    """Concatenate `x` of all ranks in rank order; no gradient flows back.

    Raises:
        UserError: the ranks' shapes differ.
    """
    world = rank_and_world()[1]
    if world == 1:
        return x.detach()
    _check_equal_shapes(x, world)
    x = x.detach().contiguous()
    gathered = x.new_empty(world * x.shape[0], *x.shape[1:])
    dist.all_gather_into_tensor(gathered, x)
    return gathered


def gather_with_gradient(x: Shaped[Tensor, "B ..."]) -> Shaped[Tensor, "WB ..."]:
    """Concatenate `x` of all ranks in rank order; gradients of all ranks flow back, summed.

    Each rank's loss depends on these rows, so a row's gradient is the sum over the losses. The mean
    over ranks that DDP then takes of the parameters' gradients makes it the gradient of the mean
    loss: no factor of the world size is wanted anywhere.

    Raises:
        UserError: the ranks' shapes differ.
    """
    if rank_and_world()[1] == 1:
        return x
    return _Gather.apply(x)


def gather_ragged(x: Shaped[Tensor, "B ..."], counts: list[int]) -> Shaped[Tensor, "All ..."]:
    """Concatenate `x` of all ranks, which may bring different numbers of rows.

    Gradients of floating point rows flow back, as by `gather_with_gradient`.

    Args:
        x: this rank's rows.
        counts: rows of each rank.
    """
    if len(counts) == 1:
        return x
    widest = max(counts)
    padded = torch.cat([x, x.new_zeros(widest - len(x), *x.shape[1:])])
    gathered = gather_with_gradient(padded) if x.is_floating_point() else gather(padded)
    if min(counts) == widest:
        return gathered
    return torch.cat([gathered[i * widest :][:count] for i, count in enumerate(counts)])


def maximum_over_ranks(count: int, device: torch.device) -> int:
    """The maximum of `count` over all ranks."""
    if rank_and_world()[1] == 1:
        return count
    maximum = torch.tensor(count, device=device)
    dist.all_reduce(maximum, dist.ReduceOp.MAX)
    return int(maximum)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return gather(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        world = rank_and_world()[1]
        local = grad.new_empty(grad.shape[0] // world, *grad.shape[1:])
        dist.reduce_scatter_tensor(local, grad.contiguous())
        return local


def _check_equal_shapes(x: Tensor, world: int) -> None:
    # A fixed length, so that ranks that disagree on the number of dimensions still meet here
    # instead of hanging in a collective.
    shape = torch.zeros(8, dtype=torch.int64)
    shape[: x.dim()] = torch.tensor(x.shape)
    shape = shape.to(x.device)
    shapes = shape.new_empty(world * 8)
    dist.all_gather_into_tensor(shapes, shape)
    shapes = shapes.view(world, 8)
    if not (shapes == shapes[0]).all():
        sizes = [[size for size in row if size] for row in shapes.tolist()]
        raise UserError(
            f"every rank must bring the same shape to a gather; ranks 0 to {world - 1} brought "
            f"{sizes}: give each rank the same number of pairs"
        )
