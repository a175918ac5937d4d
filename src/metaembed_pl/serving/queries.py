"""Recent encoded queries, so that changing the budget needs no encoding."""

import threading
from collections import OrderedDict
from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

KEPT = 256


@dataclass(frozen=True)
class Asked:
    """A query that was encoded.

    Args:
        text: of it.
        has_picture: whether a picture is part of it.
        vectors: its meta embeddings, where searches are to be done.
    """

    text: str | None
    has_picture: bool
    vectors: Float[Tensor, "1 Rq D"]


class Queries:
    """The last queries, by id; of more than `KEPT` the one unused for longest goes."""

    def __init__(self) -> None:
        self._asked: OrderedDict[str, Asked] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, id: str) -> Asked | None:
        """A query that is kept."""
        with self._lock:
            if id in self._asked:
                self._asked.move_to_end(id)
            return self._asked.get(id)

    def keep(self, id: str, asked: Asked) -> None:
        """Keep a query."""
        with self._lock:
            self._asked[id] = asked
            self._asked.move_to_end(id)
            while len(self._asked) > KEPT:
                self._asked.popitem(last=False)
