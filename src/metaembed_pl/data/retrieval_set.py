"""A retrieval set: queries, their candidates, and the right answers among these.

The same class serves a pool that all queries share, separate lists for each query (MMEB), and
graded relevance (ViDoRe).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair


@dataclass(frozen=True)
class RetrievalSet:
    """Queries, the candidates they search, and which of these are right.

    Args:
        name: of the source, in metrics.
        queries: all with at least one right candidate.
        candidates: all that any query searches.
        relevant: for each query the indices of its right candidates, ascending, at least one. An
            index below 0 is a candidate that is judged but missing: it counts as not found.
        gains: relevance of each of these, above 0, in the order of `relevant`; None: all 1.
        lists: for each query the indices of the candidates that it searches, each once, including
            all its right ones; None: every query searches the entire pool.
        num_left_out: queries of the source without a right candidate, which are left out.
        itself: for each query its own index among the candidates, which it does not search; -1:
            none. None: no query is a candidate.
    """

    name: str
    queries: Sequence[Item]
    candidates: Sequence[Item]
    relevant: list[list[int]]
    gains: list[list[float]] | None = None
    lists: list[list[int]] | None = None
    num_left_out: int = 0
    itself: list[int] | None = None

    def gains_of(self, query: int) -> dict[int, float]:
        """The right candidates of a query, by index, with their gains."""
        relevant = self.relevant[query]
        gains = [1.0] * len(relevant) if self.gains is None else self.gains[query]
        return dict(zip(relevant, gains, strict=True))

    def searched(self, query: int) -> Sequence[int]:
        """The indices of the candidates that a query searches."""
        return range(len(self.candidates)) if self.lists is None else self.lists[query]

    def subset(
        self, max_queries: int | None = None, max_candidates: int | None = None
    ) -> "RetrievalSet":
        """A smaller set for quick checks: scores on it are higher than on the complete set.

        Args:
            max_queries: keep the first so many; None keeps all.
            max_candidates: a query searches only the first so many, but always all right ones of
                its pool or list; None keeps all.

        >>> items = [Item(letter) for letter in "abcd"]
        >>> small = RetrievalSet("x", [Item("q"), Item("r")], items, [[3], [0]]).subset(1, 2)
        >>> [item.text for item in small.candidates], small.relevant
        (['a', 'd'], [[1]])
        """
        queries = range(len(self.queries))[:max_queries]
        needed = [self.relevant[query] for query in queries]
        if self.lists is None:
            together = {index for indices in needed for index in indices}
            chosen = _first(range(len(self.candidates)), together, max_candidates)
            lists = None
        else:
            lists = [
                _first(self.lists[query], set(right), max_candidates)
                for query, right in zip(queries, needed, strict=True)
            ]
            chosen = sorted({index for indices in lists for index in indices})
        if len(chosen) == len(self.candidates) and len(queries) == len(self.queries):
            return self if lists is None else replace(self, lists=lists)
        place = {index: position for position, index in enumerate(chosen)}
        return replace(
            self,
            queries=[self.queries[query] for query in queries],
            candidates=[self.candidates[index] for index in chosen],
            relevant=[[place.get(index, index) for index in right] for right in needed],
            gains=self.gains and [self.gains[query] for query in queries],
            lists=lists and [[place[index] for index in indices] for indices in lists],
            itself=self.itself and [place.get(self.itself[query], -1) for query in queries],
        )

    def asking(self, queries: Sequence[int]) -> "RetrievalSet":
        """The same candidates with some of the queries, given by their indices.

        >>> items = [Item(letter) for letter in "abcd"]
        >>> RetrievalSet("x", items, items, [[0], [1], [2], [3]]).asking([1, 2]).relevant
        [[1], [2]]
        """
        return replace(
            self,
            queries=[self.queries[query] for query in queries],
            relevant=[self.relevant[query] for query in queries],
            gains=self.gains and [self.gains[query] for query in queries],
            lists=self.lists and [self.lists[query] for query in queries],
            itself=self.itself and [self.itself[query] for query in queries],
        )

    @classmethod
    def from_pairs(
        cls, name: str, pairs: Iterable[Pair], max_queries: int | None = None
    ) -> "RetrievalSet":
        """Pool the positives of pairs; a candidate is right if it answers what a query asks.

        A candidate of several pairs is in the pool once; hard negatives are not in it. A query of
        several pairs is evaluated once; the positives of all of them are right, and so are
        candidates with the same content.

        Args:
            name: of the source.
            pairs: each a query and one of its right candidates.
            max_queries: use only the first so many pairs. The pool shrinks with them, so scores
                are higher than on the complete set.

        Raises:
            UserError: there are no pairs, or a query's own positive does not answer it.

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
            for answer in {*candidate.answer_ids, candidate.content}:
                answering.setdefault(answer, []).append(index)
        queries: dict[str, Item] = {}
        relevant: dict[str, set[int]] = {}
        for pair in pairs:
            positive = candidates[pair.positive.uid]
            if not set(pair.relevant_ids) & set(positive.answer_ids):
                raise UserError(
                    f"{name}: pair {pair.id!r} asks {pair.target_id!r}, which its positive "
                    f"{pair.positive.uid!r} does not answer"
                )
            queries.setdefault(pair.question, pair.query)
            right = relevant.setdefault(pair.question, set())
            for answer in (*pair.relevant_ids, positive.content):
                right.update(answering.get(answer, ()))
        found = [sorted(right) for right in relevant.values()]
        return cls(name, list(queries.values()), list(candidates.values()), found)


def _first(indices: Sequence[int], needed: set[int], count: int | None) -> list[int]:
    """All needed indices and the first others, `count` together, in the same order."""
    if count is None:
        return list(indices)
    others = [index for index in indices if index not in needed]
    needed = needed.intersection(indices)
    chosen = needed.union(others[: max(0, count - len(needed))])
    return [index for index in indices if index in chosen]
