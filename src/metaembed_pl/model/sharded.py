"""Weights that are sharded over ranks, as in ZeRO-3 and FSDP2, gathered into complete tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from metaembed_pl.ranks import rank_and_world


def unsharded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The complete tensors: sharded ones are copied to the CPU of the first rank.

    They are gathered one by one to save memory. Every rank must call this; the others get tensors
    without values.

    Args:
        tensors: parameters, not detached: a detached one has no link to its other parts.
    """
    found = {}
    for name, tensor in tensors.items():
        with complete_tensor(tensor) as values:
            if not is_sharded(tensor):
                found[name] = values
            elif rank_and_world()[0] == 0:
                found[name] = values.to("cpu", copy=True)
            else:
                found[name] = values.to("meta")
    return found


@contextmanager
def complete_tensor(tensor: Tensor) -> Iterator[Tensor]:
    """While open, the complete tensor; every rank must enter."""
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.detach()
    elif isinstance(tensor, DTensor):
        shared: Any = tensor.detach()  # typed as if it were a plain tensor
        yield shared.full_tensor()
    else:
        yield tensor.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of the tensor.

    >>> from torch import zeros
    >>> is_sharded(zeros(2))
    False
    """
    return hasattr(tensor, "ds_id") or isinstance(tensor, DTensor)


def complete_shape(tensor: Tensor) -> torch.Size:
    """The shape of the complete tensor: ZeRO-3 leaves an empty one in the place of a weight.

    >>> complete_shape(torch.zeros(2, 3))
    torch.Size([2, 3])
    """
    return getattr(tensor, "ds_shape", tensor.shape)
