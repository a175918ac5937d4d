"""A store: the meta embeddings of many items on disk, searchable at any budget.

    store = Store.create("shelf", model.groups, model.width, identity_of(model))
    store.add(["a", "b"], model.encode_candidate(items), [{"lang": "de"}, {"lang": "en"}])
    store.search(model.encode_query(["a red apple"]), "4x8", top=10, where=["lang=de"])

A store is a folder: `manifest.json`, a projection if vectors are stored with fewer components, and
a folder of data with one file of vectors for each nested group of slots, the ids and metadata
(`rows.arrows`) and the deleted rows (`deleted.i64`). Files only grow, and the manifest records
their valid length: see manifest.py. One process writes at a time, any number read; a reader keeps
seeing the state that it opened.

N: items    R: their vectors    Q: queries    Rq: their vectors    D: width
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget, parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.files import is_empty, new_folder
from metaembed_pl.item import several
from metaembed_pl.late_interaction import check_vectors, narrowed
from metaembed_pl.ranks import rank_and_world, wait_for_ranks
from metaembed_pl.retrieval.cascade import Hits, Stage, choose_stages, for_filter, run_stages
from metaembed_pl.retrieval.filters import Filters
from metaembed_pl.retrieval.index import Index, IndexUnusable, index_version
from metaembed_pl.retrieval.index_build import carry
from metaembed_pl.retrieval.manifest import MANIFEST_FILE, Manifest
from metaembed_pl.retrieval.planes import read
from metaembed_pl.retrieval.projection import PROJECTION_FILE, Projection
from metaembed_pl.retrieval.scoring import scan
from metaembed_pl.retrieval.searchable import Searchable
from metaembed_pl.retrieval.snapshot import ATTEMPTS, Matching, Snapshot
from metaembed_pl.retrieval.writing import (
    append_deleted,
    append_items,
    begin_store,
    check_items,
    copy_items,
    only_writer,
)

if TYPE_CHECKING:
    from metaembed_pl.item import Item
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.model.encoder import Engine
    from metaembed_pl.retrieval.embedding import Entry


class Store(Searchable):
    """A store as it was when it was opened; use `Store.open`, `Store.create` or `Store.build`.

    Rows are numbers from 0 to `len(store) - 1`, in the order in which items were added. They change
    when items are deleted or replaced: keep ids, not rows.
    """

    def __init__(self, folder: Path):
        self._folder = Path(folder)
        self._snapshot: Snapshot | None = Snapshot.open(self.folder)
        self._manifest = self._snapshot.manifest
        self._places: dict[str, int] | None = None  # by id; made when first needed
        self._read: tuple[str, Projection] | None = None  # with its digest
        self._filters: tuple[Snapshot, Filters] | None = None
        self._index: tuple[tuple, Index | None] | None = None  # with its version
        self._is_writing = False
        _ = self.projection  # refuse now what cannot be searched

    @classmethod
    def open(cls, folder: str | Path) -> "Store":
        """Open a store for reading and writing.

        Raises:
            UserError: there is no store, or a part of it is damaged or missing.
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
        """Create an empty store.

        Args:
            folder: must not exist, or be empty.
            groups: the model's nested groups.
            width: width of the model's vectors.
            identity: the model's fingerprint, see `identity_of`.
            dtype: dtype of the stored components: fp32, bf16, fp16, or int8 with one scale per
                vector.
            projection: maps the model's vectors to the stored ones; None: all components are
                stored.
            widths: trained widths of the stored vectors, see `VectorSpace`.

        Raises:
            UserError: the folder exists, or a setting is not valid.
        """
        folder = Path(folder)
        if (folder / MANIFEST_FILE).exists():
            raise UserError(f"{folder} is already a store: open it, or choose another folder")
        content = None
        if projection is not None:
            if projection.model_width != width:
                raise UserError(
                    f"the projection takes vectors of width {projection.model_width}, the model's "
                    f"have {width}"
                )
            content, width = projection.to_bytes(), projection.width
        widths = tuple(narrower for narrower in widths if narrower < width)
        manifest = Manifest(identity, parse_groups(groups), width, dtype, widths=widths)
        with new_folder(folder) as temporary:
            _, manifest = begin_store(temporary, manifest, content)
            manifest.write(temporary)
        return cls(folder)

    @classmethod
    def open_for(
        cls,
        model: "Engine",
        folder: str | Path,
        dtype: str | None = None,
        width: int | None = None,
        items: "Iterable[Entry | Item | str | dict]" = (),
        skip_bad: bool = False,
    ) -> "Store":
        """Open the store of a model; rank 0 creates it if it does not exist.

        Args:
            model: that embedded its items, or will.
            folder: of the store.
            dtype: of a new store; None: bf16.
            width: of the vectors of a new store; None: the model's.
            items: to be embedded; a projection to a width that the model was not trained at is
                learned from some of them.
            skip_bad: skip items that cannot be read, instead of stopping.

        Raises:
            UserError: the store is another model's or has another dtype or width, or there are too
                few items to learn from.
        """
        from metaembed_pl.model.identity import identity_of
        from metaembed_pl.retrieval.embedding import projection_for

        folder = Path(folder)
        if rank_and_world()[0] == 0 and (not folder.exists() or is_empty(folder)):
            projection, widths = projection_for(model, width, items, skip_bad)
            settings = identity_of(model), dtype or "bf16", projection, widths
            cls.create(folder, model.groups, model.width, *settings)
        wait_for_ranks()
        store = cls.open(folder)
        store.check_model(model)
        if dtype not in (None, store.dtype):
            raise UserError(f"{folder} stores {store.dtype}, not {dtype}: leave out the dtype")
        if width not in (None, store.width):
            raise UserError(
                f"{folder} stores vectors of width {store.width}, not {width}: leave out the width"
            )
        return store

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
        """Embed items into a store, except items that it has already.

        `embedding.embed`, which this calls, reports progress and has more options.

        Args:
            folder: folder of the store; created if it does not exist.
            model: encodes the items, as candidates.
            items: texts, `{"text": ..., "image": ...}` or `Item`s, in order.
            batch_size: items that are encoded and committed at a time.
            dtype: dtype of a new store; None: bf16.
            width: width of the vectors of a new store: the first components if the model was
                trained at that width, else a projection learned from some of the items; None: the
                model's.

        Raises:
            UserError: an item cannot be read, or the store is another model's.
        """
        from metaembed_pl.retrieval.embedding import embed

        store = cls.open_for(model, folder, dtype, width, items)
        for _ in embed(store, model, items, batch_size):
            pass
        return store

    @property
    def folder(self) -> Path:
        """The store's folder."""
        return self._folder

    @property
    def description(self) -> Manifest:
        """The store's manifest."""
        return self._manifest

    @property
    def projection(self) -> Projection | None:
        """See `Searchable`.

        Raises:
            UserError: its file is missing or damaged.
        """
        digest = self._manifest.projection
        if digest is None:
            return None
        if self._read is None or self._read[0] != digest:
            file = self.folder / PROJECTION_FILE
            self._read = digest, Projection.read(file, digest, self.width)
        return self._read[1]

    @property
    def dtype(self) -> str:
        """Dtype of the stored components: fp32, bf16, fp16 or int8."""
        return self._manifest.dtype

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
        """Ids of all items, by row."""
        return self.snapshot().ids

    def rows_of(self, ids: Iterable[str]) -> list[int]:
        """The rows of items.

        Raises:
            UserError: an id is not in the store.
        """
        places = torch.tensor([self._place_of(id) for id in ids], dtype=torch.long)
        return self.snapshot().rows_of(places).tolist()

    def metadata(self, rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """The metadata of items; None: of all."""
        texts = self.snapshot().column("metadata", self._at(rows))
        try:
            return [json.loads(text) for text in texts]
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"metadata in {self.folder} are damaged: {error}") from error

    def previews(self, rows: Sequence[int]) -> list[bytes | None]:
        """The previews of items, encoded as JPEG; None for items without one."""
        return self.snapshot().column("preview", self._at(rows))

    def vectors(
        self,
        rows: Sequence[int] | None = None,
        r_c: int | None = None,
        width: int | None = None,
    ) -> Float[Tensor, "N r_c _"]:
        """The first `r_c` meta embeddings of items as they are stored, float32.

        Args:
            rows: rows of the items; None: all.
            r_c: number of vectors per item; None: all.
            width: number of first components of each vector, as unit vectors; None: all.

        Raises:
            UserError: the model was not trained at `r_c` or `width`.
        """
        snapshot, (r_q, every, _) = self.snapshot(), self.groups[-1]
        budget = self.check_budget(Budget(r_q, every if r_c is None else r_c, width))
        return read(snapshot.planes, budget.r_c, self._at(rows), width)

    def scores(
        self, queries: Float[Tensor, "Q Rq D"], budget: Budget | str | None = None
    ) -> Iterator[tuple[range, Float[Tensor, "Q n"]]]:
        """Scores of every item for every query, some rows at a time, in order.

        Args:
            queries: encoded by the store's model, all R_q vectors, on the device to compute on.
            budget: numbers of vectors to use; None: all.

        Yields:
            Rows, and their scores: exact, float32, not divided by r_q.

        Raises:
            UserError: a budget the model was not trained for, or queries that do not fit.
        """
        snapshot = self.snapshot()
        r_q, r_c, width = self.check_budget(budget)
        narrow = narrowed(self.accept(queries)[:, :r_q], width)
        done = 0
        for places, scores in scan(snapshot.planes, narrow, r_c, snapshot.places):
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
            queries: encoded by the store's model, all R_q vectors, on the device to compute on.
            budget: score every item at this budget, exactly; None: with all vectors. With a width,
                such as "4x8x64", only the first components of each vector are read.
            cascade: stages instead of a budget, such as "poolx8:200,16x64:10", see cascade.py. If
                `where` leaves so few items that scoring all of them is cheaper than the index, they
                are scored; `stages` of the hits shows this.
            top: hits per query; None: the number that the cascade's last stage keeps, or 10.
            where: conditions on metadata, such as "lang=de"; all must hold.
            normalised: divide scores by r_q, which brings them into [-1, 1] at any budget.

        Returns:
            The hits; of equal scores the earlier row comes first.

        Raises:
            UserError: the store is empty, or an argument is not valid.
        """
        stages = choose_stages(self.description, budget, cascade, top)
        index = self._index_for(stages)
        snapshot = self.snapshot()
        queries = self.accept(queries)
        if not len(self):
            raise UserError(f"{self.folder} is empty: add items with `embed`")
        matching = self._matching(where)
        if len(matching.places) == 0 or len(queries) == 0:
            nothing: list[list[Any]] = [[] for _ in queries]
            return Hits(nothing, nothing, nothing, stages, 0.0, 0)
        if index is not None:
            stages = for_filter(stages, index, queries, len(matching.places) / len(self))
        found = run_stages(snapshot, queries, stages, matching, index)
        scores = found.scores[:, :top] / (stages[-1].budget.r_q if normalised else 1)
        best = found.places[:, :top].cpu()
        ids, num = snapshot.column("id", best.flatten()), best.shape[1]
        return Hits(
            [ids[start : start + num] for start in range(0, len(ids), num)],
            scores.tolist(),
            snapshot.rows_of(best).tolist(),
            stages,
            1000 * found.seconds,
            found.bytes_read,
        )

    def snapshot(self) -> Snapshot:
        """The open generation of the store, memory-mapped.

        Raises:
            UserError: one of its files was truncated meanwhile.
        """
        snapshot = self._snapshot
        if snapshot is not None and not snapshot.files.are_whole():
            snapshot = self._places = None  # perhaps another copy is there by now
        if snapshot is None:
            self._snapshot = snapshot = Snapshot.open(self.folder)
            self._manifest = snapshot.manifest
        return snapshot

    def _places_by_id(self) -> dict[str, int]:
        if self._places is None:
            snapshot = self.snapshot()
            self._places = dict(zip(snapshot.ids, snapshot.places.tolist(), strict=True))
        return self._places

    def _place_of(self, id: str) -> int:
        try:
            return self._places_by_id()[id]
        except KeyError as error:
            raise UserError(f"{self.folder} has no item {id!r}") from error

    def _at(self, rows: Sequence[int] | None) -> Tensor:
        places = self.snapshot().places
        if rows is None:
            return places
        try:
            return places[torch.as_tensor(rows, dtype=torch.long)]
        except (IndexError, ValueError, TypeError) as error:
            raise UserError(
                f"rows are numbers from 0 to {len(places) - 1}, got {rows!r:.80}"
            ) from error

    def _matching(self, where: str | Sequence[str]) -> Matching:
        """The items for which all conditions hold."""
        snapshot = self.snapshot()
        if self._filters is None or self._filters[0] is not snapshot:
            self._filters = snapshot, Filters(snapshot)
        return self._filters[1].matching(where)

    def index(self) -> Index | None:
        """The current index, which other processes may build or replace; None: there is none.

        Raises:
            IndexUnusable: the index cannot be used.
        """
        snapshot, known = self.snapshot(), self._index
        for attempt in range(ATTEMPTS):
            version = snapshot.manifest.data, index_version(snapshot)
            if known is not None and (known[1] is None or known[1].is_whole()):
                # A compaction may have removed the folder: the mapped index remains usable.
                gone = version[1] is None and known[1] is not None
                if known[0] == version or (gone and known[0][0] == version[0]):
                    return known[1]
            try:
                self._index = version, Index.open(snapshot)
            except IndexUnusable:
                # If it was replaced meanwhile, there is a newer one.
                newer = index_version(snapshot) != version[1]
                if not newer or attempt == ATTEMPTS - 1:
                    self._index = None
                    raise
            else:
                return self._index[1]
        raise AssertionError("the last attempt returns or raises")

    def stages(
        self,
        budget: Budget | str | None = None,
        cascade: str | Sequence[Stage | str] | None = None,
        top: int | None = None,
    ) -> tuple[Stage, ...]:
        """The stages of a `search` with these arguments.

        Raises:
            UserError: the model was not trained for them.
            IndexUnusable: they need an index, and there is none, or it cannot be used.
        """
        stages = choose_stages(self.description, budget, cascade, top)
        self._index_for(stages)
        return stages

    def _index_for(self, stages: Sequence[Stage]) -> Index | None:
        """The index, if the stages use it."""
        if stages[0].reach is None:
            return None
        index = self.index()
        if index is None:
            raise IndexUnusable(
                f"{self.folder} has no index for {stages[0]}: build one with `index --store "
                f"{self.folder}`, or search at a budget"
            )
        return index

    def add(
        self,
        ids: Sequence[str],
        embeddings: Float[Tensor, "N R D"],
        metadata: Sequence[dict[str, Any] | None] | None = None,
        previews: Sequence[bytes | None] | None = None,
    ) -> None:
        """Add items, atomically; they are on disk when this returns.

        An item with an id that is in the store is replaced, and moves to the end.

        Args:
            ids: one per item, without duplicates.
            embeddings: the model's vectors of each item; only those that the store keeps are used.
            metadata: one JSON object per item.
            previews: an encoded small picture per item.

        Raises:
            UserError: they do not fit each other or the store, or another process is writing to it.
        """
        ids = list(several(ids, "ids"))
        metadata = [None] * len(ids) if metadata is None else metadata
        previews = [None] * len(ids) if previews is None else previews
        shape = self._manifest.num_slots, self.model_width
        check_vectors(embeddings, "embeddings")
        embeddings = embeddings[:, : shape[0]]
        check_items(self.folder, ids, embeddings, metadata, previews, shape)
        if not ids:
            return
        with self.writing() as old:
            places = self._places_by_id()
            data = self.folder / old.data
            new = append_items(data, old, ids, self.project(embeddings), metadata, previews)
            self._commit(append_deleted(data, new, [places[id] for id in ids if id in places]))
            places.update(zip(ids, range(old.num_rows, new.num_rows), strict=True))

    def delete(self, ids: Iterable[str]) -> None:
        """Delete items, atomically; `compact` frees their space.

        Raises:
            UserError: an id is not in the store, or another process is writing to it.
        """
        ids = list(dict.fromkeys(several(ids, "ids")))
        if not ids:
            return
        with self.writing() as old:
            deleted = [self._place_of(id) for id in ids]
            self._commit(append_deleted(self.folder / old.data, old, deleted))
            for id in ids:
                del self._places_by_id()[id]

    def compact(self) -> None:
        """Rewrite the store without its deleted items.

        Raises:
            UserError: another process is writing to it.
        """
        with self.writing() as old:
            snapshot = self.snapshot()
            name = f"data-{old.generation + 1:04d}"
            new = replace(old, data=name, num_rows=0, num_deleted=0, rows_bytes=0)
            data = self.folder / name
            shutil.rmtree(data, ignore_errors=True)  # left by a process that was killed
            data.mkdir()
            new = copy_items(data, new, snapshot, snapshot.places)
            carry(snapshot, data, new)
            self._commit(new)
            self._places = None
            for other in self.folder.glob("data-*"):
                if other.name != name:
                    shutil.rmtree(other)

    @contextmanager
    def writing(self) -> Iterator[Manifest]:
        """Keep other processes from writing; `add`, `delete` and `compact` do this themselves.

        Raises:
            UserError: another process is writing to the store.
        """
        if self._is_writing:
            yield self._manifest
            return
        with only_writer(self.folder):
            current = Manifest.read(self.folder)
            if current != self._manifest:
                self._manifest, self._snapshot, self._places = current, None, None
            self._is_writing = True
            try:
                yield self._manifest
            finally:
                self._is_writing = False

    def _commit(self, manifest: Manifest) -> None:
        manifest = replace(manifest, generation=manifest.generation + 1)
        manifest.write(self.folder)
        self._manifest, self._snapshot = manifest, None
