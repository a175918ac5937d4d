"""Reading a store: what it holds, and what is found in it.

N: items    n: some of them    R: their vectors    Q: queries    Rq: their vectors    D: width
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget
from metaembed_pl.errors import UserError
from metaembed_pl.late_interaction import narrowed
from metaembed_pl.retrieval.cascade import Hits, Stage, choose_stages, run_stages
from metaembed_pl.retrieval.filters import Filters
from metaembed_pl.retrieval.index import Index, IndexUnusable, index_version
from metaembed_pl.retrieval.manifest import Manifest
from metaembed_pl.retrieval.planes import read
from metaembed_pl.retrieval.projection import PROJECTION_FILE, Projection
from metaembed_pl.retrieval.scoring import scan
from metaembed_pl.retrieval.searchable import Searchable
from metaembed_pl.retrieval.snapshot import ATTEMPTS, Matching, Snapshot

PASSED_OVER = 1.2
"""What an index spends on looking whether a filter lets a vector through, in dot products."""


class Reader(Searchable):
    """A store as it was when it was opened; `Store` is one that can also change it.

    Args:
        folder: the store's.
    """

    def __init__(self, folder: Path):
        self._folder = Path(folder)
        self._snapshot: Snapshot | None = Snapshot.open(self.folder)
        self._manifest = self._snapshot.manifest
        self._places: dict[str, int] | None = None  # of the ids; made when first needed
        self._read: tuple[str, Projection] | None = None  # a digest and its projection
        self._filters: tuple[Snapshot, Filters] | None = None
        self._index: tuple[tuple, Index | None] | None = None  # which it is, and the index
        _ = self.projection  # of a store without its own nothing can be searched

    @property
    def folder(self) -> Path:
        """Where the store is."""
        return self._folder

    @property
    def kind(self) -> Manifest:
        """What the store says of itself."""
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
        """Of the stored components: fp32, bf16, fp16 or int8."""
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
        """Of all items, by row."""
        return self.snapshot().ids

    def rows_of(self, ids: Iterable[str]) -> list[int]:
        """The rows of items.

        Raises:
            UserError: an id that is not there.
        """
        places = torch.tensor([self._place_of(id) for id in ids], dtype=torch.long)
        return self.snapshot().rows_of(places).tolist()

    def metadata(self, rows: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """What was said of items when they were added; None: of all."""
        snapshot = self.snapshot()
        try:
            return [json.loads(text) for text in snapshot.column("metadata", self._at(rows))]
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"metadata in {self.folder} are damaged: {error}") from error

    def previews(self, rows: Sequence[int]) -> list[bytes | None]:
        """The small pictures of items, as encoded JPEG, where they have one."""
        return self.snapshot().column("preview", self._at(rows))

    def vectors(
        self,
        rows: Sequence[int] | None = None,
        r_c: int | None = None,
        width: int | None = None,
    ) -> Float[Tensor, "N r_c _"]:
        """The first `r_c` meta embeddings of items as they are kept, float32; None: all.

        Args:
            rows: of the items; None: all.
            r_c: vectors of an item; None: all.
            width: of them the first components, as unit vectors; None: all.

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
            queries: of the store's model, all R_q vectors; where they are is where scores are made.
            budget: None spends all vectors.

        Yields:
            Rows, and their scores: exact, float32, not divided by r_q.

        Raises:
            UserError: a budget the model was not trained for, or queries that do not fit.
        """
        snapshot = self.snapshot()
        r_q, r_c, width = self.check_budget(budget)
        asked = narrowed(self.accept(queries)[:, :r_q], width)
        done = 0
        for places, scores in scan(snapshot.planes, asked, r_c, snapshot.places):
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
            budget: every item is scored at it, exactly; None spends all vectors. With a width, such
                as "4x8x64", no more components of each vector are read.
            cascade: instead of a budget, stages such as "poolx8:200,16x64:10", see cascade.py.
                Where `where` leaves so few items that scoring them all is cheaper than asking the
                index, that is done; the hits' `stages` say so.
            top: hits of a query; None: what the cascade's last stage keeps, or 10.
            where: conditions on metadata, such as "lang=de"; all must hold.
            normalised: divide scores by r_q: they then lie in [-1, 1] at any budget.

        Returns:
            The hits; of equal scores the earlier row comes first.

        Raises:
            UserError: the store is empty, or any of these is not valid.
        """
        stages = choose_stages(self.kind, budget, cascade, top)
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
        """The generation that this object knows, mapped, and there to be read.

        Raises:
            UserError: a file of it was made shorter meanwhile.
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
        return places if rows is None else places[torch.as_tensor(rows, dtype=torch.long)]

    def _matching(self, where: str | Sequence[str]) -> Matching:
        """The items for which all conditions hold."""
        snapshot = self.snapshot()
        if self._filters is None or self._filters[0] is not snapshot:
            self._filters = snapshot, Filters(snapshot)
        return self._filters[1].matching(where)

    def index(self) -> Index | None:
        """The index, which others may build or replace meanwhile; None: there is none.

        Raises:
            IndexUnusable: there is one unusable, and why.
        """
        snapshot, known = self.snapshot(), self._index
        for attempt in range(ATTEMPTS):
            version = snapshot.manifest.data, index_version(snapshot)
            if known is not None and (known[1] is None or known[1].is_whole()):
                # A compaction may have removed the folder: what is mapped goes on.
                gone = version[1] is None and known[1] is not None
                if known[0] == version or (gone and known[0][0] == version[0]):
                    return known[1]
            try:
                self._index = version, Index.open(snapshot)
            except IndexUnusable:
                # It may have been replaced meanwhile: then there is a newer one.
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
        """What `search` does with these.

        Raises:
            UserError: the store's model cannot serve them.
            IndexUnusable: they ask the index, and there is none, or it cannot be used.
        """
        stages = choose_stages(self.kind, budget, cascade, top)
        self._index_for(stages)
        return stages

    def _index_for(self, stages: Sequence[Stage]) -> Index | None:
        """The index, where stages ask it."""
        if stages[0].reach is None:
            return None
        index = self.index()
        if index is None:
            raise IndexUnusable(
                f"{self.folder} has no index for {stages[0]}: build one with `index --store "
                f"{self.folder}`, or search at a budget"
            )
        return index


def for_filter(
    stages: tuple[Stage, ...], index: Index, queries: Float[Tensor, "Q Rq D"], share: float
) -> tuple[Stage, ...]:
    """Stages that ask an index, where a filter lets a share of the items through.

    Many more lists are read then. Where that costs more than to score them all, they are all
    scored.
    """
    first, last = stages[0], stages[-1]
    if share == 1 or first.reach is None:
        return stages
    all_of_them = share * index.num_rows * last.products
    a_list = index.num_rows * index.num_slots / index.num_lists * (PASSED_OVER + share)
    if all_of_them <= min(1 / share, index.num_lists) * a_list:
        return (last,)  # a single list, widened, costs more: no need to look which are near
    asked = first.asked(queries).float().cpu().numpy()
    lists, _ = index.lists_of(asked, first.reach, 1 / share)
    num_read = (lists >= 0).sum() / len(queries)
    return (last,) if all_of_them <= num_read * a_list else stages
