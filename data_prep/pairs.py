"""Pairs of your own, in JSON Lines -> shards to train on and shards to test on.

    python data_prep/pairs.py --pairs mine/pairs.jsonl --out data/mine

One object a line, image paths relative to the file (docs/data.md has the whole format):

    {"query": "ein roter Apfel", "positive": {"image": "pictures/apple.png", "id": "apple"}}

What is held out follows from a hash of the positive's id, so pairs of one candidate stay on one
side and adding pairs later moves none. A held-out candidate is no hard negative in training either.
Pairs whose pictures do not decode are left out, named, and counted; too many stop the script.
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair, read_pairs, stable_hash

BUCKETS = 1000  # what share can be held out, in steps of a thousandth


@dataclass
class Sorted:
    """Pairs by split, and what was dropped.

    Args:
        share: of the candidates, that is held out.
        dropped: (pair, reason) of what could not be used.
    """

    share: float
    dropped: list[tuple[str, str]] = field(default_factory=list)

    def is_held_out(self, candidate: Item) -> bool:
        """Whether the test owns a candidate, by its id (or, without one, its content)."""
        return stable_hash(candidate.uid) % BUCKETS < self.share * BUCKETS

    def split(self, pairs: Iterator[Pair]) -> Iterator[tuple[str, Pair]]:
        """`train` or `test` and the pair, in the order they come."""
        for pair in pairs:
            try:
                for item in (pair.query, pair.positive, *pair.negatives):
                    item.load_image()
            except UserError as error:
                self.dropped.append((pair.id, str(error)))
                continue
            if self.is_held_out(pair.positive):
                yield "test", pair
            else:
                seen = tuple(item for item in pair.negatives if not self.is_held_out(item))
                yield "train", replace(pair, negatives=seen)


def main(argv: list[str] | None = None) -> int:
    """Write the shards; return the exit status."""
    options = _parser().parse_args(argv)
    try:
        build(options)
    except UserError as error:
        print(f"pairs.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("pairs.py: interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def build(options: argparse.Namespace) -> None:
    """Write OUT/train and OUT/test, both or neither.

    Raises:
        UserError: a line that is no pair, a folder that must not be overwritten, too many pairs
            dropped, or a split without any.
    """
    if not 0 <= options.held_out < 1:
        raise UserError(f"--held-out is a share, 0 to below 1, not {options.held_out}")
    name = options.name or options.out.resolve().name
    splits = ("train", "test") if options.held_out else ("train",)
    sorted_pairs = Sorted(options.held_out)
    counts = dict.fromkeys(splits, 0)
    settings = {"pairs": options.pairs.name, "held_out": options.held_out}
    writers = {
        split: ShardWriter(
            options.out / split,
            name,
            licence=options.licence,
            settings=settings,
            overwrite=options.force,
        )
        for split in splits
    }
    with writers["train"] as train, writers.get("test", _Nothing()) as test:
        for split, pair in _shown(sorted_pairs.split(read_pairs(options.pairs))):
            (train if split == "train" else test).write(pair)
            counts[split] += 1
        _check(options, sorted_pairs.dropped, counts)  # while nothing has its place yet
    for id, reason in sorted_pairs.dropped[:5]:
        print(f"dropped {id}: {reason}", file=sys.stderr)
    for split in splits:
        found = ShardedPairs(options.out / split)
        size = sum(shard["bytes"] for shard in found.manifest["shards"]) / 1e6
        print(f"{found.folder}: {len(found):,} pairs, {size:.1f} MB")
    print(f"dropped: {len(sorted_pairs.dropped):,}")


def _shown(pairs: Iterator[tuple[str, Pair]]) -> Iterator[tuple[str, Pair]]:
    """The same, with a progress bar in a terminal."""
    console = Console(stderr=True)
    yield from track(pairs, "pairs", console=console, disable=not sys.stderr.isatty())


class _Nothing:
    """Takes the place of the test's shards where nothing is held out."""

    def __enter__(self) -> "_Nothing":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, pair: Pair) -> None:
        raise AssertionError(f"{pair.id} was held out although nothing is to be")


def _check(
    options: argparse.Namespace, dropped: list[tuple[str, str]], counts: dict[str, int]
) -> None:
    total = sum(counts.values()) + len(dropped)
    if len(dropped) > options.max_dropped * total:
        id, reason = dropped[0]
        raise UserError(
            f"{len(dropped)} of {total} pairs cannot be used, more than --max-dropped "
            f"{options.max_dropped}; first {id}: {reason}"
        )
    for split, count in counts.items():
        if not count:
            raise UserError(
                f"no pair fell to {split} with --held-out {options.held_out} of {total} pairs: "
                "change that share, or give more candidates"
            )


def _parser() -> argparse.ArgumentParser:
    summary, _, details = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--pairs", type=Path, required=True, help="JSON Lines of pairs")
    add("--out", type=Path, required=True, help="folder to write train/ and test/ to")
    add("--name", help="the source's name in metrics and logs (default: the folder's)")
    add("--held-out", type=float, default=0.1, help="share of the candidates to test on (0.1)")
    add("--max-dropped", type=float, default=0.01, help="share of pairs that may be bad (0.01)")
    add("--licence", default="", help="goes into the manifest")
    add("--force", action="store_true", help="replace shards that are there already")
    return parser


if __name__ == "__main__":
    sys.exit(main())
