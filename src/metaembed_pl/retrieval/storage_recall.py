"""What keeping vectors in a store costs: in a precision, and with a projection, of a smaller width.

N: items    R: their vectors    Rq: as many as a query has    D: width
"""

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.late_interaction import maxsim
from metaembed_pl.retrieval.embedding import Progress
from metaembed_pl.retrieval.store import Store


def storage_recall(store: Store, progress: Progress, top: int = 10) -> tuple[float, int]:
    """What storing them cost: how many of each item's nearest others are still its nearest.

    Each of the first items that were embedded asks for the others, with its own vectors: as the
    model made them, and as the store keeps them, projected and rounded.

    Returns:
        The share of the `top` nearest that storing kept, and the number of items.
    """
    ids = [id for some, _ in progress.sample for id in some]
    before = torch.cat([vectors for _, vectors in progress.sample])
    after = store.vectors(store.rows_of(ids))
    queries = before[:, : store.groups[-1].r_q]
    top = min(top, len(ids) - 1)
    if top < 1:
        return 1.0, len(ids)
    best = [
        _nearest(queries, before, top),
        _nearest(store.project(queries), after, top),
    ]
    kept = (best[0].unsqueeze(2) == best[1].unsqueeze(1)).any(dim=2)
    return kept.float().mean().item(), len(ids)


def _nearest(
    queries: Float[Tensor, "N Rq D"], candidates: Float[Tensor, "N R D"], top: int
) -> Tensor:
    return maxsim(queries, candidates).fill_diagonal_(-torch.inf).topk(top, dim=1).indices
