"""`python -m metaembed_pl embed`: embed items into a store that can be searched.

    python -m metaembed_pl embed --model runs/emoji/model --items things.jsonl --store shelf
    torchrun --nproc-per-node 8 -m metaembed_pl embed --model M --items manuals/ --store shelf
    python -m metaembed_pl embed --model M --items s3://bucket/pages --part 3/64 --store parts/3

Items that are already in the store are skipped, so the same command resumes after an interruption
and adds new items. The result is one line on standard output.
"""

import argparse
import json
import os
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaembed_pl.cli.index import chosen, in_words, indexed, measured
from metaembed_pl.cli.model import (
    add_model_arguments,
    add_pace_arguments,
    check_at_least,
    load_model,
    pace_of,
    refuse_ignored,
    report_truncation,
)
from metaembed_pl.errors import UserError
from metaembed_pl.progress import Progress

if TYPE_CHECKING:
    from metaembed_pl.data.fetch import Fetch
    from metaembed_pl.retrieval import embedding

ITEMS = (
    "JSON Lines or Parquet of items, a folder of shards, or the address of one of these (hf://, "
    "s3://, https://); a PDF; a folder of pictures and PDFs"
)
LIMITS = ("fetch_seconds", "fetch_mb")
COLUMNS = (
    "columns of a Parquet file for text, image, id and instruction (default: columns of these "
    "names)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add_model_arguments(parser)
    add("--items", required=True, metavar="PATH", help=ITEMS)
    add("--store", type=Path, required=True, metavar="FOLDER", help="store to create or extend")
    add("--columns", metavar="KEY=COLUMN,...", help=f"{COLUMNS}; other plain columns are metadata")
    add(
        "--fetch-images",
        action="store_true",
        help="download images that items name by an http(s) address; refused otherwise",
    )
    add(
        "--fetch-seconds",
        type=float,
        metavar="S",
        help="time limit per image, in seconds (default: 10)",
    )
    add(
        "--fetch-mb",
        type=float,
        metavar="MB",
        help="size limit per image, in MB (default: 20)",
    )
    add(
        "--store-dtype",
        choices=("bf16", "fp16", "int8"),
        help="dtype of a new store (default: bf16)",
    )
    add(
        "--width",
        type=int,
        metavar="W",
        help="dimensions to store: the first ones if the model was trained at that width, else a "
        "projection learned from 512 items (default: all of the model's)",
    )
    add_pace_arguments(parser)
    add(
        "--part",
        metavar="I/N",
        help="embed the I-th of N parts of the items, such as 3/8; parts are independent, and "
        "`store merge` joins their stores",
    )
    add(
        "--engine",
        choices=("here", "vllm", "ray"),
        default="here",
        help="here: this process, or torchrun's; vllm: vLLM, for a folder of `export --format "
        "vllm`; ray: a Ray cluster, in parts (default: here)",
    )
    add(
        "--vllm-args",
        metavar="JSON",
        help='settings of vLLM\'s engine, such as {"tensor_parallel_size": 2}',
    )
    add(
        "--parts",
        type=int,
        metavar="N",
        help="number of parts for --engine ray (default: 4 per GPU or CPU)",
    )
    add(
        "--again", action="store_true", help="embed all items again, and replace those in the store"
    )
    add("--skip-bad", action="store_true", help="skip and report items that cannot be read")
    add("--no-previews", action="store_true", help="store no previews")
    add(
        "--index",
        action="store_true",
        help="build an index afterwards, for fast search in a large store",
    )
    add("--json", action="store_true", help="one JSON object instead of a line of text")


def run(args: argparse.Namespace) -> None:
    """Embed, and print a summary."""
    check_at_least(args, 1, "width")
    if args.engine != "ray":
        refuse_ignored(args, "is for --engine ray; --part I/N embeds one part", "parts")
    if args.engine != "vllm":
        refuse_ignored(args, "is for --engine vllm", "vllm_args")
    with redirect_stdout(sys.stderr):
        summary = _embed_on_ray(args) if args.engine == "ray" else embed_here(args)
    if summary is None:
        return
    if args.json:
        print(json.dumps(summary))
        return
    print(
        f"{summary['items']:,} items in {args.store}, {summary['embedded']:,} of them new"
        + (f", {summary['skipped']:,} skipped" if summary["skipped"] else "")
        + (
            f"; {_stored_as(summary)} keeps {100 * summary['kept']:.1f} % of the 10 nearest "
            f"neighbours ({summary['sample']} sampled items)"
            if summary["sample"] > 1
            else ""
        )
        + (f"; index: {in_words(summary['index'])}" if summary["index"] else "")
    )


def _embed_on_ray(args: argparse.Namespace) -> dict[str, Any]:
    from metaembed_pl.cli.embed_ray import embed_on_ray
    from metaembed_pl.data.tables import parse_columns
    from metaembed_pl.retrieval.sources import open_source

    refuse_ignored(args, "does not work with --engine ray", "part", "index", "again")
    source = open_source(args.items, parse_columns(args.columns), _fetch(args))
    return embed_on_ray(args, len(source), embed_here)


def embed_here(args: argparse.Namespace) -> dict[str, Any] | None:
    """Embed in this process or on torchrun's ranks, with a `MetaEmbedder` or vLLM.

    Returns:
        A summary; None on ranks other than 0.
    """
    from metaembed_pl.data.tables import parse_columns
    from metaembed_pl.retrieval.embedding import PartOf
    from metaembed_pl.retrieval.sources import open_source

    # Cheap checks come first: a model takes seconds to load.
    pace, columns = pace_of(args), parse_columns(args.columns)
    source = open_source(args.items, columns, _fetch(args))
    part = None if args.part is None else PartOf.parse(args.part)
    settings = _vllm_settings(args)
    if part is not None and args.index:
        raise UserError("--index needs a complete store: merge the parts, then run `index`")
    if args.index:
        from metaembed_pl.retrieval.index import faiss_module

        faiss_module()

    from metaembed_pl.ranks import connected_ranks
    from metaembed_pl.retrieval import embedding
    from metaembed_pl.retrieval.parts import PartNote, begin
    from metaembed_pl.retrieval.store import Store

    with connected_ranks() as (rank, _):
        model = _model(args, settings)
        store = Store.open_for(
            model, args.store, args.store_dtype, args.width, source, args.skip_bad
        )
        note = None if part is None else PartNote(str(part), len(source), pace.batch_size)
        if note is not None and rank == 0:
            begin(store, note)
        steps = embedding.embed(
            store,
            model,
            source,
            pace,
            again=args.again,
            skip_bad=args.skip_bad,
            previews=not args.no_previews,
            part=part,
        )
        if rank:
            for _ in steps:
                pass
            report_truncation(model)
            return None
        with Progress("embedding", len(source)) as progress:
            done = embedding.EmbedStatus()
            for done in steps:
                progress.update(done.seen)
        report_truncation(model)
        if note is not None:
            replace(note, done=True).write(store.folder)
        for reason in done.skipped:
            print(f"skipped {reason}", file=sys.stderr)
        if done.changed:
            print(
                f"{len(done.changed):,} ids stand for other items in {args.store}, which are kept, "
                f"such as {done.changed[0]!r}: replace them with --again, or use other ids",
                file=sys.stderr,
            )
        summary = _summary(store, done)
        summary["index"] = _index(store, model, args) if len(store) and settings is None else None
        return summary


def _model(args: argparse.Namespace, settings: dict[str, Any] | None) -> Any:
    if settings is None:
        return load_model(args)
    from metaembed_pl.serving.vllm_engine import VllmModel

    return VllmModel(args.model, ({"dtype": args.dtype} if args.dtype else {}) | settings)


def _vllm_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """Settings of vLLM's engine; None for other engines."""
    if args.engine != "vllm":
        return None
    ours = "index", "compile", "device", "revision", "chunk_tokens"
    refuse_ignored(args, "is not for --engine vllm", *ours, attention="sdpa")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--engine vllm runs its own processes: without torchrun, give --vllm-args "
            "'{\"tensor_parallel_size\": N}', or run one --part a GPU"
        )
    try:
        settings = json.loads(args.vllm_args or "{}")
    except ValueError:
        settings = None
    if not isinstance(settings, dict):
        raise UserError(f"--vllm-args takes a JSON object, got {args.vllm_args!r:.80}")
    if "dtype" in settings:
        refuse_ignored(args, "is given twice: leave it out of --vllm-args", "dtype")
    return settings


def _fetch(args: argparse.Namespace) -> "Fetch | None":
    for flag, value in (("seconds", args.fetch_seconds), ("mb", args.fetch_mb)):
        if value is not None and not value > 0:
            raise UserError(f"--fetch-{flag} must be above 0, got {value}")
    if not args.fetch_images:
        refuse_ignored(args, "limits --fetch-images, which is not given", *LIMITS)
        return None
    from metaembed_pl.data.fetch import Fetch

    max_bytes = int(args.fetch_mb * 1e6) if args.fetch_mb else Fetch.max_bytes
    return Fetch(args.fetch_seconds or Fetch.timeout_s, max_bytes)


def _index(store: Any, model: Any, args: argparse.Namespace) -> dict[str, Any] | None:
    """Build an index if `--index` was given; extend an existing one."""
    from metaembed_pl.retrieval.calibration import Calibration
    from metaembed_pl.retrieval.index import IndexUnusable

    try:
        known = store.index()
    except IndexUnusable as error:
        print(f"the index was not changed: {error}", file=sys.stderr)
        known = None
    if known is None and not args.index:
        return None
    summary = indexed(store)
    calibration = Calibration.load(store) or measured(store, model, args.batch_size)
    return summary | chosen(store, calibration)


def _summary(store: Any, done: "embedding.EmbedStatus") -> dict[str, Any]:
    from metaembed_pl.retrieval.storage_recall import storage_recall

    kept, sample = storage_recall(store, done) if done.sample else (1.0, 0)
    return {
        "items": len(store),
        "embedded": done.embedded,
        "skipped": len(done.skipped),
        "dtype": store.dtype,
        "width": store.width,
        "model_width": store.model_width,
        "kept": kept,
        "sample": sample,
    }


def _stored_as(summary: dict[str, Any]) -> str:
    """The dtype of the stored vectors, and their width if they are projected."""
    projected = summary["width"] < summary["model_width"]
    return f"width {summary['width']} in {summary['dtype']}" if projected else summary["dtype"]
