"""Files of a store in memory: nothing is read before it is used.

Who reads what a file no longer has is killed by the system (SIGBUS), without a word. A store's own
changes never make a file shorter that somebody reads, but a copy that is under way may, or a hand:
so before something is read, each file is asked for its size. That takes a microsecond.
"""

import mmap
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metaembed_pl.errors import UserError


class MappedFiles:
    """Files of a folder, mapped for reading alone: a store may be larger than the memory.

    Args:
        folder: theirs.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._mapped: list[mmap.mmap] = []

    def content(self, name: str, size: int) -> mmap.mmap | bytes:
        """The beginning of a file.

        Raises:
            UserError: it is shorter.
        """
        file = self.folder / name
        found = file.stat().st_size if file.exists() else 0
        if found < size:
            raise UserError(
                f"{file} has {found:,} bytes, its store's manifest counts {size:,}: "
                "it was cut off or lost; restore a copy, or embed the items again"
            )
        if not size:
            return b""
        with file.open("rb") as opened:
            mapped = mmap.mmap(opened.fileno(), size, access=mmap.ACCESS_READ)
        self._mapped.append(mapped)
        return mapped

    def tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A file's first values.

        Raises:
            UserError: it has fewer.
        """
        size = dtype.itemsize * int(np.prod(shape))
        content = self.content(name, size)
        if not size:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # that it is not writable: nobody writes
            return torch.frombuffer(content, dtype=dtype).view(shape)

    def are_whole(self) -> bool:
        """Whether all that was mapped is still there to be read."""
        return all(mapped.size() >= len(mapped) for mapped in self._mapped)
