"""Writing shards: into a folder beside the final one, renamed when whole."""

import io
import json
import shutil
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

from metaembed_pl.data.shard_index import FORMAT, INDEX_FILE, MANIFEST_FILE, scan_shards, sha256_of
from metaembed_pl.errors import UserError
from metaembed_pl.files import write_text
from metaembed_pl.item import Item, Pair

PROGRESS_FILE = "progress.json"
_SIGNATURES = {"png": b"\x89PNG\r\n\x1a\n", "jpg": b"\xff\xd8\xff"}


class ShardWriter:
    """Writes pairs to a folder of shards; used in a `with` block.

    The folder appears when the block ends without an error, complete, or not at all.

    Args:
        folder: where the shards shall stand.
        name: the source's name: metrics and logs show it.
        pairs_per_shard: after so many pairs a new tar begins.
        licence, attribution, source, note: for the manifest, so that they travel with the data.
        settings: how the shards were made, for the manifest.
        overwrite: replace shards that stand there already.
        resume: go on with the whole shards of a run of the same settings that was killed.

    Attributes:
        record: what the writing script wants to remember, such as how many rows it has read. It
            is saved with every whole shard, is back after a kill, and goes into the manifest.

    Raises:
        UserError: the folder holds something already, or no pair was written.
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
        self._file: Any = None
        self._tar: Any = None
        if self.folder.exists() and any(self.folder.iterdir()):
            if not overwrite:
                raise UserError(f"{self.folder} is not empty: choose another or ask to overwrite")
            # Overwriting removes the folder, so it must be one of ours.
            if not (self.folder / MANIFEST_FILE).exists():
                raise UserError(f"{self.folder} holds no {MANIFEST_FILE}: not shards to overwrite")

    def __enter__(self) -> "ShardWriter":
        if not (self.resume and self._recall()):
            shutil.rmtree(self._partial, ignore_errors=True)  # left by a run that was killed
            self._partial.mkdir(parents=True)
        return self

    @property
    def num_pairs(self) -> int:
        """Pairs written, those of a resumed run among them."""
        return sum(self._counts)

    def write(self, pair: Pair) -> None:
        """Add a pair. PNG, JPEG and WebP files keep their bytes; other pictures become PNG.

        To resume, `record` must say before this call how far the script is with this pair.

        Raises:
            UserError: a picture that cannot be read; names the pair.
        """
        try:
            members = _members(pair)
        except UserError as error:
            raise UserError(f"pair {pair.id!r}: {error}") from error
        # Ids may hold dots and slashes, which mean something in a member's name: keys are numbers.
        key = f"{self.num_pairs:08d}"
        self._open_shard().write({"__key__": key, **members})
        self._counts[-1] += 1
        if self._counts[-1] == self.pairs_per_shard:
            self._close_shard()
            self._save_progress()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close_shard()
        try:
            if error is None:
                if not self._counts:
                    raise UserError(f"no pairs were written to {self.folder}")
                self._describe_shards()
                (self._partial / PROGRESS_FILE).unlink(missing_ok=True)
                if self.folder.exists():
                    shutil.rmtree(self.folder)
                self._partial.rename(self.folder)
        finally:
            # What went wrong with the data would go wrong again; what cut us off would not.
            if not self.resume or error is None or isinstance(error, UserError):
                shutil.rmtree(self._partial, ignore_errors=True)

    def _recall(self) -> bool:
        """Take over what a killed run left; False if there is nothing, or it was another run."""
        try:
            progress = json.loads((self._partial / PROGRESS_FILE).read_bytes())
            if progress["describe"] != json.loads(json.dumps(self._describe)):
                return False
            counts, record = progress["counts"], progress["record"]
        except (OSError, ValueError, KeyError, TypeError):
            return False
        whole = {f"{number:05d}.tar" for number in range(len(counts))}
        if not all((self._partial / name).exists() for name in whole):
            return False
        for file in self._partial.glob("*.tar"):
            if file.name not in whole:
                file.unlink()
        self._counts, self.record = counts, record
        return True

    def _save_progress(self) -> None:
        progress = {"describe": self._describe, "counts": self._counts, "record": self.record}
        write_text(self._partial / PROGRESS_FILE, json.dumps(progress))

    def _open_shard(self) -> Any:
        """Return the tar that takes the next pair."""
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


def _members(pair: Pair) -> dict[str, bytes]:
    """Return the members of a pair by suffix: its JSON and its encoded pictures."""
    value: dict[str, Any] = {"id": pair.id}
    if pair.asks is not None:
        value["asks"] = pair.asks
    members: dict[str, bytes] = {}
    value["query"] = _add_item(pair.query, "query", members)
    value["positive"] = _add_item(pair.positive, "positive", members)
    value["negatives"] = [
        _add_item(negative, f"negative.{n}", members) for n, negative in enumerate(pair.negatives)
    ]
    members["json"] = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return members


def _add_item(item: Item, stem: str, members: dict[str, bytes]) -> dict:
    """Return an item's JSON; its picture, if any, goes to `members` and is named in the JSON."""
    value = item.to_json()
    if item.image is not None:
        content, extension = encoded_image(item)
        # Naming the member in the JSON lets a reader notice that it is missing.
        value["image"] = f"{stem}.{extension}"
        members[value["image"]] = content
    return value


def encoded_image(item: Item) -> tuple[bytes, str]:
    """The item's picture as a file holds it, and the file's suffix; what we cannot name is PNG.

    Raises:
        UserError: a picture that cannot be read, or, where it becomes PNG, does not decode.
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
