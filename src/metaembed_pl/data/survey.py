"""Statistics of shards: counts, lengths, sizes, and duplicates within and across folders.

One pass over the pairs. Two numbers are kept per text and picture, so that millions of pairs fit
into memory.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np

from metaembed_pl.data.collate import Cut
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair, stable_hash
from metaembed_pl.picture import picture_size
from metaembed_pl.samples import quantiles

EXAMPLES = 3
"""Shown of what cannot be used, and of what two folders share."""

Kind = Literal["text", "picture", "pair", "negative"]
LEAKS: tuple[Kind, ...] = ("text", "picture", "pair")


class Seen:
    """Contents as numbers, with the pair in which each stood."""

    def __init__(self) -> None:
        self._hashes, self._pairs = array("q"), array("q")

    def add(self, content: str, pair: int) -> None:
        """Note a content of a pair."""
        self._hashes.append(stable_hash(content))
        self._pairs.append(pair)

    def num_repeats(self) -> int:
        """How many contents have been there before.

        >>> seen = Seen()
        >>> for content in "abaa": seen.add(content, 0)
        >>> seen.num_repeats()
        2
        """
        hashes = np.array(self._hashes)
        return len(hashes) - len(np.unique(hashes))

    def shared(self, other: "Seen") -> tuple[int, list[int]]:
        """How many different contents another has as well, and the first pairs here with one."""
        hashes = np.array(self._hashes)
        common = np.intersect1d(hashes, np.array(other._hashes))
        pairs = np.array(self._pairs)[np.isin(hashes, common)]
        return len(common), np.unique(pairs)[:EXAMPLES].tolist()


class Candidates:
    """Which pairs share a candidate."""

    def __init__(self) -> None:
        self._uids, self._contents, self._pairs = array("q"), array("q"), array("q")

    def add(self, positive: Item, pair: int) -> None:
        """Note the positive of a pair."""
        self._uids.append(stable_hash(positive.uid))
        self._contents.append(stable_hash(positive.content))
        self._pairs.append(pair)

    def num_questions(self) -> list[int]:
        """How many questions each candidate has.

        >>> candidates = Candidates()
        >>> for number, name in enumerate("aba"): candidates.add(Item(name), number)
        >>> candidates.num_questions()
        [1, 2]
        """
        return sorted(np.unique(np.array(self._uids), return_counts=True)[1].tolist())

    def differing(self) -> list[tuple[int, int]]:
        """Two pairs of each id that stands for more than one content."""
        uids, contents = np.array(self._uids), np.array(self._contents)
        order = np.lexsort((contents, uids))
        same = uids[order][1:] == uids[order][:-1]
        changes = np.flatnonzero(same & (contents[order][1:] != contents[order][:-1]))
        _, first = np.unique(uids[order][changes], return_index=True)
        pairs = np.array(self._pairs)[order]
        return [(int(pairs[i]), int(pairs[i + 1])) for i in changes[first]]


@dataclass
class SideSurvey:
    """The queries, or the candidates, of a folder."""

    shapes: Counter[str] = field(default_factory=Counter)
    text_lengths: array = field(default_factory=lambda: array("q"))
    widths: array = field(default_factory=lambda: array("q"))
    heights: array = field(default_factory=lambda: array("q"))
    formats: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """As JSON holds it; lengths in characters, sides in pixels."""
        return {
            "items": dict(self.shapes.most_common()),
            "text_characters": quantiles(self.text_lengths) or None,
            "picture_width": quantiles(self.widths) or None,
            "picture_height": quantiles(self.heights) or None,
            "picture_formats": dict(self.formats.most_common()),
        }


class Survey:
    """What a folder of shards holds.

    Args:
        pairs: the folder.
        decode: decode every picture, to find those that do not, and compare pixels instead of
            files. Otherwise only the header of each is read.
        track: wraps the numbers of the pairs, to show progress.
        processing: of a model, counts the texts that it would cut; None: that is not known.
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
        self.seen: dict[Kind, Seen] = {kind: Seen() for kind in get_args(Kind)}
        self._queries, self._ids = Seen(), Seen()
        self._candidates = Candidates()
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
        pictures = [_look(item, self._decode) for item in items]  # a broken one shows first
        if self._processing is not None:
            self._processing.text_ids(items[:1], "query")
            self._processing.text_ids(items[1:], "candidate")
        for item, picture in zip(items, pictures, strict=True):
            self._add_item(
                item, picture, self.sides["query" if item is pair.query else "candidate"]
            )
            is_asked = item is pair.query or item is pair.positive
            if item.text is not None:
                self.seen["text" if is_asked else "negative"].add(item.text, i)
            if item.image is not None:
                alone = picture.pixels or Item(image=item.image)
                self.seen["picture" if is_asked else "negative"].add(alone.content, i)
        self.num_negatives[len(pair.negatives)] += 1
        own = pair.positive.content
        self.own_positive_as_negative += any(item.content == own for item in pair.negatives)
        self.seen["pair"].add(f"{pair.query.content} {own}", i)
        self._queries.add(pair.query.content, i)
        self._ids.add(pair.id, i)
        self._candidates.add(pair.positive, i)

    def _add_item(self, item: Item, picture: "_Picture", side: SideSurvey) -> None:
        parts = [name for name in ("text", "image") if getattr(item, name) is not None]
        side.shapes[" and ".join(parts)] += 1
        if item.text is not None:
            side.text_lengths.append(len(item.text))
        if item.image is not None:
            side.widths.append(picture.width)
            side.heights.append(picture.height)
            side.formats[picture.format] += 1

    def summary(self) -> dict[str, Any]:
        """As JSON holds it."""
        manifest = self.pairs.manifest
        questions, differing = self._candidates.num_questions(), self._candidates.differing()
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
                "count": len(differing),
                "pairs": [[self.pairs[i].id for i in two] for two in differing[:EXAMPLES]],
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
    """What two folders both hold, of any two; those that share nothing are left out.

    Texts and pictures of queries and of positives are compared wherever they stand: a training
    query that is a test candidate is a leak as well. Hard negatives are counted by themselves: as
    negatives, a model has seen what the other folder asks for.
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
    """How many hard negatives of the one are queries or positives of the other."""
    negatives = one.seen["negative"]
    return sum(negatives.shared(other.seen[kind])[0] for kind in ("text", "picture"))


@dataclass(frozen=True)
class _Picture:
    width: int = 0
    height: int = 0
    format: str = ""
    pixels: Item | None = None


def _look(item: Item, decode: bool) -> _Picture:
    if item.image is None:
        return _Picture()
    format, width, height = picture_size(item.image_content())
    if not decode:
        return _Picture(width, height, format)
    return _Picture(width, height, format, Item(image=item.load_image()))
