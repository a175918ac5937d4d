"""Hard negatives: candidates that a trained model takes for answers, although they are not.

The model ranks the candidates of a corpus for each query. Known answers are masked: by id, by equal
content, and by other pairs with the same query. Candidates that score too close to the positive are
left out as possible answers that nobody labelled. The best of the rest are the hard negatives.

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

SHOWN_LEFT_OUT = 2
"""Candidates too close to the positive that the report shows."""


class RankedCandidate(NamedTuple):
    """A candidate: its row in the corpus, and its score over r_q, in [-1, 1]."""

    row: int
    score: float


@dataclass(frozen=True)
class Rules:
    """Which of the ranked candidates become hard negatives.

    Args:
        num: hard negatives per query.
        skip_top: skip so many of the best candidates that are not known answers.
        margin: skip candidates scoring above (positive score - margin), divided by r_q; None: no
            such limit.
        ratio: skip candidates scoring above this share of the positive's score; if that is not
            above 0, candidates scoring above the positive. Infinity: no such limit.

    Raises:
        UserError: a number is out of range.

    Source: NV-Retriever, arXiv 2407.15831: limits relative to the positive exclude most false
    negatives; 95 % of its score was the best limit.
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
        """The highest score of a hard negative, if the positive's score is `own`.

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
            content_of: the content of a row; no content is taken twice.

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
                if len(mined.left_out) < SHOWN_LEFT_OUT:
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
    """The hard negatives of one query.

    Args:
        own: the positive's score.
        negatives: best first.
        left_out: the first few candidates that score too close to the positive, best first.
        counts: skipped candidates by reason.
    """

    own: float
    negatives: list[RankedCandidate] = field(default_factory=list)
    left_out: list[RankedCandidate] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


class Corpus(Sequence[Item]):
    """The candidates to mine from, without duplicates; read from their source when needed.

    Args:
        sources: items, or pairs, whose positives are taken.
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
        """The candidates as `embed` takes them."""
        for uid, row in self.rows.items():
            try:
                item = self._instructions.with_instruction(self[row], "candidate")
            except UserError as error:
                yield Entry.unreadable(uid, error)
                continue
            about = {"content_hash": self.contents[row], "instruction": item.instruction}
            yield Entry.given(uid, item, about)


def stages_for(
    store: Store, queries: Float[Tensor, "Q Rq D"], depth: int, target_recall: float
) -> tuple[tuple[Stage, ...], float]:
    """The cheapest search that finds a share of the exact search's first `depth` hits; its recall.

    It is measured with `queries`, some of those to mine for.
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
            return stages, recall
    return exact, 1.0


class Miner:
    """Finds hard negatives for the pairs of a source.

    Args:
        model: encodes the queries.
        store: of the corpus, embedded by the model.
        corpus: the items in the store.
        pairs: to mine for.
        rules: of choosing.
        budget: to rank at; None: all vectors.
        cascade: instead of a budget, see `Store.search`; scores are those of the last stage.
        depth: candidates to rank for each query; with a cascade, its last stage sets it.
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
        # All known answers of a query: other pairs may have the same query.
        self._answers: defaultdict[int, set[int]] = defaultdict(set)
        for i in range(len(pairs)):
            try:
                pair = pairs[i]
            except UserError:
                continue
            names = (*pair.relevant_ids, pair.positive.content)
            self._answers[stable_hash(pair.query.content)].update(map(stable_hash, names))

    def mine(self, numbers: Sequence[int]) -> list[Mined | str]:
        """The hard negatives of pairs, by number; for an unusable pair, the reason.

        A query that is a candidate as well is not its own negative.
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
        projected = narrowed(self.store.accept(queries)[:, :r_q], width)
        own = paired_scores(projected, vectors[:, None], [Budget(r_q, r_c)])[0, :, 0]
        found: dict[int, Mined | str] = {**reasons}
        for (i, pair), rows, scores, score in zip(
            pairs.items(), hits.rows, hits.scores, (own / r_q).tolist(), strict=True
        ):
            query = stable_hash(pair.query.content)
            ranked = list(map(RankedCandidate, [self._row_of[row] for row in rows], scores))
            is_right = self._is_one_of(self._answers[query] | {query})
            content_of = self.corpus.contents.__getitem__
            found[i] = self.rules.choose(ranked, score, is_right, content_of)
        return [found[i] for i in numbers]

    def queries(self, numbers: Sequence[int]) -> Float[Tensor, "Q Rq D"]:
        """The encoded queries of pairs, except unusable ones."""
        pairs, _ = self._readable(numbers)
        found = self.model.encode_query([pair.query for pair in pairs.values()], 32)
        return found.to(self.model.device)

    def rank_by(self, stages: Sequence[Stage]) -> None:
        """Rank candidates with these stages from now on."""
        self._search = {"cascade": tuple(stages)}

    def _is_one_of(self, answers: set[int]) -> Callable[[int], bool]:
        return lambda row: not answers.isdisjoint(self.corpus.answers[row])

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
