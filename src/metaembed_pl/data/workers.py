"""DataLoader workers: their number, and a clear error when shared memory is full."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from metaembed_pl.errors import UserError

OUT_OF_SHARED_MEMORY = re.compile(r"shared memory|Bus error|/torch_\d+.*No space left")


class Loader(DataLoader):
    """A DataLoader with a clear error if its workers run out of shared memory.

    Args:
        setting: for the message: the setting that turns workers off.
    """

    def __init__(self, *args: Any, setting: str = "data.num_workers: 0", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.collate_fn = partial(_in_shared_memory, self.collate_fn)
        self._setting = setting

    def __iter__(self) -> Iterator[Any]:
        return explained(super().__iter__(), self._setting)


def _in_shared_memory(collate: Callable[[Any], Any], rows: Any) -> Any:
    """The batch, moved to shared memory by the worker itself.

    The thread that sends it would drop a batch that does not fit, and the run would wait for it
    forever.
    """
    batch = collate(rows)
    if get_worker_info() is not None:
        _share(batch)
    return batch


def _share(value: Any) -> None:
    if isinstance(value, Tensor):
        value.share_memory_()
    elif is_dataclass(value):
        _share([getattr(value, field.name) for field in fields(value)])
    elif isinstance(value, dict):
        _share(list(value.values()))
    elif isinstance(value, list | tuple):
        for part in value:
            _share(part)


def explained(batches: Iterator[Any], setting: str) -> Iterator[Any]:
    """The same batches, with a one-line error if shared memory is full."""
    try:
        yield from batches
    except RuntimeError as error:
        if not OUT_OF_SHARED_MEMORY.search(str(error)):
            raise
        size = shutil.disk_usage("/dev/shm").total / 2**30
        raise UserError(
            f"the workers' batches do not fit into shared memory (/dev/shm has {size:.2f} GiB): "
            f"start the container with --shm-size=16g, or set {setting}"
        ) from error


def workers_for(num_ranks: int) -> int:
    """Worker processes per rank, with so many ranks on this machine; each rank keeps a core."""
    return max(1, min(8, (os.cpu_count() or 1) // num_ranks - 1))
