"""Files: checked when read, written atomically, with permissions from the umask."""

import errno
import fcntl
import json
import os
import re
import shutil
import socket
import tempfile
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from metaembed_pl.errors import UserError, causes


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A temporary sibling folder that takes the name `path` when the block ends without an error.

    A link is followed: the folder may be on another disk.

    Raises:
        UserError: `path` exists, or was made meanwhile, and is not an empty folder, and is not to
            be overwritten.
    """
    path = path.resolve() if path.is_symlink() else path
    exists = f"{path} exists already: choose another folder"
    if path.exists() and not (overwrite or is_empty(path)):
        raise UserError(exists)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        share(temporary)
        if overwrite and path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.replace(path, old / path.name)
            os.replace(temporary, path)
            shutil.rmtree(old)
        else:
            try:
                os.replace(temporary, path)  # replaces an empty folder, and no other
            except OSError as error:
                if not path.exists():
                    raise
                raise UserError(exists) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_empty(folder: Path) -> bool:
    """Whether there is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """A temporary sibling file that takes the name `path` when the block ends without an error."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        share(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically."""
    with new_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def only_process(folder: Path, doing: str) -> Iterator[None]:
    """Keep other processes from working in a folder; a killed process releases its lock.

    Args:
        folder: created if it does not exist, and removed again if it stays empty.
        doing: what this process does, for the error message of the others.

    Raises:
        UserError: another process has the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("a+") as file:
        try:
            # The lock is this process's alone: workers that outlive it for a moment do not hold it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            raise UserError(f"another process {doing} ({file.read() or 'starting'})") from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            if [*folder.iterdir()] == [path]:
                path.unlink()
                folder.rmdir()


def share(path: Path) -> None:
    """Give a file, or a folder and its contents, the permissions of the user's umask.

    Temporary folders, and files of safetensors, are otherwise only readable by their owner.
    """
    umask = os.umask(0)
    os.umask(umask)
    for each in (path, *path.rglob("*")):
        if not each.is_symlink():
            each.chmod((0o777 if each.is_dir() else 0o666) & ~umask)


def refuse_special_file(path: Path, what: str = "") -> None:
    """Refuse pipes, devices and folders: reading some of them would block forever.

    Args:
        path: to be read.
        what: the expected content, such as "image".

    Raises:
        UserError: it exists and is not a plain file.
    """
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a pipe or a device"
        named = f"the {what} {path}" if what else str(path)
        raise UserError(f"{named} is not a plain file, but {kind}")


def read_json_object(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, or is not an object; names the file.
    """
    refuse_special_file(file)
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}: restore or rebuild it") from error
    if not isinstance(value, dict):
        raise UserError(f"{file} must hold a JSON object, not {type(value).__name__}")
    return value


def read_lines(path: Path) -> Iterator[tuple[int, int, str]]:
    """The number, the first byte and the text of each line.

    Raises:
        UserError: the file cannot be read; names file and line.
    """
    refuse_special_file(path)
    start = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                # utf-8-sig: editors on Windows put a byte order mark before the first line.
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
                yield number, start, text
                start += len(line)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8: {error}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def as_on_disk(path: Path) -> Path:
    """The path of a file whose name on disk has another Unicode normalisation.

    macOS writes e and an accent as two characters, where a caption file may have one.
    """
    if str(path).isascii() or os.path.lexists(path):
        return path
    return _names(as_on_disk(path.parent)).get(unicodedata.normalize("NFC", path.name), path)


@lru_cache(maxsize=64)
def _names(folder: Path) -> dict[str, Path]:
    """The files of a folder, by their composed names."""
    try:
        return {unicodedata.normalize("NFC", path.name): path for path in folder.iterdir()}
    except OSError:
        return {}


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)
# Libraries hide the system's messages in errors of their own.
_SAID = re.compile(
    "|".join(os.strerror(number) for number in (*_FULL, *_FORBIDDEN)) + "|disk is full"
)


def disk_error(error: BaseException | None) -> str | None:
    """The error of a disk, and what to do about it; None: the error has another cause.

    Searches the error, and the errors that it was raised from.

    >>> disk_error(OSError(errno.EROFS, "Read-only file system", "shelf/a"))
    'shelf/a: Read-only file system: choose a writable place, or change its permissions'
    """
    for each in causes(error):
        number = each.errno if isinstance(each, OSError) else None
        said = _SAID.search(str(each))
        if number in (*_FULL, *_FORBIDDEN) or said:
            file = f"{each.filename}: " if isinstance(each, OSError) and each.filename else ""
            said = os.strerror(number) if number else said[0] if said else ""
            if number in _FORBIDDEN or said in map(os.strerror, _FORBIDDEN):
                return f"{file}{said}: choose a writable place, or change its permissions"
            return f"{file}{said}: free some space, then run it again"
        if isinstance(each, OSError) and each.filename and each.strerror:
            return f"{each.filename}: {each.strerror}"
    return None
