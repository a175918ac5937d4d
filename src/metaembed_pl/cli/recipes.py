"""`python -m metaembed_pl recipes`: the recipes that come with the package.

    python -m metaembed_pl recipes                            # list them
    python -m metaembed_pl recipes qwen7b                     # prints one
    python -m metaembed_pl recipes qwen7b --copy mine.yaml    # start your own

A recipe's head is the comment it opens with: its title, then lines `# key: value`.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from metaembed_pl.cli.model import refuse_ignored
from metaembed_pl.cli.recipe_path import find_recipe, recipe_folder
from metaembed_pl.errors import UserError
from metaembed_pl.files import write_text

HEAD_KEYS = ("paper", "data", "command", "hardware", "hours", "memory", "expected", "verified")
SHOWN = ("paper", "hardware", "verified")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add("name", nargs="?", metavar="NAME", help="print this recipe instead of the list")
    add(
        "--copy",
        type=Path,
        metavar="PATH",
        help="copy the recipe NAME to PATH, with the files it refers to",
    )
    add("--json", action="store_true", help="the heads of all recipes as one JSON object")


def run(args: argparse.Namespace) -> None:
    """List the recipes, or print or copy one."""
    if args.name is None:
        refuse_ignored(args, "needs the NAME of a recipe: recipes NAME --copy PATH", "copy")
        heads = {path.stem: read_head(path) for path in recipe_files()}
        print(json.dumps(heads, indent=2)) if args.json else _print_list(heads)
        return
    source = Path(find_recipe(args.name))
    if args.copy is not None:
        refuse_ignored(args, "does not work with --copy, which prints the files it wrote", "json")
        for path in copy_recipe(source, args.copy):
            print(path)
    elif args.json:
        print(json.dumps({source.stem: read_head(source)}, indent=2))
    else:
        print(source.read_text(encoding="utf-8"), end="")


def recipe_files() -> list[Path]:
    """The recipes that come with the package."""
    return sorted(recipe_folder().glob("*.yaml"))


def read_head(path: Path) -> dict[str, str]:
    """A recipe's head: `title` and `HEAD_KEYS`; a line without a key continues the last value."""
    head: dict[str, str] = {}
    key = "title"
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.removeprefix("#").strip()
        name, colon, value = text.partition(":")
        if colon and name in HEAD_KEYS:
            key, text = name, value.strip()
        if text:
            head[key] = f"{head[key]} {text}" if key in head else text
    return head


def copy_recipe(source: Path, target: Path) -> list[Path]:
    """Copies a recipe under another name, with the files that it refers to.

    The copy's `run.name` is the name of the new file. Returns the files written, the recipe first.
    """
    target = target / source.name if target.is_dir() else target
    if target.suffix not in (".yaml", ".yml"):
        target = target.with_name(f"{target.name}.yaml")
    if target.exists():
        raise UserError(f"{target} exists already: choose another path, or remove it first")
    text = source.read_text(encoding="utf-8")
    parts = {
        target.parent / name: (source.parent / name).read_text(encoding="utf-8")
        for name in sorted(set(re.findall(r"[\w-]+/[\w./-]+\.yaml", text)))
        if (source.parent / name).is_file()
    }
    for path, content in parts.items():
        if path.exists() and path.read_text(encoding="utf-8") != content:
            raise UserError(f"{path} exists already: the recipe needs a file of that name")
    text = text.replace(f"recipes/{source.name}", target.as_posix())
    text = re.sub(r"(?m)^(run:\n  name: )\S+", rf"\g<1>{target.stem}", text)
    for path, content in {target: text, **parts}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, content)
    return [target, *parts]


def _print_list(heads: dict[str, dict[str, str]]) -> None:
    """A table, folded to a terminal's width; in a pipe each recipe has one line."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("recipe", *SHOWN):
        table.add_column(column, overflow="fold")
    for name, head in heads.items():
        table.add_row(name, *(Text(head.get(key, "")) for key in SHOWN))
    console = Console(width=None if sys.stdout.isatty() else 1000)
    with console.capture() as shown:
        console.print(table)
    print(re.sub(r"(?m) +$", "", shown.get()), end="")
