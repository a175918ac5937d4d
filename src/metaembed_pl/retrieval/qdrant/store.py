"""Search a Qdrant collection like a store.

    with QdrantStore.open("http://localhost:6333/things") as store:
        store.search(model.encode_query(["a red apple"]), cascade="poolx16:200,16x64:10")

Q: queries    Rq: their vectors    D: width
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.cascade import Hits, Stage, choose_stages
from metaembed_pl.retrieval.projection import Projection
from metaembed_pl.retrieval.qdrant.collection import Collection, open_collection
from metaembed_pl.retrieval.qdrant.layout import Layout
from metaembed_pl.retrieval.qdrant.requests import search_request
from metaembed_pl.retrieval.searchable import Searchable
from metaembed_pl.retrieval.where import parse_where


@dataclass(frozen=True)
class QdrantHits(Hits):
    """The hits of a search in a collection, with the metadata of the items.

    A collection has no rows and does not report bytes read: `rows` are empty, `bytes_read` is 0.
    """

    metadata: list[list[dict[str, Any]]]


class QdrantStore(Searchable):
    """An open collection; use `QdrantStore.open`, and `close` or `with`."""

    def __init__(self, collection: Collection, layout: Layout, exact: bool = False):
        self._collection, self.layout, self.exact = collection, layout, exact

    @classmethod
    def open(cls, address: str, exact: bool = False) -> "QdrantStore":
        """Open a collection.

        Args:
            address: `http://HOST:6333/NAME`.
            exact: searches that begin with the smallest count score every item, instead of using
                the index and the coarser copy: slower, but complete.

        Raises:
            UserError: there is no collection of a store, or it cannot be reached.
        """
        collection = open_collection(address)
        layout = collection.layout()
        if layout is None:
            raise UserError(f"{collection.address} does not exist: create it with `push`")
        return cls(collection, layout, exact)

    def close(self) -> None:
        """Close the connection."""
        self._collection.close()

    def __enter__(self) -> "QdrantStore":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def folder(self) -> str:
        """The collection's address."""
        return self._collection.address

    @property
    def description(self) -> Layout:
        """The collection's layout."""
        return self.layout

    @cached_property
    def projection(self) -> Projection | None:
        """See `Searchable`."""
        return self.layout.read_projection()

    def __len__(self) -> int:
        return self._collection.count()

    def stages(
        self,
        budget: Budget | str | None = None,
        cascade: str | Sequence[Stage | str] | None = None,
        top: int | None = None,
    ) -> tuple[Stage, ...]:
        """The stages of a `search` with these arguments.

        Raises:
            UserError: the model was not trained for them, or the collection cannot serve them.
        """
        if budget is None and cascade is None:
            budget = Budget(self.groups[-1].r_q, self.layout.counts[-1])
        stages = choose_stages(self.description, budget, cascade, top)
        for stage in stages:
            if stage.budget.width is not None:
                raise UserError(
                    f"{stage}: Qdrant scores full vectors; for a collection of narrower ones "
                    f"`embed --width {stage.budget.width}` into a store, and push that"
                )
            if stage.reach is not None:
                raise UserError(
                    f"{stage} uses the index of a store in a folder; Qdrant has its own"
                )
            if stage.budget.r_c not in self.layout.counts:
                raise UserError(
                    f"{self.folder} was pushed with {', '.join(map(str, self.layout.counts))} "
                    f"candidate vectors, not {stage.budget.r_c}: choose one of these, or push with "
                    "more --counts"
                )
        return stages

    def search(
        self,
        queries: Float[Tensor, "Q Rq D"],
        budget: Budget | str | None = None,
        *,
        cascade: str | Sequence[Stage | str] | None = None,
        top: int | None = None,
        where: str | Sequence[str] = (),
        normalised: bool = False,
    ) -> QdrantHits:
        """Find the best items for each query, with all stages in one request.

        Args:
            queries: of the model, all R_q vectors.
            budget: with one of the collection's counts; None spends all vectors.
            cascade: instead of a budget, such as "poolx16:200,16x64:10".
            top: hits per query; None: the number that the cascade's last stage keeps, or 10.
            where: conditions on metadata, such as "lang=de"; all must hold.
            normalised: divide scores by r_q, into [-1, 1] at any budget.

        Raises:
            UserError: an argument is not valid, or the collection cannot be reached.
        """
        stages = self.stages(budget, cascade, top)
        queries = self.accept(queries)
        conditions = parse_where(where)
        started = time.perf_counter()
        found = self._collection.query(
            [search_request(self.layout, q, stages, conditions, self.exact) for q in queries]
        )
        milliseconds = 1000 * (time.perf_counter() - started)
        divisor = stages[-1].budget.r_q if normalised else 1
        found = [points[:top] for points in found]
        return QdrantHits(
            [[point.payload["id"] for point in points] for points in found],
            [[point.score / divisor for point in points] for points in found],
            [[] for _ in found],
            stages,
            milliseconds,
            0,
            [[point.payload["metadata"] for point in points] for points in found],
        )
