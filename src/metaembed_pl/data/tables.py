"""Rows of Parquet files, on disk or at any address that fsspec reads: hf://, s3://, https://.

    table = Table.open("hf://datasets/ORG/NAME")     # or a file, a folder, a pattern with *
    for where, row in table.rows(["query", "image"]):
        ...

Row groups are read one after the other, so a table may be larger than memory. The number of rows
comes from the footer of each file. Pictures stay encoded.
"""

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from metaembed_pl.data.remote import filesystem_of, is_remote
from metaembed_pl.errors import Unreachable, UserError, first_line

SUFFIX = ".parquet"
ROWS_AT_A_TIME = 256  # pictures and all
CONVERTED = "@refs%2Fconvert%2Fparquet"
"""The hub's branch with its conversion of a dataset from another format."""


@dataclass(frozen=True)
class Table:
    """Parquet files with the same columns.

    Args:
        files: paths or addresses, in order.
    """

    files: tuple[str, ...]

    @classmethod
    def open(cls, where: str | Path, pattern: str = "*") -> "Table":
        """The Parquet files at a place.

        Args:
            where: a file, a folder, or the address of one; an address may hold `*`.
            pattern: that the path of a file below the folder must match.

        Raises:
            UserError: there are none, or they cannot be read.
        """
        files = _at_address(str(where)) if is_remote(where) else _on_disk(Path(where))
        chosen = [file for file in files if fnmatch.fnmatch(file, f"*{pattern}")]
        if not chosen:
            some = f"; there are {len(files)} others, such as {files[0]}" if files else ""
            wanted = "" if pattern == "*" else f" that match {pattern}"
            raise UserError(f"{where} holds no Parquet files{wanted}{some}")
        return cls(tuple(chosen))

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of the first file, with their types."""
        with _opened(self.files[0]) as file:
            return file.schema_arrow

    @cached_property
    def num_rows(self) -> int:
        """Rows of all files."""
        count = 0
        for path in self.files:
            with _opened(path) as file:
                count += file.metadata.num_rows
        return count

    @property
    def columns(self) -> list[str]:
        """Names of the columns."""
        return self.schema.names

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """The rows one by one, each with its place, `FILE:NUMBER`.

        Raises:
            UserError: a file is damaged, or lacks a column.
        """
        for path in self.files:
            with _opened(path) as file:
                found = file.schema_arrow.names
                missing = [name for name in columns if name not in found]
                if missing:
                    has = f"it has {', '.join(found)}"
                    raise UserError(f"{path} has no column {missing[0]!r}; {has}")
                batches = file.iter_batches(ROWS_AT_A_TIME, columns=list(columns))
                rows = (row for batch in batches for row in batch.to_pylist())
                for number, row in enumerate(rows, start=1):
                    yield f"{path}:{number}", row


def parse_columns(text: str | None) -> dict[str, str] | None:
    """The mapping of columns that a command line gives.

    >>> parse_columns("query=question,positive_image=page")
    {'query': 'question', 'positive_image': 'page'}

    Raises:
        UserError: it is no mapping, or names a key twice.
    """
    if text is None:
        return None
    parts = [part.partition("=") for part in text.split(",")]
    if not all(key.strip() and name.strip() for key, _, name in parts):
        raise UserError(f"--columns takes KEY=COLUMN,... such as text=caption; got {text!r}")
    found = {key.strip(): name.strip() for key, _, name in parts}
    if len(found) < len(parts):
        raise UserError(f"--columns names a key twice: {text!r}")
    return found


def picture_bytes(cell: Any) -> Any:
    """The bytes or the path of a picture, from a cell in the format of the hub's files."""
    if isinstance(cell, Mapping):
        return cell.get("bytes") or cell.get("path")
    return cell


@contextmanager
def _opened(path: str) -> Iterator[parquet.ParquetFile]:
    try:
        if is_remote(path):
            filesystem, inner = filesystem_of(path)
            with filesystem.open(inner, "rb") as raw, parquet.ParquetFile(raw) as file:
                yield file
        else:
            with parquet.ParquetFile(path) as file:
                yield file
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not a complete Parquet file: {first_line(error)}") from error


def _on_disk(path: Path) -> list[str]:
    if path.is_file():
        return [str(path)]
    return sorted(str(file) for file in path.rglob(f"*{SUFFIX}") if file.is_file())


def _at_address(url: str) -> list[str]:
    if url.endswith(SUFFIX) and "*" not in url:
        return [url]
    places = [url] if "*" in url else [f"{url.rstrip('/')}/**/*{SUFFIX}"]
    if url.startswith("hf://datasets/") and "*" not in url and "@" not in url:
        name, _, below = url.removeprefix("hf://datasets/").rstrip("/").partition("/")
        owner, _, inner = below.partition("/")
        if not inner:
            places.append(f"hf://datasets/{name}/{owner}{CONVERTED}/**/*{SUFFIX}")
    scheme = url.partition("://")[0]
    for place in places:
        filesystem, inner = filesystem_of(place)
        try:
            found = sorted(filesystem.glob(inner))
        except Exception as error:  # each kind of address has its own errors
            raise Unreachable(f"{url} cannot be listed: {first_line(error)}") from error
        if found:
            return [file if is_remote(file) else f"{scheme}://{file}" for file in map(str, found)]
    return []
