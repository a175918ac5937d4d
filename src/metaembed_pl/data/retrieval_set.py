"""What is evaluated: queries, a pool of candidates, and which of them are right."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair


@dataclass(frozen=True)
class RetrievalSet:
    """Queries that all search one pool of candidates.

    Args:
        name: the source's name, as metrics show it.
        queries: what is asked.
        candidates: the pool.
        relevant: for each query the indices of its right candidates, ascending, at least one.
    """

    name: str
    queries: list[Item]
    candidates: list[Item]
    relevant: list[list[int]]

    @classmethod
    def from_pairs(
        cls, name: str, pairs: Iterable[Pair], max_queries: int | None = None
    ) -> "RetrievalSet":
        """Pool the positives of pairs; a candidate is right if its answers hold what is asked.

        A candidate two pairs share stands in the pool once. Hard negatives stay out of it.

        Args:
            name: the source's name.
            pairs: one query each.
            max_queries: use only the first so many pairs. The pool shrinks with them, so scores
                are then higher than on the whole set.

        Raises:
            UserError: no pairs, or a query whose own positive does not answer it.

        Example:
            >>> cat, cats = Item("cat", id="1"), Item("cats", id="2", answers=("1", "2"))
            >>> pairs = [Pair("a", Item("miaow"), cat), Pair("b", Item("miaows"), cats, asks="2")]
            >>> RetrievalSet.from_pairs("pets", pairs).relevant
            [[0, 1], [1]]
        """
        pairs = list(islice(pairs, max_queries))
        if not pairs:
            raise UserError(f"{name}: no pairs to evaluate on")
        candidates: dict[str, Item] = {}
        for pair in pairs:
            candidates.setdefault(pair.positive.uid, pair.positive)
        answering: dict[str, list[int]] = {}
        for index, candidate in enumerate(candidates.values()):
            for answer in dict.fromkeys(candidate.answered):
                answering.setdefault(answer, []).append(index)
        for pair in pairs:
            if pair.asked not in candidates[pair.positive.uid].answered:
                raise UserError(
                    f"{name}: pair {pair.id!r} asks {pair.asked!r}, which its positive "
                    f"{pair.positive.uid!r} does not answer"
                )
        relevant = [answering[pair.asked] for pair in pairs]
        return cls(name, [pair.query for pair in pairs], list(candidates.values()), relevant)
