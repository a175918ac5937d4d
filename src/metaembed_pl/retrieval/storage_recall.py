"""The loss from storing vectors in a lower precision, or with a projection to a smaller width.

N: items    R: their vectors    Rq: vectors of a query    D: width
"""

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.late_interaction import maxsim
from metaembed_pl.retrieval.embedding import EmbedStatus
from metaembed_pl.retrieval.store import Store


def storage_recall(store: Store, status: EmbedStatus, top: int = 10) -> tuple[float, int]:
    """The share of nearest neighbours that storing preserves.

    Each item of the sample searches the others with its own vectors: as the model made them, and as
    the store has them, projected and rounded.

    Returns:
        The share of the `top` nearest that storing preserves, and the number of items.
    """
    ids = [id for some, _ in status.sample for id in some]
    before = torch.cat([vectors for _, vectors in status.sample])
    after = store.vectors(store.rows_of(ids))
    queries = before[:, : store.groups[-1].r_q]
    top = min(top, len(ids) - 1)
    if top < 1:
        return 1.0, len(ids)
    exact, stored = _nearest(queries, before, top), _nearest(store.project(queries), after, top)
    is_found = (exact.unsqueeze(2) == stored.unsqueeze(1)).any(dim=2)
    return is_found.float().mean().item(), len(ids)


def _nearest(
    queries: Float[Tensor, "N Rq D"], candidates: Float[Tensor, "N R D"], top: int
) -> Tensor:
    return maxsim(queries, candidates).fill_diagonal_(-torch.inf).topk(top, dim=1).indices
