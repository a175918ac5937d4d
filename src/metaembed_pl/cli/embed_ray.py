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
    """Embed all parts and merge them; the same command goes on where it was.

    Args:
        args: the flags of `embed`.
        total: items, for the progress.
        embed: embeds a part, in a worker.

    Returns:
        What was done, as `embed` tells it.

    Raises:
        UserError: Ray is missing, the store is there already, or a part cannot be embedded.
    """
    from metaembed_pl.retrieval.embedding import PartOf
    from metaembed_pl.retrieval.parts import PartNote, merge

    check_at_least(args, 1, "parts")
    ray = _ray()
    if args.store.exists():
        raise UserError(
            f"{args.store} exists already: --engine ray only creates new stores; leave it out to "
            "add to this one"
        )
    folder = args.store.resolve().with_name(f"{args.store.name}.parts")
    if not ray.is_initialized():
        # Of a cluster, RAY_ADDRESS or the command that started it says where; else it is local.
        ray.init(address=os.environ.get("RAY_ADDRESS"), log_to_driver=False, logging_level="error")
    resources = ray.cluster_resources()
    kind = "GPU" if resources.get("GPU") else "CPU"
    known = next((PartNote.read(part) for part in sorted(folder.glob("*")) if _is_part(part)), None)
    count = PARTS_A_WORKER * int(resources.get(kind, 1))
    count = args.parts or (count if known is None else PartOf.parse(known.part).of)
    needs: dict[str, Any] = {"num_gpus": 1} if kind == "GPU" else {"num_cpus": 1}
    task = ray.remote(max_retries=RETRIES, **needs)(embed_part)
    given = _flags(args)
    waiting = [
        task.remote(embed, given, f"{i}/{count}", str(folder / f"{i}")) for i in _numbers(count)
    ]
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
    store = merge([folder / f"{i}" for i in _numbers(count)], args.store)
    shutil.rmtree(folder)
    sums = {name: sum(summary[name] for summary in done) for name in ("embedded", "skipped")}
    return {**done[0], **sums, "items": len(store), "kept": 1.0, "sample": 0}


def embed_part(embed: Embed, flags: dict[str, Any], part: str, store: str) -> dict[str, Any]:
    """Embed one part, in a worker; what was done."""
    args = argparse.Namespace(**flags, part=part, store=Path(store))
    Path(store).parent.mkdir(exist_ok=True)
    summary = embed(args)
    assert summary is not None, "a task has one rank"
    return summary


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that tasks have; paths do not depend on the folder that a worker is in."""
    flags = {
        name: value for name, value in vars(args).items() if name not in ("run", "part", "store")
    }
    for name in ("model", "items"):
        if Path(flags[name]).exists():
            flags[name] = str(Path(flags[name]).resolve())
    return flags | {"engine": "here", "index": False}


def _numbers(count: int) -> range:
    return range(1, count + 1)


def _is_part(folder: Path) -> bool:
    return (folder / "part.json").is_file()


def _ray() -> Any:
    try:
        import ray  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("--engine ray needs Ray: pip install 'metaembed-pl[ray]'") from error
    print("starting Ray ...", file=sys.stderr)
    return ray
