"""The similarity of an item's vectors to each other: redundant vectors cost bytes without benefit.

N: items    R: vectors of an item    D: width
"""

from jaxtyping import Float
from torch import Tensor

from metaembed_pl.late_interaction import cosines
from metaembed_pl.retrieval.store import Store
from metaembed_pl.samples import evenly_spread

NUM_ITEMS = 64


def alikeness(queries: Float[Tensor, "Q Rq D"], store: Store) -> dict[str, list[list[float]]]:
    """For each side the mean cosine between vectors i and j of an item, over some items."""
    sides = {
        "query": queries[:NUM_ITEMS],
        "candidate": store.vectors(evenly_spread(len(store), NUM_ITEMS)),
    }
    return {
        side: [[round(value, 4) for value in row] for row in cosines(vectors.cpu()).tolist()]
        for side, vectors in sides.items()
        if len(vectors)
    }


def mean_cosine(cosine: list[list[float]], count: int) -> float | None:
    """The mean over pairs among the first `count` vectors; None if there is only one.

    >>> mean_cosine([[1.0, 0.5], [0.5, 1.0]], 2)
    0.5
    """
    pairs = [cosine[i][j] for i in range(count) for j in range(i)]
    return sum(pairs) / len(pairs) if pairs else None
