"""Checks of a recipe's data before training: faults, steps, negatives, lengths of items."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Any, get_args

from PIL import Image

from metaembed_pl.data.collate import Side, chosen_negatives
from metaembed_pl.data.datamodule import RetrievalDataModule
from metaembed_pl.data.plan import Plan, PlannedSource
from metaembed_pl.data.recipe_sources import (
    is_missing,
    look_at_eval_set,
    refuse_missing,
    refuse_same_names,
)
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.samples import evenly_spread
from metaembed_pl.training.activations import Rows, num_patches

SAMPLED = 64
"""Pairs that are read to measure lengths of items."""
LARGEST_SIDE = 4096
"""Of the largest picture without data: above the pixel limits of all families."""


@dataclass(frozen=True)
class Data:
    """The training data of a recipe.

    Args:
        faults: one line each.
        notes: likewise, for remarks that are not faults.
        num_pairs: of all sources that were opened; None if there are none.
        steps_per_epoch: None if unknown.
        num_negatives: the different numbers of hard negatives that sources have.
        num_questions: queries per candidate on average, of the source with most.
        sources: those that were opened, with their numbers of hard negatives.
    """

    faults: list[str]
    notes: list[str]
    num_pairs: int | None
    steps_per_epoch: int | None
    num_negatives: list[int]
    num_questions: float
    sources: list[tuple[ShardedPairs, int]]


@dataclass(frozen=True)
class Lengths:
    """Tokens of items, slots included.

    Args:
        average: a row of average length by side, over sampled items; None without data.
        longest: the longest row by side; without data, the longest that the limits allow.
        is_sampled: whether there were data.
    """

    average: dict[Side, Rows] | None
    longest: dict[Side, Rows]
    is_sampled: bool


def look_at(data: RetrievalDataModule, num_ranks: int) -> Data:
    """Opens the data of a recipe and plans its steps."""
    faults: list[str] = []
    notes: list[str] = []
    train = _open(data.train_sources, "data.train", lambda s: ShardedPairs(s.folder), faults, notes)
    for part, sources in data.eval_sources.items():
        found = _open(sources, f"data.{part}", look_at_eval_set, faults, notes)
        try:
            refuse_same_names(f"data.{part}", found)
        except UserError as error:
            faults.append(str(error))
    counts = [
        data.num_negatives if source.num_negatives is None else source.num_negatives
        for source, _ in train
    ]
    planned = [source.planned(shards, data.questions) for source, shards in train]
    plan = _plan(planned, data, faults)
    if data.global_batch_size % num_ranks:
        faults.append(
            f"data.global_batch_size: {data.global_batch_size} cannot be divided evenly over "
            f"{num_ranks} GPUs; choose a multiple of {num_ranks}"
        )
    steps = None
    if plan is not None and len(train) == len(data.train_sources):
        steps = data._steps_per_epoch or plan.steps_per_epoch
    pairs = [shards for _, shards in train]
    return Data(
        faults,
        [*dict.fromkeys(notes), *_notes(zip(pairs, counts, strict=True))],
        sum(map(len, pairs)) if pairs else None,
        steps,
        sorted(set(counts)) or [data.num_negatives],
        max(plan.questions_per_candidate) if plan else 1.0,
        list(zip(pairs, counts, strict=True)),
    )


def _open(
    sources: Sequence[Any],
    where: str,
    opened: Callable[[Any], Any],
    faults: list[str],
    notes: list[str],
) -> list[tuple[Any, Any]]:
    """The sources that could be opened, each with what was opened."""
    found = []
    for source in sources:
        try:
            if source.table is not None:
                if source.table.is_elsewhere and not source.table.is_made:
                    notes.append(
                        f"{source.table.where}: not looked at; the first fit reads it and makes "
                        f"shards in {source.table.folder}"
                    )
                    continue
                source.table.make()
            elif is_missing(source):
                continue
            found.append((source, opened(source)))
        except UserError as error:
            faults.append(f"{where}: {error}")
    try:
        refuse_missing(where, sources)
    except UserError as error:
        faults.append(str(error))
    return found


def _plan(
    planned: list[PlannedSource], data: RetrievalDataModule, faults: list[str]
) -> Plan | None:
    """The plan of all sources; first each by itself, so that every faulty one is named."""
    found: dict[str, None] = {}
    plan = None
    for sources in (*([source] for source in planned), planned):
        if not sources:
            continue
        try:
            plan = data.plan_of(sources)
        except UserError as error:
            # A source that joins later cannot stand by itself, and need not.
            if len(sources) > 1 or "first_step" not in str(error):
                found[f"data: {error}"] = None
            plan = None
    faults.extend(found)
    return plan


def _notes(sources: Iterable[tuple[ShardedPairs, int]]) -> list[str]:
    """Notes about sources whose pairs have fewer hard negatives than the recipe uses."""
    notes = []
    for shards, count in sources:
        found = []
        for i in evenly_spread(len(shards), 8):
            with suppress(UserError):
                found.append(len(shards[i].negatives))
        short = sum(number < count for number in found)
        if short:
            notes.append(
                f"{shards.name}: {short} of {len(found)} sampled pairs have fewer than {count} "
                "hard negatives; they are trained with those they have"
            )
    return notes


def measure(model: MetaEmbedder, sources: list[tuple[ShardedPairs, int]]) -> Lengths:
    """Lengths of the items in the data; without data, the longest that the limits allow."""
    row_of = _row_of(model)
    rows: dict[Side, list[Rows]] = {side: [] for side in get_args(Side)}
    for shards, count in sources:
        for i in evenly_spread(len(shards), -(-SAMPLED // len(sources))):
            with suppress(UserError):  # training replaces and counts what cannot be read
                pair = shards.read(i, partial(chosen_negatives, count=count, turn=0))
                query = row_of(pair.query, "query")
                candidates = [
                    row_of(item, "candidate") for item in (pair.positive, *pair.negatives)
                ]
                rows["query"].append(query)
                rows["candidate"] += candidates
    if not rows["query"]:
        text = " apple" * model.processing.max_text_tokens
        picture = Image.new("RGB", (LARGEST_SIDE, LARGEST_SIDE), "gray")
        return Lengths(None, {side: row_of(Item(text, picture), side) for side in rows}, False)
    # As long as the longest text and as large as the largest picture: both decide a batch.
    return Lengths(
        {side: _combined(found, lambda sizes: round(mean(sizes))) for side, found in rows.items()},
        {side: _combined(found, max) for side, found in rows.items()},
        True,
    )


def _combined(rows: list[Rows], function: Callable[[tuple[int, ...]], int]) -> Rows:
    sizes = zip(*((row.num_tokens, row.num_patches, row.pixel_bytes) for row in rows), strict=True)
    return Rows(1, *map(function, sizes))


def _row_of(model: MetaEmbedder) -> Callable[[Item, Side], Rows]:
    """Measures rows; cached, because pictures of one size make rows of one length."""
    process = model.processor()
    vision: Any = model.backbone.config.vision_config
    seen: dict[Any, Rows] = {}

    def row(item: Item, side: Side) -> Rows:
        image = item.load_image()
        key = side, item.text, image and image.size
        if key not in seen:
            inputs = process([item], side)
            pixels = inputs.get("pixel_values")
            seen[key] = Rows(
                1,
                inputs["input_ids"].shape[1],
                0 if pixels is None else num_patches(pixels, vision.patch_size),
                0 if pixels is None else pixels.nbytes,
            )
        return seen[key]

    return row
