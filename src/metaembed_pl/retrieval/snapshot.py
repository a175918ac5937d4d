"""One generation of a store, memory-mapped for reading; later changes do not affect it.

N: items ever added, including deleted ones    L: items that were not deleted
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Integer
from torch import Tensor

from metaembed_pl.budget import Budget
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.manifest import Manifest
from metaembed_pl.retrieval.mapped import MappedFiles
from metaembed_pl.retrieval.planes import Plane, map_planes, vector_bytes
from metaembed_pl.retrieval.rows import map_rows

DELETED_FILE = "deleted.i64"
ATTEMPTS = 5
FEW = 1000
"""Up to so many values of a column are read one by one: Arrow first joins all of its batches."""


class Matching:
    """The items to search: all of them, or those that pass a filter.

    Args:
        places: of the items, ascending.
        num_rows: number of places, including those of deleted items.
    """

    def __init__(self, places: Integer[Tensor, " N"], num_rows: int):
        self.places, self._num_rows = places, num_rows
        self._allowed: tuple[tuple[int, int], np.ndarray] | None = None

    def num_below(self, place: int) -> int:
        """The number of items before a place."""
        if place >= self._num_rows:
            return len(self.places)
        return int(torch.searchsorted(self.places, place))

    def allowed(self, num_rows: int, num_slots: int) -> np.ndarray | None:
        """A bit for each vector of the first rows, for an index; None: all vectors are allowed."""
        if len(self.places) == self._num_rows and num_rows <= self._num_rows:
            return None
        if self._allowed is None or self._allowed[0] != (num_rows, num_slots):
            found = np.zeros(num_rows, dtype=bool)
            found[self.places[: self.num_below(num_rows)].numpy()] = True
            bits = np.packbits(np.repeat(found, num_slots), bitorder="little")
            self._allowed = (num_rows, num_slots), bits
        return self._allowed[1]


@dataclass(frozen=True)
class Snapshot:
    """The contents of a store at one generation.

    Args:
        manifest: of this generation.
        planes: the vectors of all places, which are rows of the files.
        table: ids, metadata and previews of all places.
        places: of the items that were not deleted, ascending.
        files: the mapped files.
    """

    manifest: Manifest
    planes: list[Plane]
    table: pa.Table
    places: Integer[Tensor, " L"]
    files: MappedFiles

    @classmethod
    def open(cls, folder: Path) -> "Snapshot":
        """Map the newest generation of the store in a folder.

        Raises:
            UserError: there is no store, or a part of it is damaged or missing.
        """
        for attempt in range(ATTEMPTS):
            manifest = Manifest.read(folder)
            try:
                return cls.of(folder / manifest.data, manifest)
            except (UserError, OSError):
                # A compaction may have removed the files meanwhile: then there is a newer manifest.
                newer = Manifest.read(folder).generation != manifest.generation
                if not newer or attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    @classmethod
    def of(cls, data: Path, manifest: Manifest) -> "Snapshot":
        """Map the files in a folder of data, up to the lengths in the manifest.

        Raises:
            UserError: a file is damaged or missing.
        """
        there = np.ones(manifest.num_rows, dtype=bool)
        files = MappedFiles(data)
        deleted = files.tensor(DELETED_FILE, (manifest.num_deleted,), torch.int64).numpy()
        if len(deleted) and not 0 <= deleted.min() <= deleted.max() < manifest.num_rows:
            raise UserError(f"{data / DELETED_FILE} is damaged: it names rows that are not there")
        there[deleted] = False
        places = torch.from_numpy(np.flatnonzero(there))
        if len(places) != manifest.num_items:
            raise UserError(f"{data / DELETED_FILE} is damaged: it names a row twice")
        planes, table = map_planes(files, manifest), map_rows(files, manifest)
        return cls(manifest, planes, table, places, files)

    def item_bytes(self, budget: Budget) -> int:
        """The bytes of an item's vectors that a search at a budget reads."""
        return budget.r_c * vector_bytes(self.manifest, budget.width)

    @cached_property
    def every(self) -> Matching:
        """All items."""
        return Matching(self.places, self.manifest.num_rows)

    @cached_property
    def ids(self) -> list[str]:
        """The ids of all items."""
        return self.column("id", self.places)

    def column(self, name: str, places: Integer[Tensor, " _"]) -> list:
        """Values of a column of the table."""
        column = self.checked(name)
        # Compare the lengths first: a search needs ten values of a million.
        is_all = len(places) == len(column) and torch.equal(places, torch.arange(len(column)))
        try:
            if len(places) <= FEW:
                return [column[place].as_py() for place in places.tolist()]
            return (column if is_all else column.take(pa.array(places.numpy()))).to_pylist()
        except (pa.ArrowException, MemoryError, UnicodeDecodeError, IndexError) as error:
            raise UserError(f"the column {name!r} of a store's rows is damaged: {error}") from error

    def checked(self, name: str) -> pa.ChunkedArray:
        """A column of the table, validated once: Arrow follows damaged offsets.

        Raises:
            UserError: it is damaged.
        """
        checked = self.__dict__.setdefault("checked_columns", {})
        if name not in checked:
            try:
                self.table[name].validate(full=True)
            except (pa.ArrowException, MemoryError) as error:
                raise UserError(f"the column {name!r} of a store's rows is damaged") from error
            checked[name] = self.table[name]
        return checked[name]

    def rows_of(self, places: Integer[Tensor, "..."]) -> Integer[Tensor, "..."]:
        """The rows of the items at these places."""
        return torch.searchsorted(self.places, places.contiguous())
