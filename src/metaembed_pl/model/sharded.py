"""Weights that are shared out over ranks, as ZeRO-3 and FSDP2 hold them, made whole again."""

from collections.abc import Mapping

from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with all their values: copies on the CPU of those that are sharded.

    They are gathered one by one, so that no GPU holds more than one of them. Every rank must ask.

    Args:
        tensors: parameters themselves, not detached: a detached one has lost its other parts.
    """
    return {name: _whole(tensor) for name, tensor in tensors.items()}


def _whole(tensor: Tensor) -> Tensor:
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().to("cpu", copy=True)
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor().cpu()
    return tensor.detach()


def is_sharded(tensor: Tensor) -> bool:
    """Whether this rank holds only a part of the tensor.

    >>> from torch import zeros
    >>> is_sharded(zeros(2))
    False
    """
    return hasattr(tensor, "ds_id") or isinstance(tensor, DTensor)
