"""Remote shards: http(s), s3, gs, hf and everything else that fsspec reads, cached on disk.

    pairs = ShardedPairs("s3://bucket/shards/pets")

Manifest and index are read first, a shard when one of its pairs is first needed. Shards are cached
in a folder that many processes may share, up to a size limit; the least recently used are removed
first. Files are verified against the checksum in the manifest, which is also their name.

Environment variables: METAEMBED_CACHE (a folder, ~/.cache/metaembed_pl) and
METAEMBED_CACHE_GB (50).
"""

import hashlib
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from metaembed_pl.errors import Unreachable, UserError
from metaembed_pl.files import new_file

ATTEMPTS = 3
"""To read a file, since connections break."""
WAIT_S = 1.0
"""Before the second attempt; doubled for each further one."""
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_BLOCK_BYTES = 2**24  # of one request, where the server sends parts


class RemoteFile(NamedTuple):
    """A remote file, with its size and checksum from the manifest."""

    url: str
    num_bytes: int
    sha256: str


class ShardCache:
    """Remote files, cached on disk.

    Files appear atomically; a file that several processes need is downloaded once.

    Args:
        folder: of the cache; only this class writes there.
        max_bytes: of all files. An open file may be removed: its reader can read on.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = Path(folder), max_bytes

    @classmethod
    def of_environment(cls) -> "ShardCache":
        """The cache that the environment variables define.

        Raises:
            UserError: METAEMBED_CACHE_GB is not a number above 0.
        """
        folder = os.environ.get("METAEMBED_CACHE") or "~/.cache/metaembed_pl"
        given = os.environ.get("METAEMBED_CACHE_GB") or "50"
        try:
            max_bytes = int(float(given) * 1e9)
        except (ValueError, OverflowError):
            max_bytes = 0
        if max_bytes <= 0:
            raise UserError(f"METAEMBED_CACHE_GB must be a number above 0, got {given!r}")
        return cls(Path(folder).expanduser(), max_bytes)

    def open(self, file: RemoteFile) -> BinaryIO:
        """Open a file, downloaded if it is not in the cache.

        Raises:
            Unreachable: it cannot be read, or differs from its manifest.
            UserError: it is larger than the cache may be.
        """
        path = self.folder / file.sha256
        while True:
            try:
                found = path.open("rb")
            except FileNotFoundError:
                self._fetch(file)  # another process may remove it at once: ask again
                continue
            os.utime(path)  # what was used last goes last
            return found

    def keep(self, file: RemoteFile) -> Path:
        """The path of a file that is never removed: an index, which is memory-mapped.

        Raises:
            Unreachable: as `open`.
        """
        path = self.folder / "indexes" / file.sha256
        with self.lock(file.sha256):
            if not path.exists():
                path.parent.mkdir(exist_ok=True)
                self._download(file, path)
        return path

    def _fetch(self, file: RemoteFile) -> None:
        if file.num_bytes > self.max_bytes:
            raise UserError(
                f"{file.url} has {file.num_bytes:,} bytes, more than the cache limit of "
                f"{self.max_bytes:,}: set METAEMBED_CACHE_GB higher"
            )
        path = self.folder / file.sha256
        with self.lock(file.sha256):
            if not path.exists():
                self._reserve(file)
                self._download(file, path)

    def _reserve(self, file: RemoteFile) -> None:
        """Remove old files, and reserve the space with a file of its size."""
        with self.lock("room"):
            _partial(self.folder / file.sha256).unlink(missing_ok=True)
            for partial in self.folder.glob("*.part"):
                self._remove_if_left(partial)
            cached = sorted(
                (stat.st_mtime_ns, stat.st_size, path) for path, stat in _files(self.folder)
            )
            free = self.max_bytes - sum(size for _, size, _ in cached) - file.num_bytes
            for _, size, path in cached:
                if free >= 0:
                    break
                if path.suffix != ".part":  # that is being read by another process
                    path.unlink(missing_ok=True)
                    free += size
            with _partial(self.folder / file.sha256).open("wb") as partial:
                partial.truncate(file.num_bytes)

    def _remove_if_left(self, partial: Path) -> None:
        """Remove an incomplete file whose process was killed, which has freed its lock."""
        from filelock import FileLock, Timeout

        try:
            with FileLock(self._lock_path(partial.stem), timeout=0):
                partial.unlink(missing_ok=True)
        except Timeout:
            pass

    def _download(self, file: RemoteFile, path: Path) -> None:
        partial = _partial(path)
        try:
            for attempt in range(ATTEMPTS):
                try:
                    _copy(file, partial)
                    os.replace(partial, path)
                    return
                except Exception as error:  # each kind of address has its own errors
                    reason = str(error) or type(error).__name__
                if attempt + 1 < ATTEMPTS:
                    time.sleep(WAIT_S * 2**attempt)
            raise Unreachable(f"{file.url} could not be read in {ATTEMPTS} attempts: {reason}")
        finally:
            partial.unlink(missing_ok=True)

    @contextmanager
    def lock(self, name: str) -> Iterator[None]:
        """Lock a name against other processes."""
        from filelock import FileLock

        self._lock_path(name).parent.mkdir(parents=True, exist_ok=True)
        with FileLock(self._lock_path(name)):
            yield

    def _lock_path(self, name: str) -> Path:
        return self.folder / "locks" / name


class RemoteFolder:
    """A remote folder of shards.

    Args:
        url: of the folder, such as `https://host/shards/pets`.
        cache: None: that of the environment.
    """

    def __init__(self, url: str, cache: ShardCache | None = None) -> None:
        self.url = url.rstrip("/")
        self.cache = cache or ShardCache.of_environment()
        self._files: dict[str, RemoteFile] = {}

    def read_bytes(self, name: str) -> bytes:
        """A small file, which is not cached.

        Raises:
            Unreachable: it cannot be read.
        """
        filesystem, path = filesystem_of(f"{self.url}/{name}")
        try:
            return filesystem.cat_file(path)
        except Exception as error:
            reason = str(error) or type(error).__name__
            raise Unreachable(f"{self.url}/{name} cannot be read: {reason}") from error

    def know(self, name: str, num_bytes: Any, sha256: Any) -> None:
        """Register a file of the manifest: only registered files are read.

        Raises:
            UserError: its name, size or checksum is not valid.
        """
        # Names become part of an address, checksums of a path on this machine.
        checks = isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)
        if not checks or type(num_bytes) is not int or not re.fullmatch(r"[\w.-]+", str(name)):
            raise UserError(
                f"{self.url}: its manifest names {name!r} with bytes {num_bytes!r} and sha256 "
                f"{sha256!r}: prepare the data again with this version"
            )
        self._files[name] = RemoteFile(f"{self.url}/{name}", num_bytes, sha256)

    def open(self, name: str) -> BinaryIO:
        """A shard."""
        return self.cache.open(self._known(name))

    def keep(self, name: str) -> Path:
        """The path of the index."""
        return self.cache.keep(self._known(name))

    def _known(self, name: str) -> RemoteFile:
        if name not in self._files:
            raise UserError(f"{self.url}: its manifest has no {name!r}: prepare the data again")
        return self._files[name]


def is_remote(folder: Path | str) -> bool:
    """Whether a folder is an address, not a path.

    >>> is_remote("s3://bucket/pets"), is_remote("data/pets")
    (True, False)
    """
    return "://" in str(folder)


def address_below(base: str, path: str) -> str:
    """The address of a file that remote data refer to; it may not leave their folder.

    >>> address_below("s3://bucket/pages", "images/1.png")
    's3://bucket/pages/images/1.png'

    Raises:
        UserError: the path leaves the folder, or is itself an address.
    """
    if is_remote(path) or path.startswith("/") or ".." in path.split("/") or "\0" in path:
        raise UserError(
            f"image {path!r} leaves {base}: give a path relative to the data file and below its "
            "folder"
        )
    return f"{base.rstrip('/')}/{path}"


def read_bytes(url: str) -> bytes:
    """The content of a small file.

    Raises:
        UserError: it cannot be read.
    """
    filesystem, path = filesystem_of(url)
    try:
        return filesystem.cat_file(path)
    except Exception as error:  # each kind of address has its own errors
        raise UserError(f"{url} cannot be read: {error or type(error).__name__}") from error


def kept_copy(url: str) -> Path:
    """A local copy of a remote file, downloaded each time, since it may have changed.

    Raises:
        Unreachable: it cannot be read.
    """
    cache, name = ShardCache.of_environment(), hashlib.sha256(url.encode()).hexdigest()
    copy = cache.folder / "files" / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    filesystem, path = filesystem_of(url)
    try:
        with cache.lock(name), new_file(copy) as temporary:
            filesystem.get_file(path, str(temporary))
    except Exception as error:  # each kind of address has its own errors
        raise Unreachable(f"{url} cannot be read: {error or type(error).__name__}") from error
    return copy


class _Differs(Exception):
    """A download differs from its manifest."""


def _copy(file: RemoteFile, target: Path) -> None:
    filesystem, path = filesystem_of(file.url)
    digest, num_bytes = hashlib.sha256(), 0
    # Not "wb", which would give up the reserved space.
    with (
        filesystem.open(path, "rb", block_size=_BLOCK_BYTES) as remote,
        target.open("r+b" if target.exists() else "wb") as local,
    ):
        while chunk := remote.read(2**20):
            num_bytes += len(chunk)
            if num_bytes > file.num_bytes:
                break
            digest.update(chunk)
            local.write(chunk)
        local.truncate()
        local.flush()
        os.fsync(local.fileno())  # its name must not outlive its bytes
    if num_bytes != file.num_bytes or digest.hexdigest() != file.sha256:
        raise _Differs(
            f"the download is not the {file.num_bytes:,} bytes that its manifest describes: it was "
            "changed or truncated"
        )


def filesystem_of(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of an address, and the path in it.

    Raises:
        UserError: no installed package can read it.
    """
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{url}: {error}; to read s3://, gs:// and https://: pip install metaembed-pl[remote]"
        ) from error


def _files(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    """The files of the cache; another process may be removing some."""
    for path in folder.iterdir():
        try:
            stat = path.stat()
        except FileNotFoundError:
            continue
        if path.is_file():
            yield path, stat


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")
