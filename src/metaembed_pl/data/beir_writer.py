"""Write a retrieval set to disk; beir.py describes the layout."""

import hashlib
import json
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from metaembed_pl.data.beir_reader import CORPUS, HEADER, MANIFEST, QUERIES, read_retrieval_set
from metaembed_pl.data.shard_writer import encoded_image
from metaembed_pl.errors import UserError
from metaembed_pl.files import new_folder
from metaembed_pl.item import Item

_OURS = ("_id", "text", "image", "title", "instruction")


class RetrievalSetWriter:
    """Writes a retrieval set, item by item; used in a `with` block.

    The folder appears when the block ends without an error, complete and verified, or not at all.
    Pictures are named by their content, so that repeated ones are stored once.

    Args:
        folder: the output folder.
        name: of the set, in metrics.
        split: of the judgements and lists.
        licence: for the manifest, like the next three; they travel with the data.
        attribution: whom to name.
        source: where the data come from.
        note: anything else.
        settings: how the set was made, for the manifest.
        overwrite: replace an existing set.

    Raises:
        UserError: the folder exists, or is not a retrieval set that may be overwritten; at the end
            of the block, any fault that `read_retrieval_set` finds.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        split: str = "test",
        licence: str = "",
        attribution: str = "",
        source: str = "",
        note: str = "",
        settings: dict[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.folder, self.split = Path(folder), split
        self._describe: dict[str, Any] = {
            "name": name,
            "licence": licence,
            "attribution": attribution,
            "source": source,
            "note": note,
            "settings": settings or {},
        }
        self._overwrite = overwrite
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self.query_ids: set[str] = set()
        self.candidate_ids: set[str] = set()
        # Overwriting removes the folder, so it must be one of ours.
        if overwrite and self.folder.exists() and not (self.folder / MANIFEST).exists():
            raise UserError(
                f"{self.folder} has no {MANIFEST}: not a retrieval set, so not overwritten"
            )

    def __enter__(self) -> "RetrievalSetWriter":
        self._partial = self._stack.enter_context(new_folder(self.folder, self._overwrite))
        return self

    def add_candidate(self, item: Item, **metadata: Any) -> None:
        """Add a candidate under its `uid`: its id, or a hash of its content.

        Raises:
            UserError: the uid was added before, or the picture cannot be read.
        """
        self._add(item, CORPUS, self.candidate_ids, metadata)

    def add_query(self, item: Item, **metadata: Any) -> None:
        """Add a query under its `uid`; as `add_candidate`."""
        self._add(item, QUERIES, self.query_ids, metadata)

    def judge(self, query_id: str, candidate_id: str, score: float = 1) -> None:
        """Record how relevant a candidate is; 0 or less: not at all."""
        file = f"qrels/{self.split}.tsv"
        if file not in self._files:
            self._write(file, "\t".join(HEADER))
        self._write(file, f"{query_id}\t{candidate_id}\t{score:g}")

    def list_candidates(self, query_id: str, candidate_ids: Iterable[str]) -> None:
        """Record the candidates that a query searches; then every query needs such a list."""
        line = {"query-id": query_id, "corpus-ids": list(candidate_ids)}
        self._write(f"candidates/{self.split}.jsonl", _json(line))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._read_back()

    def _read_back(self) -> None:
        found = read_retrieval_set(
            self._partial, self._describe["name"], split=self.split, strict=True
        )
        manifest = self._describe | {
            "num_queries": len(self.query_ids),
            "num_candidates": len(self.candidate_ids),
            "num_right": sum(map(len, found.relevant)),
        }
        text = json.dumps(manifest, indent=2, ensure_ascii=False) + "\n"
        (self._partial / MANIFEST).write_text(text, encoding="utf-8")

    def _add(self, item: Item, file: str, ids: set[str], metadata: dict[str, Any]) -> None:
        uid = item.uid
        if uid in ids:
            raise UserError(f"{file} contains {uid!r} already: add each item once")
        # Judgements are tab-separated lines.
        if any(mark in uid for mark in "\t\r\n"):
            raise UserError(f"id {uid!r} contains a tab or a line break")
        taken = [key for key in metadata if key in _OURS]
        if taken:
            raise UserError(f"metadata {taken[0]!r} is a reserved name: choose another")
        record: dict[str, Any] = {"_id": uid}
        for name in ("instruction", "text"):
            if getattr(item, name) is not None:
                record[name] = getattr(item, name)
        if item.image is not None:
            record["image"] = self._store_image(item)
        self._write(file, _json(record | metadata))
        ids.add(uid)

    def _store_image(self, item: Item) -> str:
        content, suffix = encoded_image(item)
        digest = hashlib.sha256(content).hexdigest()[:32]
        path = Path("images", digest[:2], f"{digest}.{suffix}")
        if not (self._partial / path).exists():
            (self._partial / path).parent.mkdir(parents=True, exist_ok=True)
            (self._partial / path).write_bytes(content)
        return path.as_posix()

    def _write(self, file: str, line: str) -> None:
        if file not in self._files:
            (self._partial / file).parent.mkdir(exist_ok=True)
            self._files[file] = (self._partial / file).open("w", encoding="utf-8", newline="\n")
        self._files[file].write(line + "\n")


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False)
