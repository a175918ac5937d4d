"""Rows of tables and the pictures they name: from the Hugging Face hub, or from a copy on disk.

A copy has the hub's own layout, as made by `hf download ID --repo-type dataset --local-dir FOLDER`:
Parquet or JSON Lines files, and pictures in zips or gzipped tars. The same code reads both: rows
are streamed through `datasets`; archives are files, which the hub client downloads once, with
resume.
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
"""Of one encoded picture: a small zip can unpack to gigabytes."""


def read_rows(where: str, files: str, columns: Iterable[str] = ()) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a dataset's files; pictures stay encoded.

    Args:
        where: an id on the hub, or a folder with the same files.
        files: path or pattern of its files, such as `ImageNet_1K/original-*.parquet`.
        columns: required columns.

    Raises:
        UserError: the package `datasets` is missing, or a file is missing, broken or lacks a
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
        # For a folder called parquet, json, ... `datasets` would read the current one instead.
        where = str(Path(where).resolve())
    elif "/" not in where:
        raise UserError(f"{where} is neither a folder nor a hub id ORG/NAME")
    try:
        rows = load_dataset(where, data_files={"rows": files}, split="rows", streaming=True)
        rows = rows.decode(False)  # pictures are checked elsewhere
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


def page_drafts(where: str, files: str, name: str) -> Iterator[dict[str, Any]]:
    """Drafts of pairs from rows with a `query` and the `image` of the page that answers it."""
    for number, row in enumerate(read_rows(where, files, ("query", "image"))):
        yield {
            "id": f"{name}:{number}",
            "query": {"text": row["query"]},
            "positive": {"image": (row["image"] or {}).get("bytes")},
        }


def fetch(where: str, file: str) -> Path | None:
    """The path of a file of a dataset, downloaded if necessary; None if there is none.

    Args:
        where: an id on the hub, or a folder.
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
    """A picture that a row refers to by its path.

    Args:
        name: the path in the row, such as `images/CIRR/train/a.jpg`.
        places: folders and zips to look in, in this order.
    """

    name: str
    places: tuple[Path, ...]

    def read(self) -> bytes:
        """The encoded picture.

        Raises:
            UserError: the path leaves the places, or there is no such picture.
        """
        path = PurePosixPath(self.name)
        if path.is_absolute() or ".." in path.parts or "\\" in self.name or "\0" in self.name:
            raise UserError(f"a picture's path leaves its folder: {self.name!r}")
        # The zips contain CIRR/..., but the rows say images/CIRR/...
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
    """Open a zip once per process, since that reads the list of its members."""
    return zipfile.ZipFile(path)


def unpack(parts: list[Path], folder: Path, below: str = "") -> Path:
    """Unpack a gzipped tar, perhaps in several parts, into a folder, unless it exists.

    Args:
        parts: the file, or its parts in order, which are streamed.
        folder: the output folder, which appears when it is complete.
        below: unpack only members with this prefix.

    Raises:
        UserError: it is not a complete gzipped tar, or contains links, devices or paths that leave
            the folder.
    """
    if folder.is_dir():
        return folder
    try:
        with new_folder(folder) as partial, ExitStack() as stack:
            joined = _Joined([stack.enter_context(part.open("rb")) for part in parts])
            with tarfile.open(fileobj=io.BufferedReader(joined, 2**20), mode="r|gz") as tar:
                for member in tar:
                    if member.isdir() or not member.name.removeprefix("./").startswith(below):
                        continue
                    if not member.isreg():
                        raise UserError(
                            f"{parts[0]}: {member.name!r} is a link or a device; archives of "
                            "pictures hold plain files only"
                        )
                    tar.extract(member, partial, filter="data")
    except (tarfile.TarError, EOFError) as error:
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
