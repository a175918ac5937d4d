"""`python -m metaembed_pl search`: rank items for a text, a picture or both.

    python -m metaembed_pl search --model runs/emoji/model --store shelf --query "flag of Japan" \
        --where lang=de
    python -m metaembed_pl search --model runs/emoji/model --store http://localhost:6333/shelf \
        --query "flag of Japan" --cascade poolx16:200,16x64:10
    python -m metaembed_pl search --model runs/emoji/model --items data/emoji/test/emoji_t2i \
        --query "flag of Japan" --budget 2x4 --top 5

A store (written by `embed`, or pushed into Qdrant) is searched in milliseconds; items without a
store are encoded each time. A store in a folder is searched with the cheapest plan that finds 98 %
of the exact search's top ten, measured on this store; the plan and its recall are printed.
Output on standard output: a table in a terminal, aligned text in a pipe, JSON with --json.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaembed_pl.cli.embed import COLUMNS, ITEMS
from metaembed_pl.cli.model import (
    add_model_arguments,
    add_pace_arguments,
    check_at_least,
    refuse_ignored,
)
from metaembed_pl.cli.search_items import search_items
from metaembed_pl.cli.search_store import Answer, SearchResult, search_store
from metaembed_pl.display import plain
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.qdrant.address import is_qdrant

if TYPE_CHECKING:
    from metaembed_pl.item import Item

HEAD = ("rank", "score", "id", "text")
OF_STORES = ("cascade", "where", "target_recall", "normalised")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add_model_arguments(parser)
    add(
        "--store", metavar="STORE", help="store to search: a folder, or the address given to `push`"
    )
    add("--items", metavar="PATH", help=f"a few items to search without a store: {ITEMS}")
    add("--columns", metavar="KEY=COLUMN,...", help=f"for --items: {COLUMNS}")
    add("--query", metavar="TEXT", help="text to search for")
    add("--image", type=Path, metavar="FILE", help="image to search for; also together with a text")
    add(
        "--budget",
        metavar="RQxRC[xD]",
        help="query x candidate vectors to use, such as 4x8; 4x8x64: 64 dimensions of each "
        "(default: for a store in a folder auto, the cheapest plan that reaches --target-recall; "
        "otherwise all vectors)",
    )
    add(
        "--target-recall",
        type=float,
        metavar="R",
        help="share of the exact search's top ten that auto must find (default: 0.98)",
    )
    add("--cascade", metavar="STAGES", help="stages for a store, such as poolx8:200,16x64:10")
    add(
        "--where",
        action="append",
        metavar="KEY=VALUE",
        help="metadata filter for a store; also != < <= > >=; repeatable",
    )
    add(
        "--normalised",
        action="store_true",
        help="divide a store's scores by the number of query vectors, to compare budgets",
    )
    add(
        "--exact",
        action="store_true",
        help="score every item of a store with all vectors, without an index",
    )
    add("--top", type=int, metavar="N", help="results to show (default: 10)")
    add_pace_arguments(parser, workers=False)
    add("--json", action="store_true", help="one JSON object instead of a table")


def run(args: argparse.Namespace) -> None:
    """Search, and print the results."""
    # Cheap checks come first: loading a model takes seconds, encoding hours.
    _check(args)
    query = _read_query(args.query, args.image)
    # Standard output is for results alone, whatever libraries print meanwhile.
    with redirect_stdout(sys.stderr):
        answer = (search_items if args.store is None else search_store)(args, query)
    if args.json:
        print(json.dumps(_as_json(query, answer)))
    else:
        if answer.note:
            print(answer.note, file=sys.stderr)
        if not answer.results and args.where:
            print(f"no item matches --where {' --where '.join(args.where)}", file=sys.stderr)
        _print_table([_row(place, found) for place, found in enumerate(answer.results, start=1)])


def _check(args: argparse.Namespace) -> None:
    from metaembed_pl.budget import Budget

    if (args.store is None) == (args.items is None):
        raise UserError("give either --store FOLDER or --items PATH to search")
    if args.items is None:
        refuse_ignored(args, "is for --items: a store has its own", "columns")
    else:
        refuse_ignored(args, "needs a --store: build one with `embed`", *OF_STORES)
    named = args.budget is not None and (args.store is None or args.budget != "auto")
    if args.budget is not None and named:
        Budget.parse(args.budget)
    _check_plan(args, named)
    check_at_least(args, 1, "top", "batch_size")


def _check_plan(args: argparse.Namespace, named: bool) -> None:
    """Refuse flags that exclude each other; `named`: --budget is not auto."""
    in_qdrant = args.store is not None and is_qdrant(args.store)
    if args.store is None:
        refuse_ignored(args, "needs a --store: --items are always searched exactly", "exact")
    if args.exact and not in_qdrant and (named or args.cascade):
        raise UserError("--exact uses all vectors of all items: leave out --budget and --cascade")
    if args.target_recall is None:
        return
    if named or args.cascade or args.exact or in_qdrant:
        raise UserError(
            "--target-recall only works with automatic plans, of a store in a folder: leave out "
            "--budget, --cascade and --exact"
        )
    if not 0 < args.target_recall <= 1:
        raise UserError(f"--target-recall must be above 0 and at most 1, got {args.target_recall}")


def _read_query(text: str | None, image: Path | None) -> "Item":
    from metaembed_pl.item import Item

    if text is None and image is None:
        raise UserError('no query: give --query "TEXT", --image FILE or both')
    query = Item(text=text, image=image)
    query.load_image()
    return query


def _as_json(query: "Item", answer: Answer) -> dict[str, Any]:
    return {
        "query": {"text": query.text, "image": None if query.image is None else str(query.image)},
        **answer.cost,
        "results": [
            {
                "rank": place,
                "score": found.score,
                "id": found.id,
                "text": found.text,
                "image": found.image,
                **({} if found.metadata is None else {"metadata": found.metadata}),
            }
            for place, found in enumerate(answer.results, start=1)
        ],
    }


def _row(place: int, found: SearchResult) -> tuple[str, str, str, str]:
    """A row of the table; for a picture, the query it answers or its path as text."""
    answers = f"answers {found.asked_as}" if found.asked_as else ""
    text = found.text or answers or found.image or ""
    name = "" if found.id.startswith("sha256:") else found.id
    return str(place), f"{found.score:.4f}", plain(name), plain(text)


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
