"""A store: the meta embeddings of many items on disk, to be searched at any budget.

    store = Store.create("shelf", model.groups, model.width, identity_of(model))
    store.add(["a", "b"], model.encode_candidate(items), [{"lang": "de"}, {"lang": "en"}])
    store.search(model.encode_query(["a red apple"]), "4x8", top=10, where=["lang=de"])

A store is a folder: `manifest.json`, and a folder of data with one file of vectors for each nested
group of slots, the ids and metadata (`rows.arrows`) and the rows that were deleted
(`deleted.i64`). Files only grow, and the manifest says how much of them counts: see manifest.py.
One process writes at a time, any number read; a reader goes on with what it opened.

N: items    R: their vectors    Q: queries    Rq: their vectors    D: width
"""

import fcntl
import json
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget, check_budget, parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.files import new_folder
from metaembed_pl.retrieval.cascade import Hits, Stage, parse_cascade, run_stages
from metaembed_pl.retrieval.manifest import MANIFEST_FILE, Manifest
from metaembed_pl.retrieval.planes import append_bytes, append_vectors, copy_vectors
from metaembed_pl.retrieval.rows import append_rows, append_table
from metaembed_pl.retrieval.scoring import scan
from metaembed_pl.retrieval.snapshot import DELETED_FILE, Snapshot
from metaembed_pl.retrieval.where import parse_where

if TYPE_CHECKING:
    from metaembed_pl.item import Item
    from metaembed_pl.model.embedder import MetaEmbedder

COPIED_AT_A_TIME = 4096


class Store:
    """A store that was opened; use `Store.open`, `Store.create` or `Store.build`.

    Rows are numbers from 0 to `len(store) - 1`, in the order in which items were added. They change
    when items are deleted or replaced: keep ids, not rows.

    Args:
        folder: the store's.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._snapshot: Snapshot | None = Snapshot.open(self.folder)
        self._manifest = self._snapshot.manifest
        self._places: dict[str, int] | None = None  # of the ids; made when first needed
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
    ) -> "Store":
        """Make an empty store.

        Args:
            folder: must not exist.
            groups: the model's nested groups.
            width: of its vectors.
            identity: of the model, as `identity_of` tells it.
            dtype: of the stored components: bf16, fp16, or int8 with a scale a vector.

        Raises:
            UserError: the folder exists, or a setting is not valid.
        """
        folder = Path(folder)
        if (folder / MANIFEST_FILE).exists():
            raise UserError(f"{folder} is a store already: open it, or choose another folder")
        manifest = Manifest(identity, parse_groups(groups), width, dtype)
        with new_folder(folder) as temporary:
            (temporary / manifest.data).mkdir()
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
    ) -> "Store":
        """Embed items into a store; what it holds already is not embedded again.

        For progress, metadata and more see `embedding.embed`, which this calls.

        Args:
            folder: of the store; made where there is none.
            model: encodes the items, as candidates.
            items: texts, `{"text": ..., "image": ...}` or `Item`s, in order.
            batch_size: items that are encoded and committed at a time.
            dtype: of a store that is made; None: bf16.

        Raises:
            UserError: an item cannot be read, or the store is another model's.
        """
        from metaembed_pl.retrieval.embedding import embed, open_for

        store = open_for(model, folder, dtype)
        for _ in embed(store, model, items, batch_size):
            pass
        return store

    @property
    def groups(self) -> tuple[Budget, ...]:
        """The nested groups of the model."""
        return self._manifest.groups

    @property
    def width(self) -> int:
        """Of a vector."""
        return self._manifest.width

    @property
    def dtype(self) -> str:
        """Of the stored components: bf16, fp16 or int8."""
        return self._manifest.dtype

    @property
    def identity(self) -> str:
        """Of the model whose vectors these are."""
        return self._manifest.identity

    @property
    def generation(self) -> int:
        """Counts the changes of the store."""
        return self._manifest.generation

    def __len__(self) -> int:
        return self._manifest.num_items

    def __contains__(self, id: str) -> bool:
        return id in self._places_by_id()

    @property
    def ids(self) -> list[str]:
        """Of all items, by row."""
        return self._read().ids

    def rows_of(self, ids: Iterable[str]) -> list[int]:
        """The rows of items.

        Raises:
            UserError: an id that is not there.
        """
        places = torch.tensor([self._place_of(id) for id in ids], dtype=torch.long)
        return self._read().rows_of(places).tolist()

    def metadata(self, rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """What was said of items when they were added; None: of all."""
        snapshot = self._read()
        return [json.loads(text) for text in snapshot.column("metadata", self._at(rows))]

    def previews(self, rows: Sequence[int]) -> list[bytes | None]:
        """The small pictures of items, as encoded JPEG, where they have one."""
        return self._read().column("preview", self._at(rows))

    def vectors(
        self, rows: Sequence[int] | None = None, r_c: int | None = None
    ) -> Float[Tensor, "N r_c D"]:
        """The first `r_c` meta embeddings of items, float32; None: all.

        Raises:
            UserError: the model was not trained at `r_c`.
        """
        snapshot = self._read()
        r_q, every = self.groups[-1]
        r_c = check_budget((r_q, every if r_c is None else r_c), self.groups).r_c
        places = self._at(rows)
        parts = [
            plane.read(places, torch.float32, places.device)
            for plane in snapshot.planes
            if plane.first < r_c
        ]
        return torch.cat(parts, dim=1)

    def scores(
        self, queries: Float[Tensor, "Q Rq D"], budget: Budget | str | None = None
    ) -> Iterator[tuple[range, Float[Tensor, "Q n"]]]:
        """Scores of every item for every query, some rows at a time, in order.

        Args:
            queries: of the store's model, all R_q vectors; where they are is where scores are made.
            budget: None spends all vectors.

        Yields:
            Rows, and their scores: exact, float32, not divided by r_q.

        Raises:
            UserError: a budget the model was not trained for, or queries that do not fit.
        """
        snapshot = self._read()
        r_q, r_c = check_budget(budget or self.groups[-1], self.groups)
        self._check_queries(queries)
        done = 0
        for places, scores in scan(snapshot.planes, queries[:, :r_q], r_c, snapshot.places):
            yield range(done, done + len(places)), scores
            done += len(places)

    def search(
        self,
        queries: Float[Tensor, "Q Rq D"],
        budget: Budget | str | None = None,
        *,
        cascade: str | Sequence[Stage | str] | None = None,
        top: int | None = None,
        where: str | Sequence[str] = (),
        normalised: bool = False,
    ) -> Hits:
        """Find the best items for each query.

        Args:
            queries: of the store's model, all R_q vectors; where they are is where scores are made.
            budget: every item is scored at it, exactly; None spends all vectors.
            cascade: instead of a budget, such as "16x1:2000,4x8:200,16x64:10".
            top: hits of a query; None: what the cascade's last stage keeps, or 10.
            where: conditions on metadata, such as "lang=de"; all must hold.
            normalised: divide scores by r_q: they then lie in [-1, 1] at any budget.

        Returns:
            The hits; of equal scores the earlier row comes first.

        Raises:
            UserError: the store is empty, or any of these is not valid.
        """
        started = time.perf_counter()
        snapshot = self._read()
        stages = self._stages(budget, cascade, top)
        self._check_queries(queries)
        if not len(self):
            raise UserError(f"{self.folder} is empty: add items with `embed`")
        places = self._matching(where)
        if len(places) == 0 or len(queries) == 0:
            nothing: list[list[Any]] = [[] for _ in queries]
            return Hits(nothing, nothing, nothing, stages, 0.0, 0)
        scores, found, bytes_read = run_stages(snapshot, queries, stages, places)
        scores = scores[:, :top] / (stages[-1].budget.r_q if normalised else 1)
        found = found[:, :top].cpu()
        ids = iter(snapshot.column("id", found.flatten()))
        return Hits(
            [[next(ids) for _ in of_query] for of_query in found],
            scores.tolist(),
            snapshot.rows_of(found).tolist(),
            stages,
            1000 * (time.perf_counter() - started),
            bytes_read,
        )

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
        ids = list(ids)
        metadata = [None] * len(ids) if metadata is None else metadata
        previews = [None] * len(ids) if previews is None else previews
        self._check_items(ids, embeddings, metadata, previews)
        if not ids:
            return
        with self.writing() as old:
            places = self._places_by_id()
            replaced = [places[id] for id in ids if id in places]
            data = self.folder / old.data
            append_vectors(data, old, embeddings)
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
        ids = list(dict.fromkeys(ids))
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
            snapshot = self._read()
            generation = old.generation + 1
            new = Manifest(
                old.identity,
                old.groups,
                old.width,
                old.dtype,
                generation=generation,
                data=f"data-{generation:04d}",
            )
            data = self.folder / new.data
            shutil.rmtree(data, ignore_errors=True)  # left by a process that was killed
            data.mkdir()
            for places in snapshot.places.split(COPIED_AT_A_TIME):
                copy_vectors(data, new, snapshot.planes, places)
                rows_bytes = append_table(data, new, snapshot.table, places)
                new = replace(new, num_rows=new.num_rows + len(places), rows_bytes=rows_bytes)
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

    def _commit(self, manifest: Manifest) -> None:
        manifest.write(self.folder)
        self._manifest, self._snapshot = manifest, None

    def _read(self) -> Snapshot:
        """The generation that this object knows, mapped."""
        if self._snapshot is None:
            self._snapshot = Snapshot.open(self.folder)
            self._manifest = self._snapshot.manifest
        return self._snapshot

    def _places_by_id(self) -> dict[str, int]:
        if self._places is None:
            snapshot = self._read()
            self._places = dict(zip(snapshot.ids, snapshot.places.tolist(), strict=True))
        return self._places

    def _place_of(self, id: str) -> int:
        try:
            return self._places_by_id()[id]
        except KeyError as error:
            raise UserError(f"{self.folder} has no item {id!r}") from error

    def _at(self, rows: Sequence[int] | None) -> Tensor:
        places = self._read().places
        return places if rows is None else places[torch.as_tensor(rows, dtype=torch.long)]

    def _matching(self, where: str | Sequence[str]) -> Tensor:
        """Places of the items for which all conditions hold."""
        conditions = parse_where(where)
        places = self._read().places
        if not conditions:
            return places
        holds = [all(c.holds(value) for c in conditions) for value in self.metadata()]
        return places[torch.from_numpy(np.flatnonzero(holds))]

    def _stages(
        self,
        budget: Budget | str | None,
        cascade: str | Sequence[Stage | str] | None,
        top: int | None,
    ) -> tuple[Stage, ...]:
        if top is not None and top < 1:
            raise UserError(f"top must be at least 1, got {top}")
        if cascade is None:
            return (Stage(check_budget(budget or self.groups[-1], self.groups), top or 10),)
        if budget is not None:
            raise UserError(f"give a budget ({budget}) or a cascade, not both")
        stages = parse_cascade(cascade, self.groups)
        if top is not None and top > stages[-1].keep:
            raise UserError(f"the cascade's last stage {stages[-1]} keeps fewer than the top {top}")
        return stages

    def _check_queries(self, queries: Tensor) -> None:
        expected = self.groups[-1].r_q, self.width
        if queries.ndim != 3 or tuple(queries.shape[1:]) != expected:
            raise UserError(
                f"queries must be N x {expected[0]} x {expected[1]} as {self.folder} is, "
                f"got {' x '.join(map(str, queries.shape))}: encode them with the store's model"
            )
        if not queries.isfinite().all():
            raise UserError("queries hold NaN or infinity: they find nothing")

    def _check_items(
        self, ids: list[str], embeddings: Tensor, metadata: Sequence, previews: Sequence
    ) -> None:
        expected = len(ids), self._manifest.num_slots, self.width
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


def _append_deleted(data: Path, manifest: Manifest, places: Sequence[int]) -> None:
    if places:
        content = np.array(places, dtype=np.int64).tobytes()
        append_bytes(data / DELETED_FILE, content, 8 * manifest.num_deleted)
