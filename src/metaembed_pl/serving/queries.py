"""Recent encoded queries, so that changing the budget needs no encoding."""

import threading
from collections import OrderedDict
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

MOST_QUERIES = 256


class EncodedQuery(NamedTuple):
    """A query with its meta embeddings, on the device that searches."""

    text: str | None
    has_picture: bool
    vectors: Float[Tensor, "1 Rq D"]


class RecentQueries:
    """The last `MOST_QUERIES` queries that were used, by id."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, EncodedQuery] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, id: str) -> EncodedQuery | None:
        """The query, if it is still here."""
        with self._lock:
            if id in self._by_id:
                self._by_id.move_to_end(id)
            return self._by_id.get(id)

    def add(self, id: str, query: EncodedQuery) -> None:
        """Add a query; the one that was unused for longest is dropped."""
        with self._lock:
            self._by_id[id] = query
            self._by_id.move_to_end(id)
            while len(self._by_id) > MOST_QUERIES:
                self._by_id.popitem(last=False)
