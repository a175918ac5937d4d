"""`embed --engine ray`: the parts of the items as tasks of a Ray cluster, then merged.

A task does the same as `embed --part`. If a worker dies, Ray runs its part again, and the part
resumes. All machines must share the folder of the store.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from metaembed_pl.cli.model import check_at_least
from metaembed_pl.errors import UserError
from metaembed_pl.progress import Progress

Embed = Callable[[argparse.Namespace], "dict[str, Any] | None"]
PARTS_A_WORKER = 4
RETRIES = 10


def embed_on_ray(args: argparse.Namespace, total: int, embed: Embed) -> dict[str, Any]:
    """Embed all parts and merge them; the same command resumes after an interruption.

    Args:
        args: the flags of `embed`.
        total: number of items, for the progress bar.
        embed: embeds a part, in a worker.

    Returns:
        The summary of `embed`.

    Raises:
        UserError: Ray is missing, the store exists, or a part cannot be embedded.
    """
    from metaembed_pl.retrieval.embedding import PartOf
    from metaembed_pl.retrieval.parts import PART_FILE, PartNote, merge

    check_at_least(args, 1, "parts")
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'metaembed-pl[ray]'") from error
    print("starting Ray ...", file=sys.stderr)
    if args.store.exists():
        raise UserError(
            f"{args.store} exists already: --engine ray only creates new stores; leave it out to "
            "add to this one"
        )
    folder = args.store.resolve().with_name(f"{args.store.name}.parts")
    if not ray.is_initialized():
        # RAY_ADDRESS, or the command that started it, names a cluster; otherwise Ray runs locally.
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="error")
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    known = sorted(folder.glob(f"*/{PART_FILE}"))
    count = PARTS_A_WORKER * int(resources.get(kind, 1))
    count = args.parts or (PartOf.parse(PartNote.read(known[0].parent).part).of if known else count)
    needs: dict[str, Any] = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    task = ray.remote(max_retries=RETRIES, **needs)(embed_part)
    flags = _flags(args)
    parts = {f"{i}/{count}": folder / f"{i}" for i in range(1, count + 1)}
    waiting = [task.remote(embed, flags, part, str(store)) for part, store in parts.items()]
    with Progress("embedding", total) as progress:
        done: list[dict[str, Any]] = []
        while waiting:
            ready, waiting = ray.wait(waiting)
            try:
                done += ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                for task in waiting:
                    ray.cancel(task)
                raise UserError(str(error.cause)) from error
            progress.update(total * (count - len(waiting)) // count)
    store = merge(list(parts.values()), args.store)
    shutil.rmtree(folder)
    sums = {name: sum(summary[name] for summary in done) for name in ("embedded", "skipped")}
    return {**done[0], **sums, "items": len(store), "kept": 1.0, "sample": 0}


def embed_part(embed: Embed, flags: dict[str, Any], part: str, store: str) -> dict[str, Any]:
    """Embed one part, in a worker; return its summary."""
    args = argparse.Namespace(**flags, part=part, store=Path(store))
    Path(store).parent.mkdir(exist_ok=True)
    summary = embed(args)
    assert summary is not None, "a task has one rank"
    return summary


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags of tasks, with absolute paths: workers may run in other folders."""
    flags = {
        name: value for name, value in vars(args).items() if name not in ("run", "part", "store")
    }
    for name in ("model", "items"):
        if Path(flags[name]).exists():
            flags[name] = str(Path(flags[name]).resolve())
    return flags | {"engine": "here", "index": False}
