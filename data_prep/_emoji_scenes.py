"""Scenes: pictures in a grid with a random layout. A query names one of them.

Tests use scenes of nine. Training also uses two and four, which teach the same task sooner.
"""

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, count, islice

import numpy as np

from metaembed_pl.data.parallel import in_order
from metaembed_pl.data_prep._openmoji import Picture
from metaembed_pl.data_prep._raster import GRID, Drawn, encode_shown
from metaembed_pl.item import Item, Pair
from metaembed_pl.progress import with_progress

NUM_TILES = GRID * GRID
SMALL_SCENES = {"emoji_scene_1x2": (1, 2), "emoji_scene_2x2": (2, 2)}  # rows, columns
NUM_TEST_SCENES = 200
# Of a scene. Training asks for everything a scene shows, a few things at a time: only then do the
# vectors of a scene learn to differ (docs/log.md).
NUM_QUERIES = {"train": NUM_TILES, "test": 3}
# Queries of a scene with a hard negative: each is a picture more to draw and to store.
NUM_NEGATIVES = {"train": 1, "test": 3}


@dataclass(frozen=True)
class Scene:
    """Pictures row by row, those asked for, and those that replace the first of these.

    A replacement makes a hard negative: the scene without the picture that is asked for.
    """

    tiles: tuple[str, ...]
    asked: tuple[str, ...]
    replacements: tuple[str, ...]
    num_columns: int = GRID

    def layouts(self) -> list[tuple[str, ...]]:
        """The scene, and the scene with each picture exchanged that has a replacement."""
        changes = zip(self.asked, self.replacements, strict=False)
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
    test = _deal(pictures, ids, Counter(), rng, "test")
    times_asked: Counter[str] = Counter()
    rounds = (_deal(pictures, ids, times_asked, rng, "train") for _ in count())
    tested = {frozenset(scene.tiles) for scene in test}
    train = (s for scenes in rounds for s in scenes if frozenset(s.tiles) not in tested)
    return list(islice(train, num_train)) if test else [], test


def make_small_scenes(
    pictures: dict[str, Picture], ids: list[str], num_scenes: int, seed: int, shape: tuple[int, int]
) -> list[Scene]:
    """Training scenes of fewer pictures, dealt alike.

    Args:
        pictures: by id.
        ids: what scenes may show.
        num_scenes: how many.
        seed: decides the deal.
        shape: rows and columns.
    """
    rng = random.Random(f"emoji scenes {shape} {seed}")
    times_asked: Counter[str] = Counter()
    if not _deal(pictures, ids, Counter(), rng, "train", shape):
        return []
    rounds = (_deal(pictures, ids, times_asked, rng, "train", shape) for _ in count())
    return list(islice(chain.from_iterable(rounds), num_scenes))


def scene_pairs(drawn: Drawn, split: str, scenes: list[Scene], num_jobs: int) -> Iterator[Pair]:
    """Name of one picture -> scene; the hard negative is the scene without that picture.

    The queries of a scene come one after the other, so that shards hold it once.
    """
    shown = {id for scene in scenes for layout in scene.layouts() for id in layout}
    num_columns = scenes[0].num_columns if scenes else GRID
    tiles = {id: drawn.shown[id] for id in sorted(shown)}
    layouts = (scene.layouts() for scene in scenes)
    size = f"-of-{len(scenes[0].tiles)}" if scenes and len(scenes[0].tiles) < NUM_TILES else ""
    composed = in_order(
        partial(compose, tiles, drawn.palette, num_columns=num_columns), layouts, num_jobs
    )
    watched = with_progress(composed, f"{split} scenes", len(scenes))
    for number, (scene, pngs) in enumerate(zip(scenes, watched, strict=True)):
        name = f"{split}-scene{size}-{number:05d}"
        swapped_ids = scene.asked[: len(scene.replacements)]
        suffixes = ("", *(f"-without-{id}" for id in swapped_ids))
        positive, *swapped = (
            Item(image=png, id=f"{name}{suffix}", answers=_answers(drawn, layout))
            for png, layout, suffix in zip(pngs, scene.layouts(), suffixes, strict=True)
        )
        negatives = dict(zip(swapped_ids, swapped, strict=True))
        for id in scene.asked:
            query = Item(drawn.pictures[id].names["en"])
            own = (negatives[id],) if id in negatives else ()
            yield Pair(f"{name}/{id}", query, positive, own, asks=id)


def _deal(
    pictures: dict[str, Picture],
    ids: list[str],
    times_asked: Counter[str],
    rng: random.Random,
    split: str,
    shape: tuple[int, int] = (GRID, GRID),
) -> list[Scene]:
    """Deal each picture once, and ask for those that were asked for least often.

    What does not fill a scene is left over.
    """
    deck = rng.sample(ids, len(ids))
    scenes, num_tiles = [], shape[0] * shape[1]
    for start in range(0, len(deck) - num_tiles + 1, num_tiles):
        tiles = tuple(deck[start : start + num_tiles])
        named = [id for id in tiles if pictures[id].names]
        rng.shuffle(named)
        asked = tuple(sorted(named, key=times_asked.__getitem__)[: NUM_QUERIES[split]])
        times_asked.update(asked)
        others = [id for id in rng.sample(ids, min(len(ids), 2 * NUM_TILES)) if id not in tiles]
        num_negatives = min(len(asked), NUM_NEGATIVES[split])
        if len(others) < num_negatives:
            break  # so few pictures that nothing is left to exchange
        scenes.append(Scene(tiles, asked, tuple(others[:num_negatives]), shape[1]))
    return scenes


def _answers(drawn: Drawn, layout: tuple[str, ...]) -> tuple[str, ...]:
    """What a scene answers: its pictures, in their places, and all that look like them."""
    twins = {twin for id in layout for twin in drawn.twins[id]}
    return (*layout, *sorted(twins - set(layout)))


def compose(
    tiles: dict[str, np.ndarray],
    palette: bytes,
    layouts: list[tuple[str, ...]],
    num_columns: int = GRID,
) -> list[bytes]:
    """Encode each layout's tiles, row by row."""
    grids = []
    for layout in layouts:
        starts = range(0, len(layout), num_columns)
        rows = [np.hstack([tiles[id] for id in layout[s : s + num_columns]]) for s in starts]
        grids.append(encode_shown(np.vstack(rows), palette))
    return grids
