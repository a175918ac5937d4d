"""A store: the meta embeddings of many items on disk, searchable at any budget.

    store = Store.create("shelf", model.groups, model.width, identity_of(model))
    store.add(["a", "b"], model.encode_candidate(items), [{"lang": "de"}, {"lang": "en"}])
    store.search(model.encode_query(["a red apple"]), "4x8", top=10, where=["lang=de"])

A store is a folder: `manifest.json`, a projection where vectors are kept with fewer components, and
a folder of data with one file of vectors for each nested group of slots, the ids and metadata
(`rows.arrows`) and the rows that were deleted (`deleted.i64`). Files only grow, and the manifest
records their valid length: see manifest.py. One process writes at a time, any number read; a reader
keeps seeing the state that it opened.

N: items    R: their vectors    Q: queries    Rq: their vectors    D: width
"""

import fcntl
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget, parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.files import new_folder
from metaembed_pl.item import several
from metaembed_pl.retrieval.index_build import carry
from metaembed_pl.retrieval.manifest import MANIFEST_FILE, Manifest
from metaembed_pl.retrieval.planes import append_bytes, append_vectors, copy_vectors
from metaembed_pl.retrieval.projection import PROJECTION_FILE, Projection, digest_of
from metaembed_pl.retrieval.reader import Reader
from metaembed_pl.retrieval.rows import append_rows, append_table
from metaembed_pl.retrieval.snapshot import DELETED_FILE

if TYPE_CHECKING:
    from metaembed_pl.item import Item
    from metaembed_pl.model.embedder import MetaEmbedder

COPIED_AT_A_TIME = 4096


class Store(Reader):
    """A store that was opened; use `Store.open`, `Store.create` or `Store.build`.

    Rows are numbers from 0 to `len(store) - 1`, in the order in which items were added. They change
    when items are deleted or replaced: keep ids, not rows.

    Args:
        folder: the store's.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._depth = 0  # of `writing` blocks

    @classmethod
    def open(cls, folder: str | Path) -> "Store":
        """Open a store, to read or to change it.

        Raises:
            UserError: there is none, or a part of it is damaged or missing.
        """
        return cls(Path(folder))

    @classmethod
    def create(
        cls,
        folder: str | Path,
        groups: Sequence[Budget | str],
        width: int,
        identity: str,
        dtype: str = "bf16",
        projection: Projection | None = None,
        widths: Sequence[int] = (),
    ) -> "Store":
        """Make an empty store.

        Args:
            folder: must not exist, or be empty.
            groups: the model's nested groups.
            width: of the model's vectors.
            identity: of the model, as `identity_of` tells it.
            dtype: of the stored components: fp32, bf16, fp16, or int8 with a scale a vector.
            projection: of the model's vectors to what is stored; None: all components are.
            widths: at which the first stored components were trained, see `Kind`.

        Raises:
            UserError: the folder exists, or a setting is not valid.
        """
        folder = Path(folder)
        if (folder / MANIFEST_FILE).exists():
            raise UserError(f"{folder} is already a store: open it, or choose another folder")
        kept = width if projection is None else projection.width
        widths = tuple(some for some in widths if some < kept)
        manifest = Manifest(identity, parse_groups(groups), width, dtype, widths=widths)
        with new_folder(folder, overwrite=is_empty(folder)) as temporary:
            (temporary / manifest.data).mkdir()
            if projection is not None:
                if projection.model_width != width:
                    raise UserError(
                        f"the projection is of vectors of width {projection.model_width}, the "
                        f"model's have {width}"
                    )
                content = projection.to_bytes()
                append_bytes(temporary / PROJECTION_FILE, content, 0)
                digest = digest_of(content)
                manifest = replace(manifest, width=projection.width, projection=digest)
            manifest.write(temporary)
        return cls(folder)

    @classmethod
    def build(
        cls,
        folder: str | Path,
        model: "MetaEmbedder",
        items: "Iterable[Item | str | dict]",
        batch_size: int = 32,
        dtype: str | None = None,
        width: int | None = None,
    ) -> "Store":
        """Embed items into a store; what it holds already is not embedded again.

        For progress, metadata and more see `embedding.embed`, which this calls.

        Args:
            folder: of the store; made where there is none.
            model: encodes the items, as candidates.
            items: texts, `{"text": ..., "image": ...}` or `Item`s, in order.
            batch_size: items that are encoded and committed at a time.
            dtype: of a store that is made; None: bf16.
            width: of the vectors of a store that is made, by a projection that some of the items
                teach; None: the model's.

        Raises:
            UserError: an item cannot be read, or the store is another model's.
        """
        from metaembed_pl.retrieval.embedding import embed, open_for

        store = open_for(model, folder, dtype, width, items)
        for _ in embed(store, model, items, batch_size):
            pass
        return store

    def add(
        self,
        ids: Sequence[str],
        embeddings: Float[Tensor, "N R D"],
        metadata: Sequence[dict[str, Any] | None] | None = None,
        previews: Sequence[bytes | None] | None = None,
    ) -> None:
        """Add items, all or none of them; on disk when this returns.

        An id that is there already is replaced, and moves to the end.

        Args:
            ids: one an item, none twice.
            embeddings: all R_c vectors of each.
            metadata: one object an item, of what JSON can hold.
            previews: a small picture an item, encoded.

        Raises:
            UserError: they do not fit each other or the store, or another process writes to it.
        """
        ids = list(several(ids, "ids"))
        metadata = [None] * len(ids) if metadata is None else metadata
        previews = [None] * len(ids) if previews is None else previews
        self._check_items(ids, embeddings, metadata, previews)
        if not ids:
            return
        with self.writing() as old:
            places = self._places_by_id()
            replaced = [places[id] for id in ids if id in places]
            data = self.folder / old.data
            append_vectors(data, old, self.project(embeddings))
            rows_bytes = append_rows(data, old, ids, metadata, previews)
            _append_deleted(data, old, replaced)
            self._commit(
                replace(
                    old,
                    generation=old.generation + 1,
                    num_rows=old.num_rows + len(ids),
                    num_deleted=old.num_deleted + len(replaced),
                    rows_bytes=rows_bytes,
                )
            )
            places.update(zip(ids, range(old.num_rows, old.num_rows + len(ids)), strict=True))

    def delete(self, ids: Iterable[str]) -> None:
        """Delete items, all or none of them; their bytes are freed by `compact`.

        Raises:
            UserError: an id that is not there, or another process writes to the store.
        """
        ids = list(dict.fromkeys(several(ids, "ids")))
        if not ids:
            return
        with self.writing() as old:
            deleted = [self._place_of(id) for id in ids]
            _append_deleted(self.folder / old.data, old, deleted)
            num_deleted = old.num_deleted + len(ids)
            self._commit(replace(old, generation=old.generation + 1, num_deleted=num_deleted))
            for id in ids:
                del self._places_by_id()[id]

    def compact(self) -> None:
        """Write the store anew without what was deleted.

        Raises:
            UserError: another process writes to it.
        """
        with self.writing() as old:
            snapshot = self.snapshot()
            generation = old.generation + 1
            new = replace(
                old,
                generation=generation,
                data=f"data-{generation:04d}",
                num_rows=0,
                num_deleted=0,
                rows_bytes=0,
            )
            data = self.folder / new.data
            shutil.rmtree(data, ignore_errors=True)  # left by a process that was killed
            data.mkdir()
            for places in snapshot.places.split(COPIED_AT_A_TIME):
                copy_vectors(data, new, snapshot.planes, places)
                rows_bytes = append_table(data, new, snapshot.table, places)
                new = replace(new, num_rows=new.num_rows + len(places), rows_bytes=rows_bytes)
            carry(snapshot, data, new)
            self._commit(new)
            self._places = None
            for other in self.folder.glob("data-*"):
                if other.name != new.data:
                    shutil.rmtree(other)

    @contextmanager
    def writing(self) -> Iterator[Manifest]:
        """Keep other processes from writing; `add`, `delete` and `compact` do so by themselves.

        Raises:
            UserError: another process writes to the store.
        """
        if self._depth:
            yield self._manifest
            return
        with (self.folder / ".lock").open("a") as lock:
            try:
                # Of a process that is killed, the system takes the lock back.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(
                    f"another process is writing to {self.folder}: wait for it"
                ) from error
            current = Manifest.read(self.folder)
            if current != self._manifest:
                self._manifest, self._snapshot, self._places = current, None, None
            self._depth = 1
            try:
                yield self._manifest
            finally:
                self._depth = 0
                # Workers that were forked meanwhile hold the file open as well.
                fcntl.flock(lock, fcntl.LOCK_UN)

    def _commit(self, manifest: Manifest) -> None:
        manifest.write(self.folder)
        self._manifest, self._snapshot = manifest, None

    def _check_items(
        self, ids: list[str], embeddings: Tensor, metadata: Sequence, previews: Sequence
    ) -> None:
        expected = len(ids), self._manifest.num_slots, self.model_width
        if tuple(embeddings.shape) != expected:
            raise UserError(
                f"embeddings must be {' x '.join(map(str, expected))} for {len(ids)} ids in "
                f"{self.folder}, got {' x '.join(map(str, embeddings.shape))}"
            )
        if not len(ids) == len(metadata) == len(previews):
            raise UserError(
                f"got {len(ids)} ids, metadata of {len(metadata)} and previews of {len(previews)}"
            )
        seen: set[str] = set()
        for id in ids:
            if not isinstance(id, str) or not id:
                raise UserError(f"an id must be a text that is not empty, got {id!r}")
            if id in seen:
                raise UserError(f"id {id!r} is given twice")
            seen.add(id)
        finite = embeddings.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            bad = ids[int(finite.logical_not().nonzero()[0, 0])]
            raise UserError(f"the embeddings of {bad!r} hold NaN or infinity")


def is_empty(folder: Path) -> bool:
    """Whether there is a folder with nothing in it."""
    return folder.is_dir() and not any(folder.iterdir())


def _append_deleted(data: Path, manifest: Manifest, places: Sequence[int]) -> None:
    if places:
        content = np.array(places, dtype=np.int64).tobytes()
        append_bytes(data / DELETED_FILE, content, 8 * manifest.num_deleted)
