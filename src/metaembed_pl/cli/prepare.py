"""`python -m metaembed_pl prepare`: run the scripts that make shards and retrieval sets.

    python -m metaembed_pl prepare                     # list them
    python -m metaembed_pl prepare pairs --pairs mine/pairs.jsonl --out data/mine
    python -m metaembed_pl prepare vidore --help

They come with the package. In a checkout, `python data_prep/NAME.py` is the same.
"""

import argparse
import ast
import importlib
from pathlib import Path

from metaembed_pl.errors import UserError

FOLDER = Path(__file__).parents[1] / "data_prep"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument(
        "name", nargs="?", metavar="NAME", help="script to run; without it, all are listed"
    )
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments; see NAME --help"
    )


def run(args: argparse.Namespace) -> None:
    """List the scripts, or run one.

    Raises:
        UserError: there is no script of that name.
        SystemExit: with the script's exit status, where that is not 0.
    """
    scripts = {file.stem: file for file in sorted(FOLDER.glob("[!_]*.py"))}
    if args.name is None:
        width = max(map(len, scripts))
        for name, file in scripts.items():
            print(f"{name:<{width}}  {_summary(file)}")
        return
    name = args.name.removesuffix(".py")
    if name not in scripts:
        raise UserError(f"there is no script {args.name!r}: choose one of {', '.join(scripts)}")
    status = importlib.import_module(f"metaembed_pl.data_prep.{name}").main(args.arguments)
    if status:
        raise SystemExit(status)


def _summary(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]
