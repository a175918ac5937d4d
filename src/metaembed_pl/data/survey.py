"""Statistics of shards: counts, lengths, sizes, and duplicates within and across folders.

One pass over the pairs. Two numbers are kept per text and picture, so that millions of pairs fit
into memory.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from metaembed_pl.data.collate import Cut
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair, stable_hash
from metaembed_pl.picture import picture_size
from metaembed_pl.samples import quantiles

EXAMPLES = 3
"""Shown of what cannot be used, and of what two folders share."""

Content = Literal["text", "picture", "pair", "negative"]
LEAKS: tuple[Content, ...] = ("text", "picture", "pair")


class Seen:
    """Contents as numbers, and the pair of each."""

    def __init__(self) -> None:
        self.hashes, self.pairs = array("q"), array("q")

    def add(self, content: str, pair: int) -> None:
        """Record a content of a pair."""
        self.hashes.append(stable_hash(content))
        self.pairs.append(pair)

    def num_repeats(self) -> int:
        """How many contents are repetitions.

        >>> seen = Seen()
        >>> for content in "abaa": seen.add(content, 0)
        >>> seen.num_repeats()
        2
        """
        hashes = np.array(self.hashes)
        return len(hashes) - len(np.unique(hashes))

    def shared(self, other: "Seen") -> tuple[int, list[int]]:
        """How many contents are also in another, and the first pairs here that have one."""
        hashes = np.array(self.hashes)
        common = np.intersect1d(hashes, np.array(other.hashes))
        pairs = np.array(self.pairs)[np.isin(hashes, common)]
        return len(common), np.unique(pairs)[:EXAMPLES].tolist()


def questions_by_candidate(uids: Seen) -> list[int]:
    """How many questions each candidate has, ascending, from the uids of the positives.

    >>> uids = Seen()
    >>> for number, uid in enumerate("aba"): uids.add(uid, number)
    >>> questions_by_candidate(uids)
    [1, 2]
    """
    return sorted(np.unique(np.array(uids.hashes), return_counts=True)[1].tolist())


def differing(uids: Seen, contents: Seen) -> list[tuple[int, int]]:
    """Two pairs for each uid of a positive that stands for more than one content."""
    of_uid, of_content = np.array(uids.hashes), np.array(contents.hashes)
    order = np.lexsort((of_content, of_uid))
    of_uid, of_content = of_uid[order], of_content[order]
    is_same = of_uid[1:] == of_uid[:-1]
    changes = np.flatnonzero(is_same & (of_content[1:] != of_content[:-1]))
    _, first = np.unique(of_uid[changes], return_index=True)
    pairs = np.array(uids.pairs)[order]
    return [(int(pairs[i]), int(pairs[i + 1])) for i in changes[first]]


@dataclass
class SideSurvey:
    """The queries, or the candidates, of a folder."""

    shapes: Counter[str] = field(default_factory=Counter)
    text_lengths: array = field(default_factory=lambda: array("q"))
    widths: array = field(default_factory=lambda: array("q"))
    heights: array = field(default_factory=lambda: array("q"))
    formats: Counter[str] = field(default_factory=Counter)

    def add(self, item: Item, picture: "_Picture | None") -> None:
        """Record an item and its picture."""
        parts = [name for name in ("text", "image") if getattr(item, name) is not None]
        self.shapes[" and ".join(parts)] += 1
        if item.text is not None:
            self.text_lengths.append(len(item.text))
        if picture is not None:
            self.widths.append(picture.width)
            self.heights.append(picture.height)
            self.formats[picture.format] += 1

    def summary(self) -> dict[str, Any]:
        """The numbers for JSON: lengths in characters, sizes in pixels."""
        return {
            "items": dict(self.shapes.most_common()),
            "text_characters": quantiles(self.text_lengths) or None,
            "picture_width": quantiles(self.widths) or None,
            "picture_height": quantiles(self.heights) or None,
            "picture_formats": dict(self.formats.most_common()),
        }


class Survey:
    """The contents of a folder of shards.

    Args:
        pairs: the folder.
        decode: decode every picture, to find broken ones, and compare pixels instead of files.
            Otherwise only the header of each picture is read.
        track: wraps the numbers of the pairs, to show progress.
        processing: of a model: counts the texts that it would cut; None: they are not counted.
    """

    def __init__(
        self,
        pairs: ShardedPairs,
        decode: bool = False,
        track: Callable[[Sequence[int]], Iterable[int]] = iter,
        processing: Any = None,
    ):
        self._processing = processing
        self.pairs = pairs
        self.bad: list[str] = []
        self.num_bad = 0
        self.sides = {"query": SideSurvey(), "candidate": SideSurvey()}
        self.num_negatives: Counter[int] = Counter()
        self.own_positive_as_negative = 0
        # Texts and pictures of queries and positives, of both together, and of hard negatives.
        self.seen: dict[Content, Seen] = {kind: Seen() for kind in get_args(Content)}
        self._queries, self._ids, self._uids, self._positives = Seen(), Seen(), Seen(), Seen()
        self._decode = decode
        for i in track(range(len(pairs))):
            try:
                self._add(pairs[i], i)
            except UserError as error:
                self.num_bad += 1
                if len(self.bad) < EXAMPLES:
                    self.bad.append("/".join(pairs.locate(i)) + f": {error}")
        self.cut: str | None = None
        if processing is not None:
            self.cut, processing.cut = str(processing.cut), Cut()

    def _add(self, pair: Pair, i: int) -> None:
        items = (pair.query, pair.positive, *pair.negatives)
        pictures = [_picture_of(item, self._decode) for item in items]  # a broken one raises now
        if self._processing is not None:
            self._processing.text_ids(items[:1], "query")
            self._processing.text_ids(items[1:], "candidate")
        for item, picture in zip(items, pictures, strict=True):
            self.sides["query" if item is pair.query else "candidate"].add(item, picture)
            is_negative = item is not pair.query and item is not pair.positive
            if item.text is not None:
                self.seen["negative" if is_negative else "text"].add(item.text, i)
            if picture is not None:
                self.seen["negative" if is_negative else "picture"].add(picture.content, i)
        self.num_negatives[len(pair.negatives)] += 1
        own = pair.positive.content
        self.own_positive_as_negative += any(item.content == own for item in pair.negatives)
        self.seen["pair"].add(f"{pair.query.content} {own}", i)
        self._queries.add(pair.query.content, i)
        self._ids.add(pair.id, i)
        self._uids.add(pair.positive.uid, i)
        self._positives.add(own, i)

    def summary(self) -> dict[str, Any]:
        """The numbers for JSON."""
        manifest = self.pairs.manifest
        questions = questions_by_candidate(self._uids)
        contradicting = differing(self._uids, self._positives)
        return {
            "folder": str(self.pairs.folder),
            "name": self.pairs.name,
            "licence": manifest.get("licence", ""),
            "num_pairs": len(self.pairs),
            "num_shards": len(self.pairs.shard_sizes),
            "num_bad": self.num_bad,
            "cut": self.cut,
            "bad": self.bad,
            "queries": self.sides["query"].summary(),
            "candidates": self.sides["candidate"].summary(),
            "num_candidates": len(questions),
            "questions": quantiles(array("q", questions)) or None,
            "differing_candidates": {
                "count": len(contradicting),
                "pairs": [[self.pairs[i].id for i in two] for two in contradicting[:EXAMPLES]],
            },
            "num_negatives": {str(n): self.num_negatives[n] for n in sorted(self.num_negatives)},
            "repeated": {
                "ids": self._ids.num_repeats(),
                "queries": self._queries.num_repeats(),
                "pairs": self.seen["pair"].num_repeats(),
                "own_positive_as_negative": self.own_positive_as_negative,
            },
        }


def shared(surveys: Sequence[Survey]) -> list[dict[str, Any]]:
    """The contents that two folders share, for each two that share any.

    Texts and pictures of queries are also compared with those of positives: a training query that
    is a test candidate is a leak as well. Hard negatives are counted apart: a model has then seen
    queries or candidates of the other folder, as negatives.
    """
    found = []
    for one, other in combinations(surveys, 2):
        counts = {kind: one.seen[kind].shared(other.seen[kind]) for kind in LEAKS}
        places = {kind: [one.pairs[i].id for i in pairs] for kind, (_, pairs) in counts.items()}
        leak = {
            **{f"num_{kind}s": count for kind, (count, _) in counts.items()},
            "num_negatives_asked": [_num_asked(one, other), _num_asked(other, one)],
        }
        if any(count for count, _ in counts.values()) or any(leak["num_negatives_asked"]):
            folders = [str(one.pairs.folder), str(other.pairs.folder)]
            examples = {kind: ids for kind, ids in places.items() if ids}
            found.append({"folders": folders, **leak, "examples": examples})
    return found


def _num_asked(one: Survey, other: Survey) -> int:
    """How many hard negatives of one folder are queries or positives of the other."""
    negatives = one.seen["negative"]
    return sum(negatives.shared(other.seen[kind])[0] for kind in ("text", "picture"))


class _Picture(NamedTuple):
    format: str
    width: int
    height: int
    content: str


def _picture_of(item: Item, decode: bool) -> _Picture | None:
    """An item's picture without its text; None if it has none."""
    if item.image is None:
        return None
    size = picture_size(item.image_content())
    return _Picture(*size, Item(image=item.load_image() if decode else item.image).content)
