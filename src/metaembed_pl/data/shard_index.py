"""The manifest and the index next to the shards, read and checked."""

import hashlib
import json
import logging
import mmap
import os
import re
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, as_id, stable_hash

log = logging.getLogger(__name__)

FORMAT = 2
"""1 had one question a sample."""
READABLE_FORMATS = (1, 2)
MANIFEST_FILE = "manifest.json"
INDEX_FILE = "index.jsonl"

# WebDataset's rule: the key ends at the first dot of the base name.
_MEMBER = re.compile(r"^((?:.*/|)[^./]+)[.]([^/]*)$")


class Place(NamedTuple):
    """The location of a pair.

    Args:
        shard: its file.
        key: its sample.
        spans: offset and size of each member of the sample, by suffix.
        question: its number among the sample's questions.
        candidate: `stable_hash` of the positive's uid; None if that would require its picture.
    """

    shard: str
    key: str
    spans: dict[str, list[int]]
    question: int = 0
    candidate: int | None = None


class IndexLines:
    """One JSON line per pair: `["00000.tar", "00000000", {"json": [512, 87], ...}, 0, 81624]`.

    The number of its question and its candidate come last; lines of format 1 lack both. Lines are
    parsed when needed. A file is memory-mapped, so that ranks share its pages.

    Args:
        path: an index file; or
        lines: its content.
    """

    def __init__(self, path: Path | None = None, lines: bytes = b"") -> None:
        self._path, self._lines, self._map = path, lines, None
        # One comparison over the entire buffer: about 0.1 s for a million lines.
        content = self._content()
        ends = np.flatnonzero(np.frombuffer(content, dtype=np.uint8) == ord("\n"))
        self._starts = np.concatenate([np.zeros(1, np.int64), ends + 1])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i: int) -> Place:
        if not -len(self) <= i < len(self):
            raise IndexError(f"pair {i} of {len(self)}")
        i %= len(self)
        line = self._content()[self._starts[i] : self._starts[i + 1]]
        try:
            place = Place(*json.loads(line))
            numbers = [n for o, s in place.spans.values() for n in (o, s)]
            numbers += [place.question, *([] if place.candidate is None else [place.candidate])]
            # A shard name from a file is joined to a folder: it must not lead out of it.
            is_plain = os.path.basename(place.shard) == place.shard and type(place.key) is str
            if is_plain and all(type(n) is int and n >= 0 for n in numbers):
                return place
        except (ValueError, TypeError, AttributeError):
            pass
        raise UserError(f"{self._path}:{i + 1}: not a line of an index; delete {INDEX_FILE}")

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_map": None}  # a map cannot be pickled; it is opened again

    def _content(self) -> bytes | mmap.mmap:
        if self._map is None:
            if self._path is None or self._path.stat().st_size == 0:
                return self._lines
            with self._path.open("rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map


def read_manifest(folder: Path, shards: list[str]) -> dict[str, Any] | None:
    """Read a folder's manifest and check it against the shard files; None if there is none.

    Raises:
        UserError: there are no shards, or the manifest is malformed or disagrees with them.
    """
    if not shards:
        below = sorted({str(shard.parent) for shard in folder.rglob("*.tar")})
        fix = f"choose one of {', '.join(below)}" if below else "prepare the data first"
        raise UserError(f"no shards (*.tar) in {folder}: {fix}")
    path = folder / MANIFEST_FILE
    if not path.exists():
        if (folder / INDEX_FILE).exists():
            raise UserError(f"{path} is missing beside its {INDEX_FILE}: prepare the data again")
        return None
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    manifest = parse_manifest(content, str(path))
    sizes = {shard["file"]: shard["bytes"] for shard in manifest["shards"]}
    if sorted(sizes) != shards:
        differing = sorted(set(sizes).symmetric_difference(shards))[0]
        raise UserError(f"{path} and the folder disagree on {differing!r}: prepare the data again")
    for file, size in sizes.items():
        found = (folder / file).stat().st_size
        if found != size:
            raise UserError(
                f"{folder / file} has {found} bytes, its manifest says {size}: "
                "copy or prepare it again"
            )
    return manifest


def parse_manifest(content: bytes, where: str) -> dict[str, Any]:
    """Read a manifest, and check it against itself.

    Raises:
        UserError: it is malformed; names its place, `where`.
    """
    try:
        manifest = json.loads(content)
        _check_manifest(manifest)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        reason = str(error) or type(error).__name__
        raise UserError(f"{where} is malformed ({reason}): prepare the data again") from error
    return manifest


def scan_shards(folder: Path, shards: list[str]) -> dict[str, bytes]:
    """Read the headers of tar shards, and the JSON of each sample, into index lines, by shard.

    Raises:
        UserError: a file is not a complete uncompressed tar, or contains links, devices or paths
            that leave the folder.
    """
    return {shard: _index_lines(folder / shard) for shard in shards}


def sha256_of(path: Path) -> str:
    """Return a file's SHA-256 in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_manifest(manifest: dict[str, Any]) -> None:
    if manifest["format"] not in READABLE_FORMATS:
        known = " and ".join(map(str, READABLE_FORMATS))
        raise ValueError(f"its format is {manifest['format']!r}; this version reads {known}")
    if not isinstance(manifest["name"], str):
        raise ValueError("its name must be a string")
    if not isinstance(manifest.get("index", {}), dict):
        raise ValueError("its index must be an object")
    for shard in manifest["shards"]:
        if type(shard["file"]) is not str or Path(shard["file"]).name != shard["file"]:
            raise ValueError(f"{shard['file']!r} is not a valid shard name")
        for count in (shard["num_pairs"], shard["bytes"]):
            if type(count) is not int or count < 0:
                raise ValueError(f"{shard['file']} has {count!r} instead of a number")
    if sum(shard["num_pairs"] for shard in manifest["shards"]) != manifest["num_pairs"]:
        raise ValueError("num_pairs is not the sum over its shards")


def _index_lines(path: Path) -> bytes:
    size = path.stat().st_size
    samples: list[tuple[str, dict[str, list[int]]]] = []
    questions: dict[int, tuple[int, int | None]] = {}
    left_out: list[str] = []
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                _refuse_odd(path, member, size)
                match = _MEMBER.match(member.name)
                if match is None or member.name.startswith("__"):
                    left_out.append(member.name)
                    continue  # as WebDataset does: no suffix, or its own notes
                # JSON cannot hold names that are not UTF-8.
                key = os.fsencode(match[1]).decode("utf-8", "backslashreplace")
                suffix = os.fsencode(match[2].lower()).decode("utf-8", "backslashreplace")
                if not samples or samples[-1][0] != key:
                    samples.append((key, {}))
                if suffix in samples[-1][1]:
                    raise UserError(f"{path}: two members {key}.{suffix}: which is meant?")
                samples[-1][1][suffix] = [member.offset_data, member.size]
                if suffix == "json":
                    file = tar.extractfile(member)
                    questions[len(samples) - 1] = _questions(file.read() if file else b"")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a complete, uncompressed tar: {error}") from error
    if left_out:
        log.warning(
            "%s: %d members belong to no pair, such as %r", path, len(left_out), left_out[0]
        )
    lines = []
    for number, sample in enumerate(samples):
        count, candidate = questions.get(number, (1, None))
        lines += [(path.name, *sample, question, candidate) for question in range(count)]
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def _refuse_odd(path: Path, member: tarfile.TarInfo, size: int) -> None:
    escapes = ".." in member.name.split("/") or member.name.startswith("/")
    if not member.isreg() or escapes:
        raise UserError(
            f"{path}: member {member.name!r} is a link, a device or an escaping path; shards "
            "contain only plain files"
        )
    if member.offset_data + member.size > size:
        raise tarfile.ReadError(f"{member.name} is truncated")


def _questions(content: bytes) -> tuple[int, int | None]:
    """The number of a sample's questions, and its candidate if the JSON identifies it.

    A broken sample counts as one question, and is reported when it is read.
    """
    count = 1
    try:
        value = json.loads(content)
        queries, positive = value.get("queries"), value["positive"]
        count = len(queries) if isinstance(queries, list) and queries else 1
        if isinstance(value.get("candidate"), str):
            return count, stable_hash(value["candidate"])
        if isinstance(positive, dict) and isinstance(as_id(positive.get("id")), str):
            return count, stable_hash(as_id(positive["id"]))
        if isinstance(positive, dict) and positive.get("image"):
            return count, None
        return count, stable_hash(Item.parse(positive).uid)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
        return count, None
