"""Pairs in tar shards: written once, read at random by offset, never extracted.

A shard is a WebDataset tar. One pair is `KEY.json` (the pair, without its pictures) and the
encoded pictures as `KEY.query.png`, `KEY.positive.jpg`, `KEY.negative.0.webp`, ... Beside the
shards lie `manifest.json` (counts, bytes, checksums, source, licence) and `index.jsonl` (one
line a pair: shard, key and where each member lies).

    with ShardWriter(Path("shards/pets"), "pets", licence="CC0-1.0") as writer:
        for pair in read_pairs(Path("pets.jsonl")):
            writer.write(pair)
    pairs = ShardedPairs(Path("shards/pets"))
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from metaembed_pl.data.shard_index import (
    INDEX_FILE,
    MANIFEST_FILE,
    IndexLines,
    read_manifest,
    scan_shards,
    sha256_of,
)
from metaembed_pl.data.shard_writer import ShardWriter
from metaembed_pl.errors import BadSample, UserError
from metaembed_pl.item import Pair

__all__ = ["ShardWriter", "ShardedPairs", "verify"]

_PICTURE_EXTENSIONS = ("png", "jpg", "jpeg", "webp")


class ShardedPairs(Sequence[Pair]):
    """The pairs of a folder of shards, by number.

    Nothing stays open and the index is mapped, not loaded: an instance is cheap to send to
    DataLoader workers, and a million pairs take 8 MB.

    Args:
        folder: what `ShardWriter` made, or any folder of WebDataset tars with the members above:
            without manifest and index these are scanned, which reads every tar header once.

    Raises:
        UserError: missing or empty folder, manifest that disagrees with the files, broken tar.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise UserError(f"no folder of shards at {self.folder}: prepare the data first")
        shards = sorted(path.name for path in self.folder.glob("*.tar"))
        manifest = read_manifest(self.folder, shards)
        index = self.folder / INDEX_FILE
        if manifest and index.exists():
            self._index = IndexLines(path=index)
            _check_index(self._index, manifest, index)
        else:
            scanned = scan_shards(self.folder, shards)
            self._index = IndexLines(lines=b"".join(scanned.values()))
            manifest = manifest or _manifest_of(self.folder.name, scanned)
        self.manifest: dict[str, Any] = manifest
        self.name: str = manifest["name"]
        self.shard_sizes: list[int] = [shard["num_pairs"] for shard in manifest["shards"]]
        if not len(self):
            raise UserError(f"the shards in {self.folder} hold no pairs: prepare the data again")

    def __len__(self) -> int:
        return len(self._index)

    def locate(self, i: int) -> tuple[str, str]:
        """Return the shard file and the key of pair `i`."""
        shard, key, _ = self._index[i]
        return shard, key

    def __getitem__(self, i: int) -> Pair:
        """Read pair `i`; its images stay encoded.

        Raises:
            BadSample: its JSON or a member is missing, broken or cut off.
        """
        shard, key, spans = self._index[i]
        try:
            return _assemble(key, self._read_members(shard, spans))
        except (UserError, OSError) as error:
            raise BadSample(shard, key, str(error)) from error

    def _read_members(self, shard: str, spans: dict[str, list[int]]) -> dict[str, bytes]:
        members = {}
        # Opened anew each time (some 20 us): no handle to share over forks, threads or pickles.
        with (self.folder / shard).open("rb") as file:
            file_size = os.fstat(file.fileno()).st_size
            for suffix, (offset, size) in spans.items():
                if offset + size > file_size:
                    raise UserError(f"{suffix} is cut off: the shard ends at byte {file_size}")
                file.seek(offset)
                members[suffix] = file.read(size)
        return members


def verify(folder: Path) -> None:
    """Compare every shard with the checksum in its manifest.

    Raises:
        UserError: names the first shard that differs.
    """
    folder = Path(folder)
    for shard in ShardedPairs(folder).manifest["shards"]:
        if "sha256" not in shard:
            raise UserError(f"{folder} has no {MANIFEST_FILE}, so nothing to check against")
        if sha256_of(folder / shard["file"]) != shard["sha256"]:
            raise UserError(
                f"{folder / shard['file']} does not have the checksum of {MANIFEST_FILE}: "
                "copy or prepare it again"
            )


def _check_index(index: IndexLines, manifest: dict[str, Any], path: Path) -> None:
    """Check the first and last line of each shard, which shows a mixed-up index at once."""
    start, fits = 0, len(index) == manifest["num_pairs"]
    for shard in manifest["shards"]:
        end = start + shard["num_pairs"]
        fits = fits and all(index[i][0] == shard["file"] for i in {start, end - 1} if start < end)
        start = end
    if not fits:
        raise UserError(
            f"{path} disagrees with {MANIFEST_FILE}: delete it, or prepare the data again"
        )


def _manifest_of(name: str, scanned: dict[str, bytes]) -> dict[str, Any]:
    shards = [{"file": f, "num_pairs": lines.count(b"\n")} for f, lines in scanned.items()]
    return {"name": name, "num_pairs": sum(s["num_pairs"] for s in shards), "shards": shards}


def _assemble(key: str, members: dict[str, bytes]) -> Pair:
    """Put a pair together from its members, by suffix."""
    if "json" not in members:
        raise UserError("no member .json")
    try:
        value = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"its JSON is broken: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"its JSON must be an object, not {type(value).__name__}")
    for side in ("query", "positive"):
        value[side] = _with_picture(value.get(side), side, members)
    negatives = value.get("negatives")
    negatives = [] if negatives is None else negatives
    if not isinstance(negatives, list):
        raise UserError(f'"negatives" must be a list, not {type(negatives).__name__}')
    count = max(len(negatives), _count_negatives(members))
    negatives += [None] * (count - len(negatives))
    value["negatives"] = [
        _with_picture(negative, f"negative.{n}", members) for n, negative in enumerate(negatives)
    ]
    return Pair.parse(value, default_id=key)


def _with_picture(value: object, stem: str, members: dict[str, bytes]) -> object:
    """Give an item its picture; one named by the JSON must be a member, never another file."""
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


def _count_negatives(members: dict[str, bytes]) -> int:
    numbers = [suffix.split(".")[1] for suffix in members if suffix.startswith("negative.")]
    return max((int(n) + 1 for n in numbers if n.isdecimal() and len(n) < 4), default=0)
