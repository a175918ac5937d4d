"""`python -m metaembed_pl push`: copy a store into Qdrant, when one machine is not enough.

    python -m metaembed_pl push --store shelf --plan
    python -m metaembed_pl push --store shelf --to http://localhost:6333/shelf --shards 6

The first command prints the cost and needs no server. The same command resumes after an
interruption, and updates a collection after the store has changed. A server's key is read
from the environment variable QDRANT_API_KEY. The result is one line on standard output.
"""

import argparse
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaembed_pl.budget import Budget
from metaembed_pl.cli.model import check_at_least, refuse_ignored
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.qdrant.address import parse_address

if TYPE_CHECKING:
    from metaembed_pl.retrieval.store import Store

OF_PUSHING = ("shards", "filter", "batch_size")
SETTINGS = ("dtype", "quantization", "on_disk", "shards", "replicas", "batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add("--store", type=Path, required=True, metavar="FOLDER", help="a store made by `embed`")
    add("--to", metavar="ADDRESS", help="collection to push to: http://HOST:6333/NAME")
    add("--plan", action="store_true", help="only print the cost, by number of items and precision")
    add(
        "--counts",
        metavar="N,N,...",
        help="candidate vectors to search with, such as 1,8,64 (default: all trained counts)",
    )
    add(
        "--dtype",
        choices=("fp32", "fp16", "turbo8"),
        help="dtype of a new collection (default: fp16; fp32 for a store in fp32)",
    )
    add(
        "--quantization",
        choices=("int8", "binary"),
        help="keep a coarser copy of the smallest count in memory and search it first",
    )
    add(
        "--on-disk",
        action="store_true",
        default=None,
        help="keep vectors and index on disk; only ids stay in memory",
    )
    add("--shards", type=int, metavar="N", help="shards of a new collection on a cluster")
    add("--replicas", type=int, metavar="N", help="replicas of each shard")
    add(
        "--filter",
        action="append",
        default=[],
        metavar="KEY",
        help="metadata key to index for fast filtering; repeatable",
    )
    add("--batch-size", type=int, metavar="N", help="items per request (default: as many as fit)")
    add("--json", action="store_true", help="one JSON object instead of a line of text")


def run(args: argparse.Namespace) -> None:
    """Push, or print the cost, and print a summary."""
    check_at_least(args, 1, "shards", "replicas", "batch_size")
    if (args.to is None) != args.plan:
        raise UserError("give the destination with --to ADDRESS, or --plan to see the cost")
    if args.plan:
        refuse_ignored(args, "does not change the cost: give it with --to", *OF_PUSHING)
    counts = None if args.counts is None else _parse_counts(args.counts)
    with redirect_stdout(sys.stderr):
        from metaembed_pl.retrieval.store import Store

        if args.plan:
            report = _cost(args, Store.open(args.store), counts)
        else:
            parse_address(args.to)  # before what takes seconds to import
            report = _push(args, Store.open(args.store), counts)
    print(json.dumps(report) if args.json else report["text"])


def _parse_counts(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise UserError(f"--counts are integers, such as 1,8,64; got {text!r}")
    return tuple(map(int, parts))


def _push(args: argparse.Namespace, store: "Store", counts: tuple[int, ...] | None) -> Any:
    from metaembed_pl.progress import Progress
    from metaembed_pl.retrieval.qdrant.collection import open_collection
    from metaembed_pl.retrieval.qdrant.push import Pushed, push

    collection = open_collection(args.to)
    settings = {name: getattr(args, name) for name in SETTINGS}
    done = Pushed()
    try:
        with Progress("pushing", len(store)) as progress:
            for done in push(store, collection, counts=counts, filters=args.filter, **settings):
                progress.update(done.seen)
    finally:
        collection.close()
    text = f"{len(store):,} items in {collection.address}, {done.sent:,} of them new or changed"
    text += f", {done.deleted:,} deleted" if done.deleted else ""
    return {"items": len(store), "sent": done.sent, "deleted": done.deleted, "text": text}


def _cost(args: argparse.Namespace, store: "Store", counts: tuple[int, ...] | None) -> Any:
    """The size of a collection of this store, and of collections of more such items."""
    from metaembed_pl.retrieval.qdrant.sizing import (
        ITEMS,
        PAYLOAD_BYTES,
        readable,
        sizing,
        sizing_table,
    )

    r_q, trained = store.groups[-1].r_q, {group.r_c for group in store.groups}
    counts = tuple(store.check_budget(Budget(r_q, n)).r_c for n in sorted(counts or trained))
    payload = _payload_bytes(store) or PAYLOAD_BYTES
    dtype = args.dtype or ("fp32" if store.dtype == "fp32" else "fp16")
    replicas = args.replicas or 1
    settings = dtype, args.quantization, bool(args.on_disk), payload, replicas
    size = sizing(len(store), store.width, counts, *settings)
    rows = sizing_table(sorted({len(store), *ITEMS}), store.width, counts, dtype, payload, replicas)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    lines.append(
        f"this store: {readable(size.disk)} on disk, {readable(size.memory)} in memory; "
        f"an item: {' + '.join(map(str, counts))} vectors of width {store.width}, "
        f"{payload:.0f} bytes of payload; {replicas} of each shard"
    )
    report = {"items": len(store), "disk_bytes": size.disk, "memory_bytes": size.memory}
    return {**report, "text": "\n".join(lines)}


def _payload_bytes(store: "Store") -> float:
    """The mean size of an item's payload, from a sample."""
    from metaembed_pl.samples import evenly_spread

    rows = evenly_spread(len(store), 1000)
    ids = store.ids
    texts = [
        json.dumps({"id": ids[row], "revision": 16 * "0", "metadata": metadata}, ensure_ascii=False)
        for row, metadata in zip(rows, store.metadata(rows), strict=True)
    ]
    return sum(len(text.encode()) for text in texts) / max(1, len(texts))
