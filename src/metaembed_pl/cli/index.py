"""`python -m metaembed_pl index`: index a large store, and measure the recall of its search plans.

    python -m metaembed_pl index --model runs/emoji/model --store shelf

Builds an index over the store's vectors, or adds new items to an existing one; --again rebuilds it.
Then it measures search plans, from which a search without a budget chooses. Running searches are
not disturbed. The result is one line on standard output.
"""

import argparse
import json
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaembed_pl.cli.model import (
    add_model_arguments,
    add_pace_arguments,
    check_at_least,
    load_model,
)
from metaembed_pl.errors import UserError
from metaembed_pl.progress import Progress

if TYPE_CHECKING:
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.retrieval.calibration import Calibration
    from metaembed_pl.retrieval.store import Store


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("--store", type=Path, required=True, metavar="FOLDER", help="a store made by `embed`")
    add(
        "--codes",
        choices=("sq8", "rabitq"),
        help="codes of the index: sq8 has one byte per dimension; rabitq has one bit, a quarter of "
        "the size, and is slower (default: sq8, or as before)",
    )
    add("--again", action="store_true", help="rebuild an existing index")
    add(
        "--queries",
        type=Path,
        metavar="PATH",
        help="JSON Lines of queries to measure with (default: those of `serve --log-queries`, or "
        "texts of the store's items)",
    )
    add_pace_arguments(parser, workers=False)
    add("--json", action="store_true", help="one JSON object instead of a line of text")


def run(args: argparse.Namespace) -> None:
    """Index, measure, and print a summary."""
    check_at_least(args, 1, "batch_size")

    from metaembed_pl.item import read_items
    from metaembed_pl.retrieval.index import faiss_module
    from metaembed_pl.retrieval.store import Store

    # Cheap checks come first: loading a model takes seconds.
    store = Store.open(args.store)
    faiss_module()
    queries = read_items(args.queries) if args.queries else None
    with redirect_stdout(sys.stderr):
        model = load_model(args, store)
        summary = indexed(store, args.codes, args.again)
        if queries is None:
            calibration = measured(store, model, args.batch_size)
        else:
            from metaembed_pl.retrieval.calibration import calibrate

            vectors = model.encode_query(queries, args.batch_size)
            calibration = calibrate(store, vectors, f"queries of {args.queries.name}")
            calibration.save(store)
    summary |= chosen(store, calibration)
    print(json.dumps(summary) if args.json else in_words(summary))


def indexed(store: "Store", codes: str | None = None, again: bool = False) -> dict[str, Any]:
    """Build the index of a store, or add new items to it; return a summary."""
    from metaembed_pl.retrieval.index import IndexUnusable
    from metaembed_pl.retrieval.index_build import build, extend

    try:
        index = None if again else store.index()
    except IndexUnusable as error:
        print(f"{error}; it is rebuilt", file=sys.stderr)
        index = None
    if index is not None and codes not in (None, index.manifest.codes):
        raise UserError(
            f"the index of {store.folder} keeps {index.manifest.codes}, not {codes}: leave --codes "
            "out, or give --again"
        )
    started = time.perf_counter()
    with Progress("indexing", None) as progress:

        def on_progress(done: int, of: int) -> None:
            progress.begin("indexing", of)
            progress.update(done)

        if index is None:
            build(store, codes or "sq8", on_progress)
        else:
            extend(store, on_progress)
    index = store.index()
    assert index is not None, "it was just built"
    return {
        "items": len(store),
        "indexed_rows": index.num_rows,
        "lists": index.num_lists,
        "codes": index.manifest.codes,
        "index_bytes": index.size_bytes,
        "seconds": time.perf_counter() - started,
        "drift": index.drift(),
    }


def measured(store: "Store", model: "MetaEmbedder", batch_size: int) -> "Calibration":
    """Measure search plans on a store, and save the result beside it."""
    from metaembed_pl.retrieval.calibration import measure

    print("measuring search plans on this store ...", file=sys.stderr)
    found = measure(store, lambda texts: model.encode_query(texts, batch_size).to(model.device))
    try:
        found.save(store)
    except OSError as error:  # on a read-only disk it serves this once
        print(f"the measurement could not be saved: {error.strerror}", file=sys.stderr)
    return found


def chosen(store: "Store", calibration: "Calibration") -> dict[str, Any]:
    """The plan of a search without a budget, and the reason."""
    from metaembed_pl.retrieval.calibration import choose, plan_name

    choice = choose(store, calibration)
    return {"plan": plan_name(choice.stages), "note": choice.note}


def in_words(summary: dict[str, Any]) -> str:
    """The summary as a line of text."""
    line = (
        f"{summary['indexed_rows']:,} rows in {summary['lists']:,} lists, "
        f"{summary['index_bytes'] / 1e6:,.0f} MB, {summary['seconds']:.0f} s; a search takes "
        f"{summary['plan']} ({summary['note']})"
    )
    return line + (
        f"; rebuild it with --again, because {summary['drift']}" if summary["drift"] else ""
    )
