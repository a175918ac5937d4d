"""`python -m metaembed_pl prepare`: runs the scripts that make shards and retrieval sets.

    python -m metaembed_pl prepare                     # which there are
    python -m metaembed_pl prepare pairs --pairs mine/pairs.jsonl --out data/mine
    python -m metaembed_pl prepare vidore --help

They come with the package. In a checkout, `python data_prep/NAME.py` is the same.
"""

import argparse
import ast
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from metaembed_pl.errors import UserError

PACKAGE = Path(__file__).parents[1]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="without it, all are listed")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, metavar="...", help="of the script; NAME --help"
    )


def run(args: argparse.Namespace) -> None:
    """List the scripts, or run one.

    Raises:
        UserError: there is no script of that name.
        SystemExit: with the script's exit status, where that is not 0.
    """
    scripts = {file.stem: file for file in sorted(_folder().glob("[!_]*.py"))}
    if args.name is None:
        width = max(map(len, scripts))
        for name, file in scripts.items():
            print(f"{name:<{width}}  {_summary(file)}")
        return
    name = args.name.removesuffix(".py")
    if name not in scripts:
        raise UserError(f"there is no script {args.name!r}: choose one of {', '.join(scripts)}")
    status = _main_of(scripts[name])(args.arguments)
    if status:
        raise SystemExit(status)


def _folder() -> Path:
    """Where the scripts are: beside the package where it was installed, or in a checkout."""
    places = PACKAGE / "data_prep", PACKAGE.parents[1] / "data_prep"
    return next(place for place in places if (place / "_source.py").is_file())


def _summary(file: Path) -> str:
    return (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").split("\n")[0]


def _main_of(file: Path) -> Callable[[list[str]], int]:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # By its own name, and on the path: worker processes import it anew, and what scripts share.
    sys.modules[file.stem] = module
    sys.path.append(str(file.parent))
    spec.loader.exec_module(module)
    return module.main
