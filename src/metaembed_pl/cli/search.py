"""`python -m metaembed_pl search`: ranks items for a text, a picture or both.

    python -m metaembed_pl search --model runs/emoji/model --items data/emoji/test/emoji_t2i \
        --query "flag of Japan" --budget 2x4 --top 5

Ranks on standard output: a table in a terminal, aligned text in a pipe, JSON with --json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from metaembed_pl.display import plain
from metaembed_pl.errors import UserError

if TYPE_CHECKING:
    from metaembed_pl.budget import Budget
    from metaembed_pl.item import Item
    from metaembed_pl.retrieval.search import Hit

HEAD = ("rank", "score", "id", "text")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add("--model", type=Path, required=True, metavar="FOLDER", help="such as runs/NAME/model")
    add(
        "--items",
        type=Path,
        required=True,
        metavar="PATH",
        help="what to search: a JSON Lines of items, a folder of pictures, or a folder of shards",
    )
    add("--query", metavar="TEXT", help="what to look for, in words")
    add(
        "--image", type=Path, metavar="FILE", help="what to look for, as a picture; also with words"
    )
    add("--budget", metavar="RQxRC", help="query x candidate vectors to spend (default: all)")
    add("--top", type=int, default=10, metavar="N", help="results to show (default: 10)")
    add("--batch-size", type=int, default=32, metavar="N", help="items encoded at a time")
    add("--device", metavar="NAME", help="cpu, cuda, cuda:1 (default: cuda where there is one)")
    add("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Search, and print what is found.

    Raises:
        UserError: a flag, the model or an item is not valid.
    """
    from metaembed_pl.budget import Budget

    # What costs nothing to check comes first: loading a model takes seconds, encoding hours.
    budget = None if args.budget is None else Budget.parse(args.budget)
    for name in ("top", "batch_size"):
        if getattr(args, name) < 1:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} must be at least 1, got {getattr(args, name)}")
    query = _read_query(args.query, args.image)
    pool = _read_pool(args.items)

    # Results alone go to standard output, whatever libraries have to say meanwhile.
    with redirect_stdout(sys.stderr):
        budget, hits = _search(args, query, pool, budget)
    found = [(pool.items[candidate], score) for candidate, score in hits]
    if args.json:
        print(json.dumps(_as_json(query, str(budget), found)))
    else:
        _print_table([_row(place, *hit, pool) for place, hit in enumerate(found, start=1)])


class Pool(NamedTuple):
    """What is searched, and for items out of shards the texts of the queries that ask for them."""

    items: "list[Item]"
    asked_as: dict[str, list[str]]


def _read_query(text: str | None, image: Path | None) -> "Item":
    from metaembed_pl.item import Item

    if text is None and image is None:
        raise UserError('nothing to look for: give --query "TEXT", --image FILE or both')
    query = Item(text=text, image=image)
    query.load_image()
    return query


def _read_pool(path: Path) -> Pool:
    from metaembed_pl.item import read_items

    if not path.is_dir() or not any(path.glob("*.tar")):
        try:
            return Pool(read_items(path), {})
        except UserError as error:
            deeper = next(path.rglob("*.tar"), None)
            hint = f"; choose one folder of shards, such as {deeper.parent}" if deeper else ""
            raise UserError(f"{error}{hint}") from error
    from metaembed_pl.data.shards import ShardedPairs

    items: dict[str, Item] = {}
    asked_as: dict[str, list[str]] = {}
    for pair in ShardedPairs(path):
        items.setdefault(pair.positive.uid, pair.positive)
        if pair.query.text is not None:
            asked_as.setdefault(pair.positive.uid, []).append(pair.query.text)
    return Pool(list(items.values()), asked_as)


def _search(
    args: argparse.Namespace, query: "Item", pool: Pool, budget: "Budget | None"
) -> "tuple[Budget, list[Hit]]":
    from transformers.utils import logging

    from metaembed_pl.budget import check_budget
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.retrieval.search import rank

    progress = sys.stderr.isatty()
    if not progress:
        logging.disable_progress_bar()
    model = MetaEmbedder.from_pretrained(args.model, _device(args.device))
    budget = check_budget(budget or model.groups[-1], model.groups)
    hits = rank(model, [query], pool.items, budget, args.top, args.batch_size, progress)
    return budget, hits[0]


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} is not to be had here: {reason}") from error
    return name


def _as_json(query: "Item", budget: str, found: "Sequence[tuple[Item, float]]") -> dict[str, Any]:
    return {
        "query": {"text": query.text, "image": None if query.image is None else str(query.image)},
        "budget": budget,
        "results": [
            {
                "rank": place,
                "score": score,
                "id": item.uid,
                "text": item.text,
                # A picture inside a shard has no path of its own.
                "image": str(item.image) if isinstance(item.image, Path) else None,
            }
            for place, (item, score) in enumerate(found, start=1)
        ],
    }


def _row(place: int, item: "Item", score: float, pool: Pool) -> tuple[str, str, str, str]:
    """A result in words; for a picture, what asks for it or where it is."""
    text = item.text or ""
    if not text and item.uid in pool.asked_as:
        text = "asked for as " + ", ".join(f'"{asked}"' for asked in pool.asked_as[item.uid])
    elif not text and isinstance(item.image, Path):
        text = str(item.image)
    return str(place), f"{score:.4f}", plain(item.id or ""), plain(text)


def _print_table(rows: Sequence[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, header_style="bold", pad_edge=False)
        for name, justify in zip(HEAD, ("right", "right", "left", "left"), strict=True):
            table.add_column(name, justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        Console().print(table)
        return
    widths = [max(map(len, column)) for column in zip(HEAD, *rows, strict=True)]
    for rank, score, name, text in (HEAD, *rows):
        line = f"{rank:>{widths[0]}}  {score:>{widths[1]}}  {name:<{widths[2]}}  {text}"
        print(line.rstrip())
