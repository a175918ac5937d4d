"""Write shards into a temporary folder that is renamed when complete.

Consecutive pairs with the same positive are questions about one candidate: they become one sample,
which contains the candidate once.
"""

import io
import json
import shutil
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from metaembed_pl.data.shard_index import FORMAT, INDEX_FILE, MANIFEST_FILE, scan_shards, sha256_of
from metaembed_pl.errors import UserError
from metaembed_pl.files import write_text
from metaembed_pl.item import Item, Pair

PROGRESS_FILE = "progress.json"
QUESTIONS_PER_SAMPLE = 32
"""Further questions begin another sample, since reading one of them reads the JSON of all."""
_SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "jpg": b"\xff\xd8\xff"}


class ShardWriter:
    """Writes pairs to a folder of shards; used in a `with` block.

    The folder appears when the block ends without an error, complete, or not at all.

    Args:
        folder: the output folder.
        name: of the source, in metrics and logs.
        pairs_per_shard: a new tar begins after so many pairs.
        licence: for the manifest, like the next three; they travel with the data.
        attribution: whom to name.
        source: where the data come from.
        note: anything else.
        settings: how the shards were made, for the manifest.
        overwrite: replace existing shards.
        resume: continue after the complete shards of a killed run with the same settings.

    Attributes:
        record: the script's own state, such as how many rows it has read. It is saved with every
            complete shard, restored when a run resumes, and written to the manifest.

    Raises:
        UserError: the folder is not empty, or no pair was written.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        pairs_per_shard: int = 1000,
        licence: str = "",
        attribution: str = "",
        source: str = "",
        note: str = "",
        settings: dict[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.pairs_per_shard = pairs_per_shard
        self.resume = resume
        self.record: dict[str, Any] = {}
        self._describe = {
            "name": name,
            "licence": licence,
            "attribution": attribution,
            "source": source,
            "note": note,
            "settings": settings or {},
        }
        self._partial = self.folder.with_name(f".{self.folder.name}.partial")
        self._counts: list[int] = []
        self._held: list[_EncodedPair] = []  # questions to one candidate, not written yet
        self._record_then: str = ""  # when the last of them came
        self._file: Any = None
        self._tar: Any = None
        if self.folder.exists() and any(self.folder.iterdir()):
            if not overwrite:
                raise UserError(f"{self.folder} is not empty: choose another, or allow overwriting")
            # Overwriting removes the folder, so it must be one of ours.
            if not (self.folder / MANIFEST_FILE).exists():
                raise UserError(
                    f"{self.folder} has no {MANIFEST_FILE}: not a folder of shards, so not "
                    "overwritten"
                )

    def __enter__(self) -> "ShardWriter":
        if not (self.resume and self._recall()):
            shutil.rmtree(self._partial, ignore_errors=True)  # left by a run that was killed
            self._partial.mkdir(parents=True)
        return self

    @property
    def num_pairs(self) -> int:
        """Pairs written so far, including those of a resumed run."""
        return sum(self._counts) + len(self._held)

    def write(self, pair: Pair) -> None:
        """Add a pair. PNG, JPEG and WebP files keep their bytes; other pictures become PNG.

        Before this call, `record` must include this pair, so that a run can resume after it.

        Raises:
            UserError: a picture cannot be read; names the pair.
        """
        is_next = bool(self._held) and _is_same_candidate(pair, self._held[0].pair)
        if not is_next or len(self._held) == QUESTIONS_PER_SAMPLE:
            self._write_held()
        try:
            self._held.append(_encoded_pair(pair, self._held[0].positive if self._held else None))
        except UserError as error:
            raise UserError(f"pair {pair.id!r}: {error}") from error
        self._record_then = json.dumps(self.record)

    def _write_held(self) -> None:
        """Write the sample that is complete."""
        if not self._held:
            return
        # Ids may hold dots and slashes, which mean something in a member's name: keys are numbers.
        key = f"{sum(self._counts):08d}"
        self._open_shard().write({"__key__": key, **_members(self._held)})
        self._counts[-1] += len(self._held)
        self._held = []
        if self._counts[-1] >= self.pairs_per_shard:
            self._close_shard()
            self._save_progress()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._write_held()
            self._close_shard()
            if error is None:
                if not self._counts:
                    raise UserError(f"no pairs were written to {self.folder}")
                self._describe_shards()
                (self._partial / PROGRESS_FILE).unlink(missing_ok=True)
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                self._partial.rename(self.folder)
        finally:
            # A fault of the data would happen again; an interruption would not.
            if not self.resume or error is None or isinstance(error, UserError):
                shutil.rmtree(self._partial, ignore_errors=True)

    def _recall(self) -> bool:
        """Continue what a killed run left; False if there is nothing, or settings differ."""
        try:
            progress = json.loads((self._partial / PROGRESS_FILE).read_bytes())
            if progress["describe"] != json.loads(json.dumps(self._describe)):
                return False
            counts, record = progress["counts"], progress["record"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        complete = {f"{number:05d}.tar" for number in range(len(counts))}
        if not all((self._partial / name).exists() for name in complete):
            return False
        for file in self._partial.glob("*.tar"):
            if file.name not in complete:
                file.unlink()
        self._counts, self.record = counts, record
        return True

    def _save_progress(self) -> None:
        record = json.loads(self._record_then)
        progress = {"describe": self._describe, "counts": self._counts, "record": record}
        write_text(self._partial / PROGRESS_FILE, json.dumps(progress))

    def _open_shard(self) -> Any:
        """The tar for the next pair."""
        if self._tar is not None:
            return self._tar
        # webdataset imports torch: deferred, so that reading alone stays light.
        from webdataset.writer import TarWriter

        self._file = (self._partial / f"{len(self._counts):05d}.tar").open("wb")
        # A fixed time makes equal pairs equal shards, checksum and all.
        self._tar = TarWriter(self._file, encoder=False, mtime=0)
        # tarfile's default looks in each header for what only its pax form can hold: our names
        # are short and plain, and headers take a third of the time of writing small pairs.
        self._tar.tarstream.format = tarfile.USTAR_FORMAT
        self._counts.append(0)
        return self._tar

    def _close_shard(self) -> None:
        if self._tar is not None:
            self._tar.close()
            self._file.close()
            self._tar = None

    def _describe_shards(self) -> None:
        files = sorted(self._partial.glob("*.tar"))
        lines = scan_shards(self._partial, [file.name for file in files])
        index = self._partial / INDEX_FILE
        index.write_bytes(b"".join(lines.values()))
        shards = [
            {
                "file": file.name,
                "num_pairs": count,
                "bytes": file.stat().st_size,
                "sha256": sha256_of(file),
            }
            for file, count in zip(files, self._counts, strict=True)
        ]
        manifest = {
            "format": FORMAT,
            "num_pairs": sum(self._counts),
            **self._describe,
            "index": {"bytes": index.stat().st_size, "sha256": sha256_of(index)},
            **({"record": self.record} if self.record else {}),
            "shards": shards,
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (self._partial / MANIFEST_FILE).write_text(text, encoding="utf-8")


class _EncodedItem(NamedTuple):
    """An item's JSON and its encoded picture."""

    value: dict[str, Any]
    picture: bytes | None = None
    extension: str = ""


class _EncodedPair(NamedTuple):
    pair: Pair
    query: _EncodedItem
    positive: _EncodedItem
    negatives: list[_EncodedItem]


def _is_same_candidate(one: Pair, other: Pair) -> bool:
    """Whether two pairs have the same positive, however well it answered each of them."""
    positives = (pair.positive.answering(pair.positive.answers) for pair in (one, other))
    return next(positives) == next(positives)


def _encoded_pair(pair: Pair, positive: _EncodedItem | None) -> _EncodedPair:
    """Encode a pair's pictures; `positive` is given if it was encoded before."""
    return _EncodedPair(
        pair,
        _encoded(pair.query),
        positive or _encoded(pair.positive),
        [_encoded(negative) for negative in pair.negatives],
    )


def _encoded(item: Item) -> _EncodedItem:
    if item.image is None:
        return _EncodedItem(item.to_json())
    return _EncodedItem(item.to_json(), *encoded_image(item))


def _members(pairs: list[_EncodedPair]) -> dict[str, bytes]:
    """The members of a sample by suffix: its JSON and its encoded pictures."""
    members: dict[str, bytes] = {}

    def add(item: _EncodedItem, stem: str) -> dict[str, Any]:
        if item.picture is None:
            return item.value
        # Naming the member in the JSON lets a reader notice that it is missing.
        name = f"{stem}.{item.extension}"
        members[name] = item.picture
        return {**item.value, "image": name}

    def question(encoded: _EncodedPair, prefix: str, with_negatives: bool = True) -> dict[str, Any]:
        value: dict[str, Any] = {"id": encoded.pair.id}
        if encoded.pair.asks is not None:
            value["asks"] = encoded.pair.asks
        value["query"] = add(encoded.query, f"query{prefix}")
        if prefix and encoded.pair.positive.score is not None:
            value["positive_score"] = encoded.pair.positive.score
        if with_negatives:
            stem = f"query{prefix}.negative" if prefix else "negative"
            value["negatives"] = negatives(encoded, stem)
        return value

    def negatives(encoded: _EncodedPair, stem: str) -> list[dict[str, Any]]:
        return [add(item, f"{stem}.{n}") for n, item in enumerate(encoded.negatives)]

    first = pairs[0]
    value: dict[str, Any]
    if len(pairs) == 1:
        value = question(first, "") | {"positive": add(first.positive, "positive")}
    else:
        # Hard negatives of all its questions belong to the candidate, and are stored once.
        shared = all(pair.pair.negatives == first.pair.negatives for pair in pairs)
        value = {
            "queries": [question(pair, f".{n}", not shared) for n, pair in enumerate(pairs)],
            "negatives": negatives(first, "negative") if shared else [],
            "positive": _without_score(add(first.positive, "positive")),
        }
    if first.pair.positive.id is None and first.positive.picture is not None:
        value["candidate"] = first.pair.positive.uid  # so that readers need not hash the picture
    members["json"] = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return members


def _without_score(item: dict[str, Any]) -> dict[str, Any]:
    """The item without its score, which each question has for itself."""
    return {key: value for key, value in item.items() if key != "score"}


def encoded_image(item: Item) -> tuple[bytes, str]:
    """The item's encoded picture and its suffix; formats other than PNG, JPEG, WebP become PNG.

    Raises:
        UserError: the picture cannot be read, or does not decode where it must become PNG.
    """
    content = item.image_content() if isinstance(item.image, (bytes, Path)) else b""
    for extension, signature in _SIGNATURES.items():
        if content.startswith(signature):
            return content, extension
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return content, "webp"
    buffer = io.BytesIO()
    picture = item.load_image()
    assert picture is not None, "an item without a picture has nothing to encode"
    picture.save(buffer, format="PNG")
    return buffer.getvalue(), "png"
