"""Queries that name two or three things: the right scenes are those that show all of them.

Test: nine pictures and nine others are cut into as many parts as a query names things. Taking each
part from one or the other makes a family of scenes: four for two things, eight for three. A query
names a picture from each part, so exchanging one part leaves a scene that holds all but one of
them: a hard negative, and the right answer to other queries.

Training: the scenes of a shard show the same few pictures in ever new combinations. A batch then
has many scenes that hold all but one of the things that a query names: hard negatives that need no
encoding of their own.
"""

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations, count, islice, product

from metaembed_pl.data.parallel import in_order
from metaembed_pl.data_prep._emoji_scenes import NUM_TILES, compose
from metaembed_pl.data_prep._openmoji import Picture
from metaembed_pl.data_prep._raster import Drawn
from metaembed_pl.item import Item, Pair
from metaembed_pl.progress import with_progress

NUM_THINGS = {"emoji_scene_two": 2, "emoji_scene_three": 3}
NUM_TEST_SCENES = 800
NUM_QUERIES = 12  # of a training scene; test scenes have one
NUM_RELATED = 6 * NUM_TILES  # pictures that the scenes of a shard share
NUM_SCENES_RELATED = 84  # with all their queries about a shard
Choice = tuple[int, ...]  # of each part: 0 from the first pictures, 1 from the second
Things = tuple[str, ...]  # ids, as a query names them


@dataclass(frozen=True)
class Family:
    """Scenes that differ by whole parts.

    Args:
        pictures: the first nine ids, and the nine that stand in their places.
        parts: the places of each part.
        asked: what each scene is asked for.
    """

    pictures: tuple[Things, Things]
    parts: tuple[tuple[int, ...], ...]
    asked: dict[Choice, list[Things]]

    def scene(self, choice: Choice) -> Things:
        """The ids of a scene, row by row."""
        tiles = list(self.pictures[0])
        for part, chosen in zip(self.parts, choice, strict=True):
            for place in part:
                tiles[place] = self.pictures[chosen][place]
        return tuple(tiles)

    def neighbours(self, choice: Choice) -> list[Choice]:
        """The scenes with one part exchanged."""
        return [
            tuple(c ^ (part == other) for part, c in enumerate(choice))
            for other in range(len(choice))
        ]


def make_families(
    pictures: dict[str, Picture], ids: list[str], seed: int, num_things: int
) -> list[Family]:
    """Deal the pictures into test families, round after round.

    Args:
        pictures: by id.
        ids: what scenes may show.
        seed: decides the deal.
        num_things: that a query names.
    """
    rng = random.Random(f"emoji scenes of {num_things} things {seed}")
    if len(ids) < 2 * NUM_TILES:
        return []
    # A small trial has a small test.
    num_families = min(-(-NUM_TEST_SCENES // 2**num_things), len(ids) // NUM_TILES)
    deals = islice(_deals(ids, rng, 2 * NUM_TILES), num_families)
    return [_family(pictures, tiles, rng, num_things) for tiles in deals]


def make_related_scenes(
    pictures: dict[str, Picture], ids: list[str], num_scenes: int, seed: int, test: list[Family]
) -> dict[Things, list[Things]]:
    """Deal training scenes, a shard's from a few pictures, and choose what each is asked for.

    Args:
        pictures: by id.
        ids: what scenes may show.
        num_scenes: how many.
        seed: decides the deal.
        test: no training scene is asked for what these are asked for.

    Returns:
        Scenes (ids row by row), and for each the ids that its queries name.
    """
    if not test:
        return {}
    num_things = len(test[0].parts)
    taken = {frozenset(things) for things in _asked(test)}
    rng = random.Random(f"related emoji scenes of {num_things} things {seed}")
    found: dict[Things, list[Things]] = {}
    for tiles in islice(_related_deals(ids, rng), num_scenes):
        named = [id for id in tiles if pictures[id].names]
        free = [t for t in combinations(named, num_things) if frozenset(t) not in taken]
        chosen = rng.sample(free, min(NUM_QUERIES, len(free)))
        found[tiles] = [tuple(rng.sample(things, num_things)) for things in chosen]
    return found


def related_pairs(
    drawn: Drawn, scenes: dict[Things, list[Things]], num_things: int, num_jobs: int
) -> Iterator[Pair]:
    """Names of some pictures -> scene, for training; no hard negatives of their own."""
    shown = {id for tiles in scenes for id in tiles}
    pictures = {id: drawn.shown[id] for id in sorted(shown)}
    asked = {frozenset(things) for of_scene in scenes.values() for things in of_scene}
    layouts = ([tiles] for tiles in scenes)
    composed = in_order(partial(compose, pictures, drawn.palette), layouts, num_jobs)
    watched = with_progress(composed, f"scenes of {num_things} things", len(scenes))
    for number, ((tiles, questions), [png]) in enumerate(zip(scenes.items(), watched, strict=True)):
        id = f"train-scene-for-{num_things}-{number:05d}"
        scene = Item(image=png, id=id, answers=tuple(_answers(tiles, num_things, asked)))
        for things in questions:
            yield _pair(drawn, things, scene)


def family_pairs(drawn: Drawn, families: list[Family], num_jobs: int) -> Iterator[Pair]:
    """Names of some pictures -> scene, for tests; the hard negatives hold all of these but one."""
    shown = {id for family in families for ids in family.pictures for id in ids}
    tiles = {id: drawn.shown[id] for id in sorted(shown)}
    asked = {frozenset(things) for things in _asked(families)}
    layouts = ([family.scene(choice) for choice in family.asked] for family in families)
    composed = in_order(partial(compose, tiles, drawn.palette), layouts, num_jobs)
    num_things = len(families[0].parts) if families else 0
    watched = with_progress(composed, "test families", len(families))
    for number, (family, pngs) in enumerate(zip(families, watched, strict=True)):
        name = f"test-scene-for-{num_things}-{number:05d}"
        scenes = {
            choice: Item(
                image=png,
                id=f"{name}-{''.join(map(str, choice))}",
                answers=tuple(_answers(family.scene(choice), num_things, asked)),
            )
            for choice, png in zip(family.asked, pngs, strict=True)
        }
        for choice, questions in family.asked.items():
            negatives = tuple(scenes[other] for other in family.neighbours(choice))
            for things in questions:
                yield _pair(drawn, things, scenes[choice], negatives)


def _pair(drawn: Drawn, things: Things, scene: Item, negatives: tuple[Item, ...] = ()) -> Pair:
    asks = _together(things)
    return Pair(f"{scene.id}/{asks}", Item(_words(drawn, things)), scene, negatives, asks=asks)


def _deals(ids: Sequence[str], rng: random.Random, num: int) -> Iterator[Things]:
    """So many pictures at a time, without end; in a round each picture is dealt once."""
    for _ in count():
        deck = rng.sample(ids, len(ids))
        for start in range(0, len(deck) - num + 1, num):
            yield tuple(deck[start : start + num])


def _related_deals(ids: list[str], rng: random.Random) -> Iterator[Things]:
    """Scenes of nine, a shard's from the same few pictures."""
    for related in _deals(ids, rng, min(NUM_RELATED, len(ids))):
        yield from islice(_deals(related, rng, NUM_TILES), NUM_SCENES_RELATED)


def _family(
    pictures: dict[str, Picture], tiles: Things, rng: random.Random, num_things: int
) -> Family:
    """A family of eighteen pictures, each scene with one question."""
    places = rng.sample(range(NUM_TILES), NUM_TILES)
    parts = tuple(tuple(places[part::num_things]) for part in range(num_things))
    first, second = (
        # Those with a name come first, so that each part has one.
        dict(zip(places, sorted(nine, key=lambda id: not pictures[id].names), strict=True))
        for nine in (tiles[:NUM_TILES], tiles[NUM_TILES:])
    )
    in_grid = [tuple(ids[place] for place in range(NUM_TILES)) for ids in (first, second)]
    family = Family((in_grid[0], in_grid[1]), parts, {})
    for choice in product((0, 1), repeat=num_things):
        scene = family.scene(choice)
        named = [[scene[place] for place in part if pictures[scene[place]].names] for part in parts]
        possible = list(product(*named))
        chosen = rng.sample(possible, min(1, len(possible)))
        family.asked[choice] = [tuple(rng.sample(things, num_things)) for things in chosen]
    return family


def _asked(families: list[Family]) -> Iterable[Things]:
    return (things for family in families for asked in family.asked.values() for things in asked)


def _answers(scene: Things, num_things: int, asked: set[frozenset[str]]) -> Iterator[str]:
    """What a scene answers of all that is asked. Scenes show one picture of each look and name."""
    for things in combinations(scene, num_things):
        if frozenset(things) in asked:
            yield _together(things)


def _together(things: Things) -> str:
    """The id of several things, in whichever order they are named."""
    return " & ".join(sorted(things))


def _words(drawn: Drawn, things: Things) -> str:
    """The names, as in "dolphin, socks and red apple"."""
    *first, last = (drawn.pictures[id].names["en"] for id in things)
    return f"{', '.join(first)} and {last}"
