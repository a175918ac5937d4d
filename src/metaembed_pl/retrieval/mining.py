"""Hard negatives: what a trained model takes for an answer, and is none.

For each query the candidates of a corpus are ranked by the model. What is known to answer it is
masked: by id, by equal content, by the other pairs that ask the same. What scores too close to the
positive is left out as an answer that nobody marked. The best of the rest are its hard negatives.

N: pairs of a batch    Q: queries    Rq, Rc: vectors of a query, of a candidate    D: width
"""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget
from metaembed_pl.data.collate import Instructions, decoded
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair, stable_hash
from metaembed_pl.late_interaction import narrowed, paired_scores
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.retrieval.calibration import calibrate, stages_of
from metaembed_pl.retrieval.cascade import Stage
from metaembed_pl.retrieval.embedding import Entry
from metaembed_pl.retrieval.store import Store

LEFT_OUT_KEPT = 2
"""Of what scored too close to the positive, to look at in the report."""


class RankedCandidate(NamedTuple):
    """A candidate: its row in the corpus, and its score over r_q, in [-1, 1]."""

    row: int
    score: float


@dataclass(frozen=True)
class Rules:
    """Which of the ranked candidates become hard negatives.

    Args:
        num: how many of each query.
        skip_top: leave out so many of the best that are not known answers.
        margin: leave out what scores above the positive's score less this, over r_q; None: no such
            limit.
        ratio: leave out what scores above this share of the positive's score; where that is not
            above 0, what scores above the positive. Infinity: no such limit.

    Raises:
        UserError: a number out of range.

    Source: NV-Retriever, arXiv 2407.15831: limits relative to the positive keep out most false
    negatives, and 95 % of its score was the best of them.
    """

    num: int = 4
    skip_top: int = 0
    margin: float | None = None
    ratio: float = 0.95

    def __post_init__(self) -> None:
        for name in ("num", "skip_top", "margin", "ratio"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise UserError(f"{name} must be at least 0, got {value}")

    def limit(self, own: float) -> float:
        """The highest score that a hard negative of a positive with the score `own` may have.

        >>> Rules(margin=0.25, ratio=0.95).limit(0.5), Rules(ratio=0.5).limit(-0.25)
        (0.25, -0.25)
        """
        by_margin = math.inf if self.margin is None else own - self.margin
        by_ratio = own * self.ratio if own > 0 else own
        return min(by_margin, math.inf if math.isinf(self.ratio) else by_ratio)

    def choose(
        self,
        ranked: Sequence[RankedCandidate],
        own: float,
        is_right: Callable[[int], bool],
        content_of: Callable[[int], Any] = lambda row: row,
    ) -> "Mined":
        """The hard negatives of one query.

        Args:
            ranked: candidates, best first.
            own: the positive's score.
            is_right: whether a row is known to answer the query.
            content_of: what a row shows: none is taken twice.

        >>> ranked = [RankedCandidate(*pair) for pair in enumerate((0.9, 0.8, 0.79, 0.5, 0.4))]
        >>> mined = Rules(num=1, skip_top=1).choose(ranked, 0.8, lambda row: row == 1)
        >>> mined.negatives, mined.left_out
        ([RankedCandidate(row=3, score=0.5)], [RankedCandidate(row=2, score=0.79)])
        """
        mined = Mined(own)
        limit = self.limit(own)
        num_skipped, taken = 0, set()
        for found in ranked:
            if len(mined.negatives) == self.num:
                break
            if is_right(found.row):
                mined.counts["known answers"] += 1
            elif num_skipped < self.skip_top:
                num_skipped += 1
                mined.counts["skipped"] += 1
            elif found.score > limit:
                if len(mined.left_out) < LEFT_OUT_KEPT:
                    mined.left_out.append(found)
                mined.counts["too close to the positive"] += 1
            elif content_of(found.row) in taken:
                mined.counts["shown already"] += 1
            else:
                taken.add(content_of(found.row))
                mined.negatives.append(found)
        return mined


@dataclass
class Mined:
    """What was found for one query.

    Args:
        own: the positive's score.
        negatives: the hard negatives, best first.
        left_out: the first few of what scored too close to the positive, best first.
        counts: of the candidates that were passed over, and why.
    """

    own: float
    negatives: list[RankedCandidate] = field(default_factory=list)
    left_out: list[RankedCandidate] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class Corpus(Sequence[Item]):
    """The candidates to mine from, each once, read from where they lie when asked for.

    Args:
        sources: items, or pairs whose positives are meant.
        instructions: added to each item.
    """

    def __init__(
        self,
        sources: Sequence[Sequence[Item] | ShardedPairs],
        instructions: Instructions | None = None,
    ) -> None:
        self._sources = sources
        self._instructions = instructions or Instructions()
        self._places: list[tuple[int, int]] = []
        self.rows: dict[str, int] = {}
        self.answers: list[frozenset[int]] = []
        self.contents: list[int] = []
        self.num_bad = 0
        for number, source in enumerate(sources):
            for i in range(len(source)):
                try:
                    item = _candidate(source[i])
                except UserError:
                    self.num_bad += 1
                    continue
                if item.uid not in self.rows:
                    self.rows[item.uid] = len(self._places)
                    self._places.append((number, i))
                    names = (*item.answer_ids, item.content)
                    self.answers.append(frozenset(map(stable_hash, names)))
                    self.contents.append(stable_hash(item.content))

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, row: int) -> Item:
        number, i = self._places[row]
        return _candidate(self._sources[number][i])

    def entries(self) -> Iterator[Entry]:
        """What `embed` makes a store of."""
        for uid, row in self.rows.items():
            yield Entry.read(
                uid, lambda row=row: self._instructions.with_instruction(self[row], "candidate")
            )


class Ranking(NamedTuple):
    """How candidates are ranked, and how much of the exact ranking that finds."""

    stages: tuple[Stage, ...]
    recall: float


def ranking_for(
    store: Store, queries: Float[Tensor, "Q Rq D"], depth: int, target_recall: float
) -> Ranking:
    """The cheapest ranking that finds so much of the first `depth` of the exact one.

    Args:
        store: of the corpus; with an index, if it has one.
        queries: some of those that will be mined for.
        depth: candidates to rank for each query.
        target_recall: share of them.
    """
    exact = stages_of(str(store.groups[-1]), store.description, depth)
    wanted = store.search(queries, cascade=exact).rows
    for row in calibrate(store, queries).measured:
        if row.recall < target_recall:
            continue
        stages = stages_of(row.plan, store.description, depth)
        found = store.search(queries, cascade=stages).rows
        shares = [len(set(a) & set(b)) / len(b) for a, b in zip(found, wanted, strict=True)]
        if (recall := sum(shares) / len(shares)) >= target_recall:
            return Ranking(stages, recall)
    return Ranking(exact, 1.0)


class Miner:
    """Finds hard negatives for the pairs of a source.

    Args:
        model: ranks.
        store: of the corpus, made by the model.
        corpus: what is in the store.
        pairs: those to mine for.
        rules: what is left out.
        budget: of the scores; None spends all vectors. Or
        cascade: the stages of a search, see `Store.search`; the last one's budget counts.
        depth: candidates to rank for each query; a cascade's last stage says it itself.
        instructions: added to each query.
    """

    def __init__(
        self,
        model: MetaEmbedder,
        store: Store,
        corpus: Corpus,
        pairs: ShardedPairs,
        rules: Rules,
        *,
        budget: str | Budget | None = None,
        cascade: str | Sequence[Stage] | None = None,
        depth: int = 100,
        instructions: Instructions | None = None,
    ) -> None:
        self.model, self.store, self.corpus, self.pairs = model, store, corpus, pairs
        self.rules = rules
        self._search: dict[str, Any] = (
            {"cascade": cascade} if cascade else {"budget": budget, "top": depth}
        )
        self._instructions = instructions or Instructions()
        self._row_of = [corpus.rows[id] for id in store.ids if id in corpus.rows]
        if len(self._row_of) != len(store):
            raise UserError(
                f"{store.folder} holds other items than the corpus: remove it, or give another "
                "--store"
            )
        # All that is known to answer a query: other pairs may ask the same.
        self._wanted: defaultdict[int, set[int]] = defaultdict(set)
        for i in range(len(pairs)):
            try:
                pair = pairs[i]
            except UserError:
                continue
            wanted = self._wanted[stable_hash(pair.query.content)]
            wanted |= set(map(stable_hash, (*pair.relevant_ids, pair.positive.content)))

    def mine(self, numbers: Sequence[int]) -> list[Mined | str]:
        """The hard negatives of pairs, by number; for an unusable pair, the reason.

        A query that is itself a candidate is none of its own negatives.
        """
        pairs, reasons = self._readable(numbers)
        if not pairs:
            return [reasons[i] for i in numbers]
        queries = self.model.encode_query([pair.query for pair in pairs.values()], len(pairs))
        queries = queries.to(self.model.device)
        hits = self.store.search(queries, normalised=True, **self._search)
        r_q, r_c, width = hits.stages[-1].budget
        positives = self.store.rows_of(pair.positive.uid for pair in pairs.values())
        vectors = self.store.vectors(positives, r_c, width).to(queries.device)
        asked = narrowed(self.store.accept(queries)[:, :r_q], width)
        own = paired_scores(asked, vectors[:, None], [Budget(r_q, r_c)])[0, :, 0]
        found: dict[int, Mined | str] = {**reasons}
        for (i, pair), rows, scores, score in zip(
            pairs.items(), hits.rows, hits.scores, (own / r_q).tolist(), strict=True
        ):
            query = stable_hash(pair.query.content)
            wanted = self._wanted[query] | {query}
            ranked = [
                RankedCandidate(self._row_of[r], s) for r, s in zip(rows, scores, strict=True)
            ]
            is_right = self._is_right(wanted)
            content_of = self.corpus.contents.__getitem__
            found[i] = self.rules.choose(ranked, score, is_right, content_of)
        return [found[i] for i in numbers]

    def queries(self, numbers: Sequence[int]) -> Float[Tensor, "Q Rq D"]:
        """The queries of pairs, encoded; unusable ones are left out."""
        pairs, _ = self._readable(numbers)
        found = self.model.encode_query([pair.query for pair in pairs.values()], 32)
        return found.to(self.model.device)

    def rank_by(self, stages: Sequence[Stage]) -> None:
        """Rank candidates by these stages from now on."""
        self._search = {"cascade": tuple(stages)}

    def _is_right(self, wanted: set[int]) -> Callable[[int], bool]:
        return lambda row: not wanted.isdisjoint(self.corpus.answers[row])

    def _readable(self, numbers: Sequence[int]) -> tuple[dict[int, Pair], dict[int, str]]:
        pairs: dict[int, Pair] = {}
        reasons: dict[int, str] = {}
        for i in numbers:
            try:
                pair = decoded(self._instructions.on(self.pairs[i]))
                if pair.positive.uid not in self.store:
                    raise UserError("its positive is not in the store: it could not be read")
                pairs[i] = pair
            except UserError as error:
                reasons[i] = str(error)
        return pairs, reasons


def _candidate(value: Item | Pair) -> Item:
    return value if isinstance(value, Item) else value.positive
