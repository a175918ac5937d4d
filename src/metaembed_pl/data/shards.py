"""Pairs in tar shards: written once, read at random by offset, never extracted.

A shard is a WebDataset tar. One pair is `KEY.json` (the pair, without its pictures) and the
encoded pictures as `KEY.query.png`, `KEY.positive.jpg`, `KEY.negative.0.webp`, ... Several pairs
that share their positive are one sample: its JSON has a list of `queries`, each with its own id,
asks and hard negatives; their pictures are `KEY.query.2.png` and `KEY.query.2.negative.0.webp`. The
folder also has `manifest.json` (counts, bytes, checksums, source, licence) and `index.jsonl` (one
line per pair: shard, key, offset and size of each member, question and candidate).

    with ShardWriter(Path("shards/pets"), "pets", licence="CC0-1.0") as writer:
        for pair in read_pairs(Path("pets.jsonl")):
            writer.write(pair)
    pairs = ShardedPairs(Path("shards/pets"))
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Int

from metaembed_pl.data.remote import RemoteFolder, is_remote
from metaembed_pl.data.shard_index import (
    INDEX_FILE,
    MANIFEST_FILE,
    IndexLines,
    Place,
    parse_manifest,
    read_manifest,
    scan_shards,
    sha256_of,
)
from metaembed_pl.data.shard_writer import ShardWriter
from metaembed_pl.errors import BadSample, Unreachable, UserError
from metaembed_pl.item import Item, Pair, parse_json, stable_hash

__all__ = ["ShardWriter", "ShardedPairs", "verify"]

Choose = Callable[[int], Iterable[int]]
"""Chooses among so many hard negatives: the numbers of those to keep."""

HEAD_BYTES = 2**16
"""Of a picture: enough for its size, which follows the metadata of cameras and editors."""
_PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


class ShardedPairs(Sequence[Pair]):
    """The pairs of a folder of shards, by number.

    No file stays open and the index is memory-mapped: an instance is cheap to send to DataLoader
    workers, and a million pairs take 8 MB.

    Args:
        folder: written by `ShardWriter`, or any folder of WebDataset tars with the members above:
            without manifest and index they are scanned, which reads every tar header once. Or the
            address of a folder that `ShardWriter` wrote, such as `s3://bucket/pets`: see remote.py.

    Raises:
        UserError: the folder is missing or empty, its manifest disagrees with the files, or a tar
            is broken.
    """

    def __init__(self, folder: Path | str) -> None:
        self._remote = RemoteFolder(str(folder)) if is_remote(folder) else None
        self.folder = Path(folder) if self._remote is None else self._remote.url
        self.manifest, self._index = self._open() if self._remote is None else self._open_remote()
        self._last: _Sample | None = None
        manifest = self.manifest
        self.name: str = manifest["name"]
        self.shard_sizes: list[int] = [shard["num_pairs"] for shard in manifest["shards"]]
        if not len(self):
            raise UserError(f"the shards in {self.folder} contain no pairs: prepare the data again")

    def _open(self) -> tuple[dict[str, Any], IndexLines]:
        folder = Path(self.folder)
        if not folder.is_dir():
            raise UserError(f"no folder of shards at {folder}: prepare the data first")
        shards = sorted(path.name for path in folder.glob("*.tar"))
        for shard in shards:
            if not (folder / shard).is_file():  # reading a pipe would wait for ever
                raise UserError(f"{folder / shard} is not a plain file: copy or prepare it again")
        manifest = read_manifest(folder, shards)
        if manifest and (folder / INDEX_FILE).exists():
            return manifest, _checked_index(folder / INDEX_FILE, manifest)
        scanned = scan_shards(folder, shards)
        index = IndexLines(lines=b"".join(scanned.values()))
        return manifest or _manifest_of(folder.name, scanned), index

    def _open_remote(self) -> tuple[dict[str, Any], IndexLines]:
        assert self._remote is not None
        where = f"{self.folder}/{MANIFEST_FILE}"
        manifest = parse_manifest(self._remote.read_bytes(MANIFEST_FILE), where)
        # A remote folder cannot always be listed, and scanning it would read all of it.
        for file in ({**manifest.get("index", {}), "file": INDEX_FILE}, *manifest["shards"]):
            self._remote.know(file["file"], file.get("bytes"), file.get("sha256"))
        return manifest, _checked_index(self._remote.keep(INDEX_FILE), manifest)

    def __len__(self) -> int:
        return len(self._index)

    def locate(self, i: int) -> tuple[str, str]:
        """The shard file and the key of pair `i`."""
        place = self._index[i]
        return place.shard, place.key

    def __getitem__(self, i: int) -> Pair:
        """Read pair `i`; its images stay encoded.

        Raises:
            BadSample: its JSON or a member is missing, broken or truncated.
            Unreachable: its shard is remote and cannot be read.
        """
        return self.read(i)

    def read(self, i: int, choose: Choose | None = None, picture_bytes: int | None = None) -> Pair:
        """Read pair `i` with some of its hard negatives; the others are not read.

        Consecutive reads of pairs of one sample share its JSON and their positive.

        Args:
            i: its number.
            choose: chooses the hard negatives to keep; None keeps all.
            picture_bytes: read only the first so many bytes of each picture: enough for its size.

        Raises:
            BadSample, Unreachable: as `pairs[i]`.
        """
        place = self._index[i]
        try:
            sample = self._last
            if picture_bytes is not None:
                sample = _Sample(place, self._open_shard, picture_bytes)
            elif sample is None or (sample.shard, sample.key) != (place.shard, place.key):
                sample = self._last = _Sample(place, self._open_shard)
            return _assemble(sample, place, choose)
        except Unreachable:
            raise
        except (UserError, OSError) as error:
            raise BadSample(place.shard, place.key, str(error)) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_last": None}

    def candidate_numbers(self) -> Int[np.ndarray, " N"]:
        """The number of each pair's candidate: pairs with the same number share their positive.

        The numbers come from the index. Shards of older versions are read once instead, and a pair
        that cannot be read does not share its positive.
        """
        found = []
        for i in range(len(self)):
            candidate = self._index[i].candidate
            if candidate is None:
                try:
                    candidate = stable_hash(self[i].positive.uid)
                except BadSample:
                    candidate = -1 - i
            found.append(candidate)
        return np.unique(np.array(found, dtype=np.int64), return_inverse=True)[1]

    def _open_shard(self, shard: str) -> BinaryIO:
        if self._remote is not None:
            return self._remote.open(shard)
        return open(os.path.join(self.folder, shard), "rb")


def verify(folder: Path) -> None:
    """Compare every shard with its checksum in the manifest.

    Raises:
        UserError: a shard differs; names the first one.
    """
    folder = Path(folder)
    for shard in ShardedPairs(folder).manifest["shards"]:
        if "sha256" not in shard:
            raise UserError(f"{folder} has no {MANIFEST_FILE}, so it cannot be verified")
        if sha256_of(folder / shard["file"]) != shard["sha256"]:
            raise UserError(
                f"{folder / shard['file']} does not have the checksum of {MANIFEST_FILE}: "
                "copy or prepare it again"
            )


def _checked_index(path: Path, manifest: dict[str, Any]) -> IndexLines:
    """Open an index and check the first and last line of each shard, to detect a mixed-up one."""
    index = IndexLines(path=path)
    start, fits = 0, len(index) == manifest["num_pairs"]
    for shard in manifest["shards"]:
        end = start + shard["num_pairs"]
        fits = fits and all(
            index[i].shard == shard["file"] for i in {start, end - 1} if start < end
        )
        start = end
    if not fits:
        raise UserError(
            f"{path} disagrees with {MANIFEST_FILE}: delete it, or prepare the data again"
        )
    return index


def _manifest_of(name: str, scanned: dict[str, bytes]) -> dict[str, Any]:
    shards = [{"file": f, "num_pairs": lines.count(b"\n")} for f, lines in scanned.items()]
    return {"name": name, "num_pairs": sum(s["num_pairs"] for s in shards), "shards": shards}


class _Sample(Mapping[str, bytes]):
    """A sample of a shard: its members by suffix, each read when it is needed."""

    def __init__(
        self,
        place: Place,
        open_shard: Callable[[str], BinaryIO],
        picture_bytes: int | None = None,
    ) -> None:
        self._picture_bytes = picture_bytes
        self.shard, self.key = place.shard, place.key
        self._spans, self._open_shard = place.spans, open_shard
        if "json" not in self:
            raise UserError("no member .json")
        content = self["json"]
        try:
            value = parse_json(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"its JSON is broken: {error}") from error
        if not isinstance(value, dict):
            raise UserError(f"its JSON must be an object, not {type(value).__name__}")
        self.value: dict[str, Any] = value

    @cached_property
    def positive(self) -> Item | None:
        value: Any = _with_picture(self.value.get("positive"), "positive", self)
        return None if value is None else Item.parse(value)

    def __getitem__(self, suffix: str) -> bytes:
        offset, size = self._spans[suffix]
        # Opened anew each time (some 20 us): no handle to share over forks, threads or pickles.
        with self._open_shard(self.shard) as file:
            file_size = os.fstat(file.fileno()).st_size
            if offset + size > file_size:
                raise UserError(f"{suffix} is truncated: the shard ends at byte {file_size}")
            file.seek(offset)
            if self._picture_bytes is not None and suffix != "json":
                size = min(size, self._picture_bytes)
            return file.read(size)

    def __iter__(self) -> Iterator[str]:
        return iter(self._spans)

    def __len__(self) -> int:
        return len(self._spans)

    def __contains__(self, suffix: object) -> bool:
        return suffix in self._spans


def _assemble(sample: _Sample, place: Place, choose: Choose | None) -> Pair:
    """Assemble a pair from its sample's members."""
    value, stem, shared = {**sample.value}, "", []
    value.pop("candidate", None)
    if "queries" in value:
        shared = _negatives_of(value, "negative", sample)
        stem = f"query.{place.question}"
        value = {**_question_of(value, place.question), "positive": value.get("positive")}
    own = _negatives_of(value, f"{stem}.negative" if stem else "negative", sample)
    negatives = [*own, *shared]
    if choose is not None:
        negatives = [negatives[n] for n in choose(len(negatives))]
    value["query"] = _with_picture(value.get("query"), stem or "query", sample)
    value["positive"] = _positive_of(sample, value.pop("positive_score", None) if stem else None)
    value["negatives"] = [_with_picture(*negative, sample) for negative in negatives]
    return Pair.parse(value, default_id=f"{place.key}/{place.question}" if stem else place.key)


def _positive_of(sample: _Sample, score: Any) -> Item | None:
    """The positive, with its score for a question."""
    if sample.positive is None or score is None:
        return sample.positive
    return replace(sample.positive, score=score)


def _question_of(sample: dict[str, Any], number: int) -> dict[str, Any]:
    queries = sample["queries"]
    if not isinstance(queries, list) or number >= len(queries):
        raise UserError(f'"queries" must be a list of more than {number} questions')
    if not isinstance(queries[number], dict):
        raise UserError(
            f"question {number} must be an object, not {type(queries[number]).__name__}"
        )
    if unknown := set(sample) - {"queries", "positive", "negatives"}:
        raise UserError(f"a sample with queries has the unknown key {min(unknown)!r}")
    return dict(queries[number])


def _negatives_of(value: dict[str, Any], stem: str, members: _Sample) -> list[tuple[object, str]]:
    """The hard negatives in the JSON or among the members of a stem, each with its own stem."""
    negatives = value.get("negatives")
    negatives = [] if negatives is None else negatives
    if not isinstance(negatives, list):
        raise UserError(f'"negatives" must be a list, not {type(negatives).__name__}')
    count = max(len(negatives), _count_negatives(stem, members))
    negatives = [*negatives, *[None] * (count - len(negatives))]
    return [(negative, f"{stem}.{n}") for n, negative in enumerate(negatives)]


def _with_picture(value: object, stem: str, members: _Sample) -> object:
    """An item with its picture; a picture named in the JSON must be a member, not another file."""
    if isinstance(value, str):
        value = {"text": value}
    if not isinstance(value, dict | None):
        return value
    picture = next(
        (members[f"{stem}.{e}"] for e in _PICTURE_EXTENSIONS if f"{stem}.{e}" in members), None
    )
    if picture is not None:
        return {**(value or {}), "image": picture}
    if value and value.get("image") is not None:
        raise UserError(f"member {stem}.{{{','.join(_PICTURE_EXTENSIONS)}}} is missing")
    return value


def _count_negatives(stem: str, members: Iterable[str]) -> int:
    found = [suffix for suffix in members if suffix.startswith(f"{stem}.")]
    numbers = [suffix.removeprefix(f"{stem}.").split(".")[0] for suffix in found]
    return max((int(n) + 1 for n in numbers if n.isdecimal() and len(n) < 4), default=0)
