"""Pairs -> batches of tensors.

Shape letters: Q queries, K right ids of a query, C candidates, A ids that a candidate answers,
M hard negatives of all queries, N most hard negatives of a query, B rows.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, Self

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair, stable_hash

Side = Literal["query", "candidate"]
NOTHING_ASKED = -2
"""Pads `asks` of queries with fewer right ids; no candidate answers it."""


@dataclass
class WithTensors:
    """Moves the tensors inside it.

    Lightning and torch look for these methods; without them, Lightning would look for tensors in
    each key of each pair, and torch would pin nothing.
    """

    def to(self, device: torch.device) -> Self:
        """A copy with its tensors on the device; copies to a GPU are asynchronous."""
        return _changed(self, lambda t: t.to(device, non_blocking=device.type == "cuda"))

    def pin_memory(self) -> Self:
        """A copy with its tensors in pinned memory."""
        return _changed(self, Tensor.pin_memory)


def _changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, WithTensors):
        return replace(
            value, **{name: _changed(part, change) for name, part in vars(value).items()}
        )
    if isinstance(value, dict):
        return {name: _changed(part, change) for name, part in value.items()}
    is_chunks = isinstance(value, list) and value and isinstance(value[0], Chunk)
    return [_changed(part, change) for part in value] if is_chunks else value


@dataclass
class Chunk(WithTensors):
    """Some rows of a batch, which are encoded together.

    Args:
        rows: their numbers in the batch.
        inputs: tensors of these rows, in this order.
    """

    rows: Int[Tensor, " b"]
    inputs: dict[str, Tensor]

    def inputs_on(self, device: torch.device, but: Sequence[str] = ()) -> dict[str, Tensor]:
        """The inputs on a device; those named in `but` stay where they are."""
        return {
            name: tensor if name in but else tensor.to(device, non_blocking=True)
            for name, tensor in self.inputs.items()
        }


Inputs = dict[str, Tensor] | list[Chunk]
"""Processed rows: in one piece, or in chunks of similar length."""


class Preprocess(Protocol):
    """Turns items into tensors; see `Processing`."""

    cut: "Cut"

    def __call__(self, items: Sequence[Item], side: Side) -> dict[str, Tensor]:
        """Tensors of a batch of queries, or of candidates."""
        ...

    def in_chunks(
        self, items: Sequence[Item], side: Side, max_tokens: int | None = None
    ) -> list[Chunk]:
        """The same in chunks of similar length, with at most so many tokens, padding included."""
        ...

    def rough_length(self, item: Item, side: Side) -> int:
        """Estimated number of tokens of an item's row; pictures are not decoded."""
        ...


@dataclass
class Cut:
    """Counts of texts that were truncated.

    >>> Cut(3, 1, 100, 25, 32)
    1 of 3 texts are longer than 32 tokens and were cut there: 25.0 % of all tokens are not read
    """

    num_texts: int = 0
    num_cut: int = 0
    num_tokens: int = 0
    num_lost: int = 0
    limit: int = 0

    def note(self, lengths: Sequence[int], limit: int) -> None:
        """Add texts of so many tokens each, truncated at a limit."""
        lost = [length - limit for length in lengths if length > limit]
        self += Cut(len(lengths), len(lost), sum(lengths), sum(lost), limit)

    def __iadd__(self, other: "Cut") -> "Cut":
        for name, count in vars(other).items():
            setattr(self, name, count if name == "limit" else getattr(self, name) + count)
        return self

    def __repr__(self) -> str:
        return (
            f"{self.num_cut:,} of {self.num_texts:,} texts are longer than {self.limit} tokens and "
            f"were cut there: {100 * self.num_lost / max(1, self.num_tokens):.1f} % of all tokens "
            "are not read"
        )


@dataclass
class TrainBatch(WithTensors):
    """One rank's part of a global batch: candidates, each with one or more questions.

    Args:
        source: the source of all its pairs.
        step: its number in the plan, counted over the entire run.
        keys: ids of its pairs, for error messages.
        queries: processed queries, Q rows.
        candidates: processed candidates, C + M rows: the positives, then the hard negatives.
        positive_of: the candidate of each query.
        negatives_of: the hard negatives that each query is compared with, padded with -1; None if
            there are none at all.
        asks: hashes of what is right for each query: ids, the content of its own positive, and the
            question itself; padded with NOTHING_ASKED.
        answers: hashes of what each positive answers: ids, its content, and its own questions.
        negative_answers: likewise for each hard negative; None if there are none.
        scores: scores by `mine` or a teacher of each query with its positive and its hard
            negatives: NaN without a score, -infinity where there is no such negative. None: there
            are no scores.
        faults: (shard, key, reason) of pairs that could not be used and were replaced.
        cut: counts of its truncated texts.
    """

    source: str
    step: int
    keys: list[str]
    queries: Inputs
    candidates: Inputs
    positive_of: Int[Tensor, " Q"]
    negatives_of: Int[Tensor, "Q N"] | None
    asks: Int[Tensor, "Q K"]
    answers: Int[Tensor, "C A"]
    negative_answers: Int[Tensor, "M A"] | None
    scores: Float[Tensor, "Q _"] | None = None
    faults: list[tuple[str, str, str]] = field(default_factory=list)
    cut: Cut = field(default_factory=Cut)

    @property
    def num_positives(self) -> int:
        """C: rows of `candidates` before the hard negatives."""
        return len(self.answers)

    def loss_inputs(self, candidates: Float[Tensor, "_ Rc D"]) -> dict[str, Tensor | None]:
        """The arguments of `MMRLoss` after the queries, from the embeddings of `candidates`."""
        found: dict[str, Tensor | None] = {
            "positives": candidates[: self.num_positives],
            "positive_of": self.positive_of,
            "asks": self.asks,
            "answers": self.answers,
        }
        if self.negatives_of is not None:
            found["negatives"] = candidates[self.num_positives :]
            found["negatives_of"] = self.negatives_of
            found["negative_answers"] = self.negative_answers
        return found


@dataclass
class EvalBatch(WithTensors):
    """Some queries or candidates of an evaluation set, with their numbers in it.

    Args:
        dataset: its name.
        side: of the items.
        index: of each item in the set.
        inputs: processed items.
        unread: for rows whose item cannot be read, the reason; they hold another text.
    """

    dataset: str
    side: Side
    index: Int[Tensor, " B"]
    inputs: dict[str, Tensor]
    unread: dict[int, str] = field(default_factory=dict)


def decoded(pair: Pair) -> Pair:
    """The pair with its pictures decoded, so that a broken one is noticed now.

    Raises:
        UserError: a picture does not decode.
    """
    return replace(
        pair,
        query=pair.query.decoded(),
        positive=pair.positive.decoded(),
        negatives=tuple(negative.decoded() for negative in pair.negatives),
    )


@dataclass(frozen=True)
class Instructions:
    """The instructions of a source.

    Args:
        query: precedes the text of each query that has no instruction of its own.
        candidate: likewise, for positives and hard negatives.

    Raises:
        UserError: one is empty.
    """

    query: str | None = None
    candidate: str | None = None

    def __post_init__(self) -> None:
        for words in (self.query, self.candidate):
            if words is not None and not words.strip():
                raise UserError("an instruction is empty: leave it out instead")

    def on(self, pair: Pair) -> Pair:
        """The pair with the instruction of each side added to its items.

        >>> pair = Instructions("Find its name:").on(Pair("1", Item("a cat"), Item("fur")))
        >>> pair.query.instruction, pair.positive.instruction
        ('Find its name:', None)
        """
        if self.query is None and self.candidate is None:
            return pair
        return replace(
            pair,
            query=self.with_instruction(pair.query, "query"),
            positive=self.with_instruction(pair.positive, "candidate"),
            negatives=tuple(
                self.with_instruction(negative, "candidate") for negative in pair.negatives
            ),
        )

    def with_instruction(self, item: Item, side: Side) -> Item:
        """An item of one side with its instruction, unless it has its own."""
        words = self.query if side == "query" else self.candidate
        is_new = words is not None and item.instruction is None
        return replace(item, instruction=words) if is_new else item


def chosen_negatives(available: int, count: int, turn: int) -> list[int]:
    """The numbers of the hard negatives to use: they rotate each time a pair is used.

    Args:
        available: how many it has.
        count: how many to use at most.
        turn: rotates the choice.

    >>> chosen_negatives(3, 2, turn=1)
    [2, 0]
    """
    return [(turn * count + i) % available for i in range(min(count, available))]


def with_positive_of(pair: Pair, first: Pair) -> Pair:
    """The pair with the positive of another pair of the same candidate, which is decoded once.

    Raises:
        UserError: the two share the candidate's id, but not its content; names both.

    >>> apple, pear = Item("apple", id="1"), Item("pear", id="1")
    >>> with_positive_of(Pair("b", Item("r"), pear), Pair("a", Item("q"), apple))
    Traceback (most recent call last):
    metaembed_pl.errors.UserError: pairs 'a' and 'b' share the candidate id '1', but not what ...
    """
    if pair.positive.content != first.positive.content:
        raise UserError(
            f"pairs {first.id!r} and {pair.id!r} share the candidate id {first.positive.uid!r}, "
            "but not what it shows: give each candidate its own id"
        )
    return replace(
        pair, positive=first.positive.answering(pair.positive.answers, pair.positive.score)
    )


def collate(
    questions: Sequence[Sequence[Pair]],
    process: Preprocess,
    *,
    source: str,
    step: int,
    in_chunks: bool = False,
    max_chunk_tokens: int | None = None,
) -> TrainBatch:
    """One batch, from the pairs of each candidate.

    Everything is encoded once: a positive of several pairs, and equal hard negatives. Nothing is
    added if a pair has fewer hard negatives than others.

    Args:
        questions: at least one pair for each candidate.
        process: turns items into tensors.
        source: the name of their source.
        step: of the plan.
        in_chunks: make chunks of rows of similar length, instead of one piece.
        max_chunk_tokens: make chunks of at most so many tokens.
    """

    def processed(items: list[Item], side: Side) -> Inputs:
        if not in_chunks and max_chunk_tokens is None:
            return process(items, side)
        return process.in_chunks(items, side, max_chunk_tokens)

    pairs = [pair for group in questions for pair in group]
    positives = [group[0].positive for group in questions]
    negatives, rows = _distinct([pair.negatives for pair in pairs])
    return TrainBatch(
        source=source,
        step=step,
        keys=[pair.id for pair in pairs],
        queries=processed([pair.query for pair in pairs], "query"),
        candidates=processed([*positives, *negatives], "candidate"),
        positive_of=torch.tensor([c for c, group in enumerate(questions) for _ in group]),
        negatives_of=_padded(rows) if negatives else None,
        asks=_padded(map(_relevant_hashes, pairs), NOTHING_ASKED),
        answers=_padded(map(_answers_of, questions)),
        negative_answers=_padded(map(_answer_hashes, negatives)) if negatives else None,
        scores=_scores(pairs),
    )


def _scores(pairs: Sequence[Pair]) -> Float[Tensor, "Q _"] | None:
    """The scores of each pair's positive and of its hard negatives."""
    rows = [[item.score for item in (pair.positive, *pair.negatives)] for pair in pairs]
    if all(score is None for row in rows for score in row):
        return None
    scores = [torch.tensor([math.nan if s is None else s for s in row]) for row in rows]
    return pad_sequence(scores, batch_first=True, padding_value=-math.inf)


def _distinct(items: Sequence[Sequence[Item]]) -> tuple[list[Item], list[list[int]]]:
    """The distinct items of all groups, and the numbers of each group's items.

    >>> _distinct([[Item("a"), Item("b")], [Item("a")]])[1]
    [[0, 1], [0]]
    """
    found: dict[tuple, int] = {}
    distinct: list[Item] = []
    rows = []
    for group in items:
        rows.append([])
        for item in group:
            key = item.content, item.answer_ids, item.instruction
            if key not in found:
                found[key] = len(distinct)
                distinct.append(item)
            rows[-1].append(found[key])
    return distinct, rows


def _relevant_hashes(pair: Pair) -> list[int]:
    """Hashes of a query's right answers: ids, its positive's content, the question itself."""
    return list(map(stable_hash, (*pair.relevant_ids, pair.positive.content, pair.question)))


def _answers_of(pairs: Sequence[Pair]) -> list[int]:
    """Hashes of what a positive answers according to any of its pairs, and of their questions.

    The same question may come with another positive elsewhere in the global batch.
    """
    found = [answer for pair in pairs for answer in _answer_hashes(pair.positive)]
    return list(dict.fromkeys([*found, *(stable_hash(pair.question) for pair in pairs)]))


def _answer_hashes(item: Item) -> list[int]:
    return list(map(stable_hash, (*item.answer_ids, item.content)))


def _padded(rows: Iterable[Sequence[int]], padding: int = -1) -> Int[Tensor, "B A"]:
    rows = list(rows)
    width = max(map(len, rows), default=0)
    padded = [[*row, *[padding] * (width - len(row))] for row in rows]
    return torch.tensor(padded, dtype=torch.long)
