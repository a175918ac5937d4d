"""Queries that name two or three things: the right scenes are those that show all of them.

Nine pictures and nine others are cut into as many parts as a query names things. Taking each part
from the one or from the other makes a family of scenes: four for two things, eight for three. A
query names a picture of each part, so exchanging one part leaves a scene that holds all but one of
them: a hard negative, and the right answer of other queries.
"""

import random
from collections.abc import Iterable, Iterator
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
NUM_QUERIES = {"train": 6, "test": 1}  # of a scene
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
    pictures: dict[str, Picture], ids: list[str], num_train: int, seed: int, num_things: int
) -> dict[str, list[Family]]:
    """Deal the pictures into families, round after round; the first rounds are the test's.

    What a test scene is asked for, no training scene is.

    Args:
        pictures: by id.
        ids: what scenes may show.
        num_train: training scenes, at least; families are whole.
        seed: decides the deal.
        num_things: that a query names.
    """
    rng = random.Random(f"emoji scenes of {num_things} things {seed}")
    taken: set[frozenset[str]] = set()
    families: dict[str, list[Family]] = {"test": [], "train": []}
    if len(ids) < 2 * NUM_TILES:
        return families
    for split, num_scenes in (("test", NUM_TEST_SCENES), ("train", num_train)):
        num_families = -(-num_scenes // 2**num_things)
        if split == "test":  # a small trial has a small test
            num_families = min(num_families, len(ids) // NUM_TILES)
        dealt = (
            _family(pictures, tiles, rng, num_things, NUM_QUERIES[split], taken)
            for tiles in _deals(ids, rng)
        )
        families[split] = list(islice(dealt, num_families))
        taken = {frozenset(things) for things in _asked(families["test"])}
    return families


def several_pairs(
    drawn: Drawn, split: str, families: list[Family], num_jobs: int
) -> Iterator[Pair]:
    """Names of some pictures -> scene; the hard negatives hold all of these but one."""
    shown = {id for family in families for ids in family.pictures for id in ids}
    tiles = {id: drawn.shown[id] for id in sorted(shown)}
    asked = {frozenset(things) for things in _asked(families)}
    layouts = ([family.scene(choice) for choice in family.asked] for family in families)
    composed = in_order(partial(compose, tiles, drawn.palette), layouts, num_jobs)
    num_things = len(families[0].parts) if families else 0
    watched = with_progress(composed, f"{split} families", len(families))
    for number, (family, pngs) in enumerate(zip(families, watched, strict=True)):
        name = f"{split}-scene-for-{num_things}-{number:05d}"
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
                query, asks = Item(_words(drawn, things)), _together(things)
                pair_id = f"{scenes[choice].id}/{asks}"
                yield Pair(pair_id, query, scenes[choice], negatives, asks=asks)


def _deals(ids: list[str], rng: random.Random) -> Iterator[Things]:
    """Eighteen pictures at a time; in a round each picture is dealt once."""
    for _ in count():
        deck = rng.sample(ids, len(ids))
        for start in range(0, len(deck) - 2 * NUM_TILES + 1, 2 * NUM_TILES):
            yield tuple(deck[start : start + 2 * NUM_TILES])


def _family(
    pictures: dict[str, Picture],
    tiles: Things,
    rng: random.Random,
    num_things: int,
    num_queries: int,
    taken: set[frozenset[str]],
) -> Family:
    """A family of eighteen pictures, which asks for nothing that is taken."""
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
        free = [things for things in product(*named) if frozenset(things) not in taken]
        chosen = rng.sample(free, min(num_queries, len(free)))
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
