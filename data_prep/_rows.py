"""Rows of tables and the pictures they name: from the Hugging Face hub, or from a copy on disk.

A copy has the hub's own layout: what `hf download ID --repo-type dataset --local-dir FOLDER`
makes, with Parquet or JSON Lines files and pictures in zips or gzipped tars. Both are read by the
same code: rows through `datasets`, streamed; archives as files, which the hub client downloads
once and goes on with after a break.
"""

import io
import tarfile
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from metaembed_pl.errors import Unreachable, UserError
from metaembed_pl.files import new_folder

MAX_BYTES = 200_000_000
"""Of one encoded picture: a zip of some kB can hold gigabytes."""


def read_rows(where: str, files: str, columns: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of a dataset's files one by one; pictures stay encoded.

    Args:
        where: an id of the hub, or a folder with the same files.
        files: path or pattern of the files in it, as in `ImageNet_1K/original-*.parquet`.
        columns: what every row must have.

    Raises:
        UserError: the package `datasets` is missing, no such file, a broken one, or one without a
            column.
        Unreachable: the hub cannot be reached.
    """
    try:
        from datasets import load_dataset
        from datasets.exceptions import DataFilesNotFoundError
        from datasets.utils.logging import disable_progress_bar, set_verbosity_error
    except ImportError as error:
        raise UserError(
            "reading Parquet files and the hub takes the package datasets: "
            "run pip install 'metaembed-pl[hub]'"
        ) from error
    disable_progress_bar()
    set_verbosity_error()
    if Path(where).is_dir():
        # Of a folder called parquet, json, ... `datasets` would read the current one instead.
        where = str(Path(where).resolve())
    elif "/" not in where:
        raise UserError(f"{where} is neither a folder nor a hub id ORG/NAME")
    try:
        rows = load_dataset(where, data_files={"rows": files}, split="rows", streaming=True)
        rows = rows.decode(False)  # the bytes are what we want: they are checked elsewhere
        missing = set(columns) - set(rows.column_names or columns)
        if missing:
            raise UserError(
                f"{where}: {files} has no column {min(missing)!r}; "
                f"it has {', '.join(rows.column_names or [])}"
            )
        yield from rows
    except (DataFilesNotFoundError, FileNotFoundError) as error:
        raise UserError(f"{where} has no file {files}: is --from right?") from error
    except UserError:
        raise
    except (OSError, TimeoutError) as error:
        raise Unreachable(f"cannot read {files} of {where}: {error}") from error
    except ValueError as error:  # pyarrow's errors of broken files are of this kind
        raise UserError(f"{where}: {files} cannot be read: {error}") from error


def fetch(where: str, file: str) -> Path | None:
    """Return a file of a dataset as a path, downloaded if need be; None if there is none.

    Args:
        where: an id of the hub, or a folder.
        file: its path there.

    Raises:
        Unreachable: the hub cannot be reached.
    """
    if Path(where).is_dir():
        path = Path(where) / file
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(where, file, repo_type="dataset"))
    except LocalEntryNotFoundError as error:
        raise Unreachable(
            f"cannot download {file} of {where}: the hub cannot be reached"
        ) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise Unreachable(f"cannot download {file} of {where}: {error}") from error


@dataclass(frozen=True)
class Named:
    """A picture that a row names by its path.

    Args:
        name: the path in the row, as in `images/CIRR/train/a.jpg`.
        places: folders and zips to look in, in this order.
    """

    name: str
    places: tuple[Path, ...]

    def read(self) -> bytes:
        """Return the encoded picture.

        Raises:
            UserError: a path that leaves the places, or nothing there of this name.
        """
        path = PurePosixPath(self.name)
        if path.is_absolute() or ".." in path.parts or "\\" in self.name or "\0" in self.name:
            raise UserError(f"a picture's path leaves its folder: {self.name!r}")
        # The zips hold CIRR/..., the rows say images/CIRR/...: archives were packed in there.
        bare = PurePosixPath(*path.parts[path.parts[:1] in {("images",), ("image",)} :])
        names = dict.fromkeys(map(str, (path, bare, "images" / bare)))
        for place in self.places:
            for name in names:
                content = _read_from(place, name)
                if content is not None:
                    return content
        raise UserError(f"picture not found: {self.name}")


def _read_from(place: Path, name: str) -> bytes | None:
    try:
        if place.suffix == ".zip":
            archive = _open_zip(place)
            size = archive.getinfo(name).file_size
            if size > MAX_BYTES:
                raise UserError(f"picture is refused: {name} unpacks to {size:,} bytes")
            return archive.read(name)
        path = place / name
        if not path.resolve().is_relative_to(place.resolve()):
            raise UserError(f"a picture's path leaves its folder through a link: {name!r}")
        return path.read_bytes()
    except (KeyError, FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"picture cannot be read: {name} in {place.name} ({error})") from error


@lru_cache(maxsize=32)
def _open_zip(path: Path) -> zipfile.ZipFile:
    """Open a zip once a process: the list of its members is read only then."""
    return zipfile.ZipFile(path)


def unpack(parts: list[Path], folder: Path, below: str = "") -> Path:
    """Unpack a gzipped tar, perhaps in several parts, into a folder; once, then it is kept.

    Args:
        parts: the file, or its parts in order. They are read one after the other, never joined.
        folder: where its files go; appears when all of them are there.
        below: only members whose path starts so.

    Raises:
        UserError: not a complete gzipped tar, or one with links, devices or paths that escape.
    """
    if folder.is_dir():
        return folder
    try:
        with new_folder(folder) as partial, ExitStack() as stack:
            whole = _Joined([stack.enter_context(part.open("rb")) for part in parts])
            with tarfile.open(fileobj=io.BufferedReader(whole, 2**20), mode="r|gz") as tar:
                for member in tar:
                    if member.isdir() or not member.name.removeprefix("./").startswith(below):
                        continue
                    if not member.isreg():
                        raise UserError(
                            f"{parts[0]}: {member.name!r} is a link or a device; archives of "
                            "pictures hold plain files only"
                        )
                    tar.extract(member, partial, filter="data")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{parts[0]} is not a complete gzipped tar: {error}") from error
    return folder


class _Joined(io.RawIOBase):
    """Several files read as one."""

    def __init__(self, files: list[BinaryIO]) -> None:
        self._files = files

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while self._files:
            content = self._files[0].read(len(buffer))
            if content:
                buffer[: len(content)] = content
                return len(content)
            self._files.pop(0)
        return 0
