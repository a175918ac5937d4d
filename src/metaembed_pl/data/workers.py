"""DataLoader workers: how many, and what to do where they have no room to hand things over."""

import os
import re
import shutil
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from metaembed_pl.errors import UserError

OUT_OF_SHARED_MEMORY = re.compile(r"shared memory|Bus error|/torch_\d+.*No space left")


class Loader(DataLoader):
    """A DataLoader whose workers may run out of shared memory.

    Args:
        setting: what to set so that there are no workers, for the message.
    """

    def __init__(self, *args: Any, setting: str = "data.num_workers: 0", **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._setting = setting

    def __iter__(self) -> Iterator[Any]:
        return explained(super().__iter__(), self._setting)


def explained(batches: Iterator[Any], setting: str) -> Iterator[Any]:
    """The same batches; workers that have no room to hand them over are told in one line."""
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
    """Worker processes a rank, of so many ranks on this machine: one core is the rank's own."""
    return max(1, min(8, (os.cpu_count() or 1) // num_ranks - 1))
