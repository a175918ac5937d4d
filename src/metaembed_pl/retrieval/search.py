"""Search: the best candidates for each query, by exact late interaction at a budget.

Q: queries    C: candidates    Rc: vectors of a candidate    D: width
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget, check_budget
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.late_interaction import SCORES_AT_A_TIME
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.retrieval.scoring import best_columns


class Hit(NamedTuple):
    """A candidate found for a query: its position in the pool, and its MaxSim score."""

    candidate: int
    score: float


def rank(
    model: MetaEmbedder,
    queries: Sequence[Item],
    candidates: Sequence[Item] | Float[Tensor, "C Rc D"],
    budget: Budget | str | None = None,
    top: int = 10,
    batch_size: int = 32,
    progress: bool = False,
) -> list[list[Hit]]:
    """Find the best candidates for each query.

    Every candidate is scored: nothing is approximated.

    Args:
        model: encodes queries and candidates.
        queries: to search for.
        candidates: the pool, or its meta embeddings.
        budget: None spends all vectors.
        top: hits per query.
        batch_size: items encoded at a time; changes speed and memory, not the result.
        progress: show progress bars while encoding.

    Returns:
        For each query its hits, best first; of equal scores the earlier candidate comes first.

    Raises:
        UserError: no candidates, `top` below 1, or a budget the model was not trained for.
    """
    if top < 1:
        raise UserError(f"top must be at least 1, got {top}")
    if not len(candidates):
        raise UserError("no candidates to search")
    # Checked before the pool is encoded, which may take hours.
    budget = check_budget(budget or model.groups[-1], model.groups, model.widths)
    encoded = model.encode_query(queries, batch_size)
    if not isinstance(candidates, Tensor):
        candidates = model.encode_candidate(candidates, batch_size, progress)
    step = max(1, SCORES_AT_A_TIME // len(candidates))
    hits: list[list[Hit]] = []
    for start in range(0, len(encoded), step):
        scores = model.score(encoded[start : start + step], candidates, budget)
        hits.extend(best(scores, top))
    return hits


def best(scores: Float[Tensor, "Q C"], top: int) -> list[list[Hit]]:
    """The hits with the highest scores, best first; of equal scores the earlier candidate first.

    Raises:
        UserError: scores that are not finite.

    >>> best(Tensor([[1.0, 3.0, 3.0]]), top=2)
    [[Hit(candidate=1, score=3.0), Hit(candidate=2, score=3.0)]]
    """
    if not scores.isfinite().all():
        raise UserError("scores contain NaN or infinity and cannot be ranked")
    values, columns = best_columns(scores, top)
    rows = zip(columns.tolist(), values.tolist(), strict=True)
    return [list(map(Hit, candidates, of_row)) for candidates, of_row in rows]
