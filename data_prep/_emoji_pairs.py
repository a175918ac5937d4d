"""Pairs of names and pictures, with the members of the same family as hard negatives."""

import heapq
from bisect import bisect
from collections import defaultdict
from collections.abc import Iterator
from functools import cache

from metaembed_pl.data_prep._openmoji import NameParts, is_held_out, shuffled_key
from metaembed_pl.data_prep._raster import Drawn
from metaembed_pl.item import Item, Pair

NUM_PICTURE_NEGATIVES = 2  # each is a copy of a picture in the shard, some 2 kB
NUM_TEXT_NEGATIVES = 4
NUM_SOURCES = 1  # of an edit: pictures that a change of tone turns into the target; of gender too
NUM_EDIT_NEGATIVES = 2


class Neighbours:
    """Hard negatives: who is most like a picture and yet another thing.

    First the members of its family, those that differ least before the others. Where the family
    has too few, the pictures without tones whose names share the rarest words, then those next
    in Unicode's order, which puts like things together.

    Args:
        drawn: the pictures.
        allowed: ids that may be chosen.
        seed: decides among the equally near.
    """

    def __init__(self, drawn: Drawn, allowed: list[str], seed: int) -> None:
        self.drawn, self.seed = drawn, seed
        self.families: dict[str, list[str]] = {}
        self._by_word: dict[str, list[str]] = {}
        for id in allowed:
            picture = drawn.pictures[id]
            self.families.setdefault(picture.kind.family, []).append(id)
            if not picture.has_tone:
                for word in set(picture.names["en"].split()):
                    self._by_word.setdefault(word, []).append(id)
        plain = [id for id in allowed if not drawn.pictures[id].has_tone]
        self._in_order = sorted((_codes(id), id) for id in plain)

    def of(self, id: str, count: int, first: tuple[str, ...] = ()) -> list[str]:
        """Return `count` ids, none of which is right where `id` is asked for.

        Args:
            id: the picture asked for.
            count: how many; fewer come back only if there are no more pictures.
            first: ids to begin with.
        """
        taken, chosen = set(self.drawn.answers(id)), []
        for candidate in self._ordered(id, count, first):
            if candidate not in taken:
                chosen.append(candidate)
                taken.update(self.drawn.twins[candidate])  # one of each look is enough
            if len(chosen) == count:
                break
        return chosen

    def _ordered(self, id: str, count: int, first: tuple[str, ...]) -> Iterator[str]:
        yield from first
        kind = self.drawn.pictures[id].kind
        yield from sorted(
            self.families.get(kind.family, ()),
            key=lambda other: (
                kind.distance(self.drawn.pictures[other].kind),
                shuffled_key(self.seed, id, other),
            ),
        )
        yield from self._by_words(id, count)
        yield from self._by_code(id)

    def _by_words(self, id: str, count: int) -> list[str]:
        """Return those that share words, rare words first."""
        shared: dict[str, float] = defaultdict(float)
        for word in sorted(set(self.drawn.pictures[id].names["en"].split())):
            for other in self._by_word.get(word, ()):
                shared[other] += 1 / len(self._by_word[word])
        code = _codes(id)[0]
        # Some of the nearest may be twins or right themselves: ask for a few more than needed.
        return heapq.nsmallest(
            count + 20,
            shared,
            key=lambda other: (-shared[other], abs(_codes(other)[0] - code), other),
        )

    def _by_code(self, id: str) -> Iterator[str]:
        """Yield all without tones, from this one's place in Unicode outwards."""
        place = bisect(self._in_order, (_codes(id), id))
        for step in range(len(self._in_order)):
            for index in (place + step, place - 1 - step):
                if 0 <= index < len(self._in_order):
                    yield self._in_order[index][1]


def name_pairs(drawn: Drawn, split: str, languages: list[str], seed: int) -> Iterator[Pair]:
    """Name -> picture."""
    ids = split_ids(drawn, split)
    neighbours = Neighbours(drawn, ids if split == "train" else drawn.named(), seed)
    for id, small in _sizes(drawn, split, ids):
        others = neighbours.of(id, NUM_PICTURE_NEGATIVES)
        negatives = tuple(picture_item(drawn, other, small) for other in others)
        for language, name in _names(drawn, id, languages):
            query, positive = Item(name), picture_item(drawn, id, small)
            yield Pair(_pair_id(id, language, small), query, positive, negatives, asks=id)


def picture_pairs(drawn: Drawn, split: str, languages: list[str], seed: int) -> Iterator[Pair]:
    """Picture -> name; the hard negatives are names in the same language."""
    ids = split_ids(drawn, split)
    neighbours = Neighbours(drawn, ids if split == "train" else drawn.named(), seed)
    answers: dict[str, set[str]] = {}
    for id in drawn.named():
        for _, name in _names(drawn, id, languages):
            answers.setdefault(name, set()).update(drawn.answers(id))
    for id, small in _sizes(drawn, split, ids):
        for language, name in _names(drawn, id, languages):
            texts = []
            # Some neighbours have no name in this language, or one that is right here too.
            for other in neighbours.of(id, 3 * NUM_TEXT_NEGATIVES):
                text = drawn.pictures[other].names.get(language, name)
                if id not in answers[text] and text not in texts:
                    texts.append(text)
            negatives = tuple(_name_item(text, answers) for text in texts[:NUM_TEXT_NEGATIVES])
            query = Item(image=drawn.small(id) if small else drawn.pngs[id])
            positive = _name_item(name, answers)
            yield Pair(_pair_id(id, language, small), query, positive, negatives, asks=id)


def _sizes(drawn: Drawn, split: str, ids: list[str]) -> Iterator[tuple[str, bool]]:
    """Each picture, and in training, small once more where scenes show it small."""
    for id in ids:
        yield id, False
        if split == "train" and not drawn.pictures[id].has_tone:
            yield id, True


def _pair_id(id: str, language: str, small: bool) -> str:
    return f"{id}/{language}/small" if small else f"{id}/{language}"


def edit_pairs(drawn: Drawn, split: str, seed: int) -> Iterator[Pair]:
    """Picture and what to change -> picture; the first hard negative is the unchanged picture.

    Tone or gender changes, never both, and the two pictures do not look the same. In the test
    split the target is held out; the source may be any picture.
    """
    ids = split_ids(drawn, split)
    neighbours = Neighbours(drawn, ids if split == "train" else drawn.named(), seed)
    for id in ids:
        kind = drawn.pictures[id].kind
        sources = [
            other for other in neighbours.families[kind.family] if other not in drawn.answers(id)
        ]
        sources.sort(key=lambda other: shuffled_key("edit", seed, id, other))
        kinds = {other: drawn.pictures[other].kind for other in sources}
        toned = [other for other in sources if kinds[other].genders == kind.genders]
        gendered = [other for other in sources if _changes_gender(kinds[other], kind)]
        for source in (*toned[:NUM_SOURCES], *gendered[:NUM_SOURCES]):
            change = _gender_change(kind) if source in gendered else _tone_change(kind)
            wrong = neighbours.of(id, NUM_EDIT_NEGATIVES, first=(source,))
            yield Pair(
                f"{source}/{id}",
                Item(change, image=drawn.pngs[source]),
                picture_item(drawn, id),
                tuple(picture_item(drawn, n) for n in wrong),
                asks=id,
            )


def split_ids(drawn: Drawn, split: str) -> list[str]:
    """Return the ids of the named pictures of "train" or "test"."""
    if split == "test":
        return [id for id in drawn.named() if is_held_out(id)]
    return [id for id in drawn.named() if drawn.is_trainable(id)]


def picture_item(drawn: Drawn, id: str, small: bool = False) -> Item:
    """Return a picture as a candidate."""
    image = drawn.small(id) if small else drawn.pngs[id]
    return Item(image=image, id=f"{id}/small" if small else id, answers=drawn.answers(id))


def _name_item(name: str, answers: dict[str, set[str]]) -> Item:
    # No id: equal names are one candidate, whichever pictures they came with.
    return Item(name, answers=tuple(sorted(answers[name])))


def _names(drawn: Drawn, id: str, languages: list[str]) -> Iterator[tuple[str, str]]:
    names = drawn.pictures[id].names
    return ((language, names[language]) for language in languages if language in names)


def _changes_gender(source: NameParts, target: NameParts) -> bool:
    # Of couples it would be unclear whose gender changes.
    plain = len(source.genders) <= 1 and len(target.genders) <= 1
    return plain and source.genders != target.genders and source.tones == target.tones


def _gender_change(target: NameParts) -> str:
    (gender,) = target.genders or ("person",)
    return f"as {gender}" if gender in ("men", "women", "people") else f"as a {gender}"


def _tone_change(target: NameParts) -> str:
    return f"with {' and '.join(target.tones)}" if target.tones else "with no skin tone"


@cache
def _codes(id: str) -> tuple[int, ...]:
    return tuple(int(part, 16) for part in id.split("-"))
