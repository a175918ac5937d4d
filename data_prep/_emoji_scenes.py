"""Scenes: nine pictures in a grid, of which a query names one. The layout is made, by chance."""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count, islice

import numpy as np
from _openmoji import Picture
from _raster import GRID, Drawn, encode, run
from PIL import Image

from metaembed_pl.item import Item, Pair

NUM_TILES = GRID * GRID
NUM_TEST_SCENES = 200
NUM_QUERIES = 3  # of a scene


@dataclass(frozen=True)
class Scene:
    """Nine pictures, the three that are asked for, and what replaces each in its hard negative."""

    tiles: tuple[str, ...]
    asked: tuple[str, ...]
    replacements: tuple[str, ...]

    def layouts(self) -> list[tuple[str, ...]]:
        """The scene, and the scene with each asked picture exchanged."""
        changes = zip(self.asked, self.replacements, strict=True)
        swapped = [tuple(new if t == old else t for t in self.tiles) for old, new in changes]
        return [self.tiles, *swapped]


def scene_pictures(drawn: Drawn) -> list[str]:
    """Choose what scenes show: training pictures without tones, one of each look and name.

    Pictures with a name come first. They are a little too few for the test scenes, which show no
    picture twice, so pictures that OpenMoji adds to Unicode's fill the rest; having no name, they
    are never asked for.
    """
    chosen, looks, names = [], set(), set()
    candidates = [id for id, picture in drawn.pictures.items() if not picture.has_tone]
    for id in sorted(candidates, key=lambda id: (not drawn.pictures[id].names, id)):
        name = drawn.pictures[id].names.get("en")
        if drawn.is_trainable(id) and id not in looks and name not in names:
            chosen.append(id)
            looks.update(drawn.twins[id])
            names.update({name} - {None})
    return chosen[: NUM_TEST_SCENES * NUM_TILES]


def make_scenes(
    pictures: dict[str, Picture], ids: list[str], num_train: int, seed: int
) -> tuple[list[Scene], list[Scene]]:
    """Deal the pictures into scenes, round after round.

    In a round each picture is dealt once, so all are seen equally often. The first round is the
    test's: no picture is in two of its scenes, and each name has one right answer.

    Args:
        pictures: by id.
        ids: what scenes may show.
        num_train: training scenes.
        seed: decides the deal.

    Returns:
        Training scenes and test scenes; no training scene has the nine pictures of a test scene.
    """
    rng = random.Random(f"emoji scenes {seed}")
    test = _deal(pictures, ids, Counter(), rng)
    times_asked: Counter[str] = Counter()
    rounds = (_deal(pictures, ids, times_asked, rng) for _ in count())
    tested = {frozenset(scene.tiles) for scene in test}
    train = (s for scenes in rounds for s in scenes if frozenset(s.tiles) not in tested)
    return list(islice(train, num_train)) if test else [], test


def scene_pairs(drawn: Drawn, split: str, scenes: list[Scene], num_jobs: int) -> Iterator[Pair]:
    """Name of one picture -> scene; the hard negative is the scene without that picture."""
    shown = {id for scene in scenes for layout in scene.layouts() for id in layout}
    compose = partial(_compose, {id: drawn.tiles[id] for id in sorted(shown)})
    layouts = (scene.layouts() for scene in scenes)
    for number, (scene, pngs) in enumerate(
        zip(scenes, run(compose, layouts, num_jobs, f"{split} scenes"), strict=True)
    ):
        name = f"{split}-scene-{number:05d}"
        positive, *swapped = (
            Item(image=png, id=f"{name}{suffix}", answers=_answers(drawn, layout))
            for png, layout, suffix in zip(
                pngs, scene.layouts(), ("", *(f"-without-{id}" for id in scene.asked)), strict=True
            )
        )
        for id, negative in zip(scene.asked, swapped, strict=True):
            query = Item(drawn.pictures[id].names["en"])
            yield Pair(f"{name}/{id}", query, positive, (negative,), asks=id)


def _deal(
    pictures: dict[str, Picture], ids: list[str], times_asked: Counter[str], rng: random.Random
) -> list[Scene]:
    """Deal each picture once, and ask for those that were asked for least often.

    What does not fill a scene is left over.
    """
    deck = rng.sample(ids, len(ids))
    scenes = []
    for start in range(0, len(deck) - NUM_TILES + 1, NUM_TILES):
        tiles = tuple(deck[start : start + NUM_TILES])
        named = [id for id in tiles if pictures[id].names]
        rng.shuffle(named)
        asked = tuple(sorted(named, key=times_asked.__getitem__)[:NUM_QUERIES])
        times_asked.update(asked)
        others = [id for id in rng.sample(ids, min(len(ids), 2 * NUM_TILES)) if id not in tiles]
        if len(others) < len(asked):
            break  # so few pictures that nothing is left to exchange
        scenes.append(Scene(tiles, asked, tuple(others[: len(asked)])))
    return scenes


def _answers(drawn: Drawn, layout: tuple[str, ...]) -> tuple[str, ...]:
    """What a scene answers: its pictures, in their places, and all that look like them."""
    twins = {twin for id in layout for twin in drawn.twins[id]}
    return (*layout, *sorted(twins - set(layout)))


def _compose(tiles: dict[str, np.ndarray], layouts: list[tuple[str, ...]]) -> list[bytes]:
    return [_compose_one([tiles[id] for id in layout]) for layout in layouts]


def _compose_one(tiles: list[np.ndarray]) -> bytes:
    rows = [np.hstack(tiles[start : start + GRID]) for start in range(0, NUM_TILES, GRID)]
    # 128 colours leave no visible trace; the octree is 8 times as fast as the median cut.
    return encode(Image.fromarray(np.vstack(rows)), 128, Image.Quantize.FASTOCTREE)
