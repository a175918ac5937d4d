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
from collections.abc import Iterator, Sequence
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
Things = tuple[str, ...]  # ids of pictures: of a scene row by row, of a query as it names them


@dataclass(frozen=True)
class Scene:
    """Nine pictures, the things that queries name, and the scenes that lack one of these things."""

    tiles: Things
    asked: tuple[Things, ...]
    near: tuple[Things, ...] = ()


Family = list[Scene]  # scenes that are drawn together: of a test family, or one


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
) -> list[Family]:
    """Deal training scenes, a shard's from a few pictures, and choose what each is asked for.

    Args:
        pictures: by id.
        ids: what scenes may show.
        num_scenes: how many.
        seed: decides the deal.
        test: no training scene is asked for what these are asked for.
    """
    if not test:
        return []
    taken = _asked(test)
    num_things = len(next(iter(taken)))
    rng = random.Random(f"related emoji scenes of {num_things} things {seed}")
    found = []
    for tiles in islice(_related_deals(ids, rng), num_scenes):
        named = [id for id in tiles if pictures[id].names]
        free = [t for t in combinations(named, num_things) if frozenset(t) not in taken]
        chosen = rng.sample(free, min(NUM_QUERIES, len(free)))
        found.append([Scene(tiles, tuple(tuple(rng.sample(c, num_things)) for c in chosen))])
    return found


def several_pairs(
    drawn: Drawn, split: str, families: list[Family], num_things: int, num_jobs: int
) -> Iterator[Pair]:
    """Names of some pictures -> scene; hard negatives are the scenes of its family near it."""
    shown = {id for family in families for scene in family for id in scene.tiles}
    pictures = {id: drawn.shown[id] for id in sorted(shown)}
    asked = _asked(families)
    layouts = ([scene.tiles for scene in family] for family in families)
    composed = in_order(partial(compose, pictures, drawn.palette), layouts, num_jobs)
    watched = with_progress(composed, f"{split} scenes of {num_things} things", len(families))
    for number, (family, pngs) in enumerate(zip(families, watched, strict=True)):
        items = {}
        for place, (scene, png) in enumerate(zip(family, pngs, strict=True)):
            within = f"-{place:0{num_things}b}" if split == "test" else ""  # of which parts
            id = f"{split}-scene-for-{num_things}-{number:05d}{within}"
            answers = tuple(_answers(scene.tiles, num_things, asked))
            items[scene.tiles] = Item(image=png, id=id, answers=answers)
        for scene in family:
            positive, *negatives = (items[tiles] for tiles in (scene.tiles, *scene.near))
            for things in scene.asked:
                asks = _together(things)
                query = Item(_words(drawn, things))
                yield Pair(f"{positive.id}/{asks}", query, positive, tuple(negatives), asks=asks)


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
    part_of = {place: index % num_things for index, place in enumerate(places)}
    either = [
        # Those with a name come first, so that each part has one.
        dict(zip(places, sorted(nine, key=lambda id: not pictures[id].names), strict=True))
        for nine in (tiles[:NUM_TILES], tiles[NUM_TILES:])
    ]

    def shown(choice: Sequence[int]) -> Things:
        return tuple(either[choice[part_of[place]]][place] for place in range(NUM_TILES))

    family = []
    for choice in product((0, 1), repeat=num_things):
        scene = shown(choice)
        named = [
            [scene[place] for place in places[part::num_things] if pictures[scene[place]].names]
            for part in range(num_things)
        ]
        possible = list(product(*named))
        chosen = rng.sample(possible, min(1, len(possible)))
        asked = tuple(tuple(rng.sample(things, num_things)) for things in chosen)
        near = ([c ^ (part == p) for p, c in enumerate(choice)] for part in range(num_things))
        family.append(Scene(scene, asked, tuple(map(shown, near))))
    return family


def _asked(families: list[Family]) -> set[frozenset[str]]:
    return {frozenset(things) for family in families for scene in family for things in scene.asked}


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
