"""The speed of one data worker, measured on the recipe's own shards."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, islice

import torch

from metaembed_pl.data.collate import chosen_negatives, decoded
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError
from metaembed_pl.item import Pair
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.processing import Processing
from metaembed_pl.samples import evenly_spread

AT_MOST_S = 1.5
MEASURED = 64


@dataclass(frozen=True)
class Rate:
    """Pairs (with their hard negatives) and pictures that a worker prepares per second.

    `num_pairs` is the number of pairs measured.
    """

    pairs: float
    pictures: float
    num_pairs: int


def data_rate(model: MetaEmbedder, sources: list[tuple[ShardedPairs, int]]) -> Rate | None:
    """The rate of a worker over pairs of all sources; None if none can be read.

    Args:
        model: with the preprocessing.
        sources: shards, with the number of hard negatives of a query.
    """
    process = model.processor()
    num_pairs = num_pictures = 0
    with _one_thread():
        start = time.perf_counter()
        for number, (shards, place, count) in enumerate(_places(sources)):
            with suppress(UserError):  # training replaces and counts what cannot be read
                choose = partial(chosen_negatives, count=count, turn=0)
                shown = _prepare(shards.read(place, choose), process)
                if number == 0:  # the first one loads code and opens files
                    start = time.perf_counter()
                    continue
                num_pairs, num_pictures = num_pairs + 1, num_pictures + shown
            if time.perf_counter() - start > AT_MOST_S:
                break
        took_s = time.perf_counter() - start
    return Rate(num_pairs / took_s, num_pictures / took_s, num_pairs) if num_pairs else None


def _places(sources: list[tuple[ShardedPairs, int]]) -> Iterator[tuple[ShardedPairs, int, int]]:
    """Pairs of all sources in turn, repeated if there are few."""
    each = -(-(MEASURED + 1) // max(1, len(sources)))
    of_each = [
        islice(cycle([(shards, place, count) for place in evenly_spread(len(shards), each)]), each)
        for shards, count in sources
    ]
    yield from chain.from_iterable(zip(*of_each, strict=True))


def _prepare(pair: Pair, process: Processing) -> int:
    """Prepares a pair as training does; returns its number of pictures."""
    pair = decoded(pair)
    candidates = [pair.positive, *pair.negatives]
    process.in_chunks([pair.query], "query")
    process.in_chunks(candidates, "candidate")
    return sum(item.image is not None for item in [pair.query, *candidates])


@contextmanager
def _one_thread() -> Iterator[None]:
    """While open, torch computes on one thread, as in a worker."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
