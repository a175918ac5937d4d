"""Weights that are sharded over ranks, as in ZeRO-3 and FSDP2, gathered into complete tensors."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor

from metaembed_pl.ranks import rank_and_world


def unsharded(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with all their values: copies on the CPU of those that are sharded.

    They are gathered one by one, so that no GPU holds more than one of them. Every rank must ask;
    those after the first get no values, but the shapes.

    Args:
        tensors: parameters themselves, not detached: a detached one has lost its other parts.
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
    """While open, the tensor with all its values; every rank must ask."""
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
