"""Memory-mapped files of a store: nothing is read before it is used.

The system kills a process (SIGBUS) that reads past the end of a mapped file. A store does not
truncate files that are being read, but users or a running copy may: so the size of each file is
checked before each read. That takes a microsecond.
"""

import mmap
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from metaembed_pl.errors import UserError


class MappedFiles:
    """Files of a folder, mapped read-only: a store may be larger than memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._mapped: list[mmap.mmap] = []

    def content(self, name: str, size: int) -> mmap.mmap | bytes:
        """The first `size` bytes of a file.

        Raises:
            UserError: the file is shorter.
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
        """The first values of a file.

        Raises:
            UserError: the file has fewer.
        """
        size = dtype.itemsize * int(np.prod(shape))
        content = self.content(name, size)
        if not size:
            return torch.empty(shape, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the tensor is read-only
            return torch.frombuffer(content, dtype=dtype).view(shape)

    def are_whole(self) -> bool:
        """Whether no mapped file was truncated."""
        return all(mapped.size() >= len(mapped) for mapped in self._mapped)
