"""The manifest of a store: its settings, and the valid length of each of its files.

The files of a store only grow. A change appends to them, and then atomically replaces the manifest
by one that counts the new bytes as well. A change that is interrupted before has no effect, and
readers of the older manifest are not disturbed.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from metaembed_pl.budget import parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.files import new_file
from metaembed_pl.retrieval.searchable import VectorSpace

FORMAT, PROJECTED_FORMAT = 1, 2
"""Stores with a projection have the second: versions without projections must not search them."""
MANIFEST_FILE = "manifest.json"
DATA = re.compile(r"data-[0-9]{4,}")
DTYPES = ("fp32", "bf16", "fp16", "int8")


@dataclass(frozen=True)
class Manifest(VectorSpace):
    """One generation of a store.

    Args:
        dtype: of a stored vector's components.
        generation: counts the changes.
        data: the folder of the files; compaction begins a new one.
        num_rows: items that were ever added.
        num_deleted: how many of them were deleted or replaced since.
        rows_bytes: length of the file of ids and metadata.
        projection: digest of the projection's file; None: there is no projection.
    """

    dtype: str
    generation: int = 0
    data: str = "data-0000"
    num_rows: int = 0
    num_deleted: int = 0
    rows_bytes: int = 0
    projection: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            if field.type in (int, "int") and not (is_integer and value >= (field.name == "width")):
                raise UserError(f"a store's {field.name} cannot be {value!r}")
        if self.dtype not in DTYPES:
            raise UserError(f"a store's dtype is one of {', '.join(DTYPES)}; got {self.dtype!r}")
        # A name from a file is joined to a folder: it must not lead out of it.
        if not isinstance(self.data, str) or not DATA.fullmatch(self.data):
            raise UserError(f"a store's data cannot be {self.data!r}")
        if not isinstance(self.identity, str) or not self.identity:
            raise UserError(f"a store's identity cannot be {self.identity!r}")
        is_integer = all(type(width) is int and 0 < width < self.width for width in self.widths)
        if not (isinstance(self.widths, tuple) and is_integer):
            raise UserError(f"a store's widths cannot be {self.widths!r}")
        if not (self.projection is None or isinstance(self.projection, str)):
            raise UserError(f"a store's projection cannot be {self.projection!r}")

    @property
    def num_slots(self) -> int:
        """Vectors of an item."""
        return self.groups[-1].r_c

    @property
    def num_items(self) -> int:
        """Items that were not deleted."""
        return self.num_rows - self.num_deleted

    def write(self, folder: Path) -> None:
        """Make this the manifest of a store, atomically; it is on disk when this returns."""
        write_synced(folder / MANIFEST_FILE, json.dumps(self._to_json(), indent=2) + "\n")

    def _to_json(self) -> dict[str, Any]:
        value = {**asdict(self), "groups": [str(group) for group in self.groups]}
        for name in ("projection", "widths"):
            if not value[name]:
                del value[name]  # readable by older versions if not used
        value = {"format": FORMAT if self.projection is None else PROJECTED_FORMAT, **value}
        return value | {"checksum": checksum_of(value)}

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read the manifest of a store.

        Raises:
            UserError: there is no store, or its manifest was damaged or edited.
        """
        file = folder / MANIFEST_FILE
        try:
            value: Any = json.loads(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise UserError(
                f"{folder} is not a store: it has no {MANIFEST_FILE}; build one with `embed` in a "
                "new folder"
            ) from error
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} cannot be read: {error}") from error
        known = (FORMAT, PROJECTED_FORMAT)
        if not isinstance(value, dict) or value.get("format") not in known:
            raise UserError(f"{file} is not a store's manifest of format {FORMAT} or {known[1]}")
        checksum = value.pop("checksum", None)
        if checksum != checksum_of(value):
            raise UserError(
                f"{file} was edited or damaged: its checksum is {checksum!r:.24}..., its content's "
                "another; restore a copy, or embed the items again"
            )
        try:
            projected = value.pop("format") == PROJECTED_FORMAT
            if projected != (value.get("projection") is not None):
                raise UserError("its format does not say whether it has a projection")
            value["groups"] = parse_groups(value["groups"])
            value["widths"] = tuple(value.get("widths") or ())
            return cls(**value)
        except (KeyError, TypeError, UserError) as error:
            raise UserError(f"{file} is malformed: {error}") from error


def write_synced(file: Path, text: str) -> None:
    """Write a file atomically; it is on disk when this returns."""
    with new_file(file) as temporary:
        temporary.write_text(text)
        sync(temporary)
    sync(file.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk: a renamed file is not before."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum_of(value: dict[str, Any]) -> str:
    """The SHA-256 of what a file holds as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
