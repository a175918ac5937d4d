"""Shared by the scripts in this folder: flags, exit statuses, output."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from pathlib import Path

from metaembed_pl.data.parallel import count_cores
from metaembed_pl.data.product import Making, Product, listed, make
from metaembed_pl.errors import Unreachable, UserError
from metaembed_pl.files import disk_error


def run(
    script: str,
    about: str | None,
    products: Callable[[argparse.Namespace], Iterable[Product]],
    declare: Callable[[argparse.ArgumentParser], None],
    argv: list[str] | None = None,
) -> int:
    """Parse the command line and make the products; return the exit status.

    Args:
        script: its name in `prepare`.
        about: its docstring; the first line is the summary.
        products: makes them from the options.
        declare: adds the script's own flags.
        argv: the arguments; None takes those of the command line.
    """

    def build(options: argparse.Namespace) -> None:
        for product in products(options):
            make_and_print(product, options)

    return main_of(script, about, build, declare, argv)


def main_of(
    script: str,
    about: str | None,
    build: Callable[[argparse.Namespace], None],
    declare: Callable[[argparse.ArgumentParser], None],
    argv: list[str] | None = None,
) -> int:
    """Parse the command line and build; errors become one line and an exit status."""
    summary, _, details = (about or "").partition("\n\n")
    called = f"metaembed-pl prepare {script}"
    parser = argparse.ArgumentParser(
        prog=called,
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = parser.add_argument_group("as all scripts here")
    common.add_argument("--limit", type=int, metavar="N", help="use only the first N rows")
    common.add_argument(
        "--num-workers",
        type=int,
        default=count_cores(),
        metavar="N",
        help="decoding processes (default: one per core)",
    )
    common.add_argument(
        "--max-dropped",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="stop if more rows than this are unusable (default: %(default)s)",
    )
    common.add_argument("--licence", help="licence to record instead of the source's")
    common.add_argument("--force", action="store_true", help="replace existing output")
    declare(parser)
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    options.command = f"{called} {shlex.join(argv)}".rstrip()
    try:
        _check(options)
        build(options)
    except Unreachable as error:
        return _stopped(called, str(error), 1)
    except UserError as error:
        print(f"{called}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        message = disk_error(error)
        if message is None:
            raise
        print(f"{called}: {message}", file=sys.stderr)
        return 2
    except BrokenProcessPool:
        return _stopped(called, "a process died (out of memory? lower --num-workers)", 1)
    except KeyboardInterrupt:
        return _stopped(called, "interrupted", 130)
    return 0


def _stopped(called: str, reason: str, status: int) -> int:
    advice = "complete shards are kept: run it again to resume"
    print(f"{called}: {reason}; {advice}", file=sys.stderr)
    return status


def declare_source(
    parser: argparse.ArgumentParser, out: str, hub: str, parts: Iterable[str]
) -> None:
    """Add the flags of scripts that read a published dataset: --out, --from and --subset."""
    add = parser.add_argument
    add("--out", type=Path, default=Path(out), help=f"folder to write to (default: {out})")
    add(
        "--from",
        dest="where",
        default=hub,
        metavar="ID_OR_FOLDER",
        help="id on the hub, or a folder with the same files"
        + (f" (default: {hub})" if hub else ""),
    )
    names = tuple(parts)
    if len(names) > 1:
        add(
            "--subset",
            action="append",
            choices=names,
            metavar="NAME",
            help=f"only this one; repeatable: {', '.join(names)}",
        )


def declare_split(parser: argparse.ArgumentParser, things: str) -> None:
    """Add the flags of scripts that split data of your own: --name and --held-out."""
    parser.add_argument(
        "--name", help="the source's name in metrics and logs (default: the folder's)"
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.1,
        metavar="SHARE",
        help=f"share of {things} held out for testing (default: 0.1)",
    )


def make_and_print(product: Product, options: argparse.Namespace) -> None:
    """Make a product, and print a summary."""
    how = {field.name: getattr(options, field.name) for field in fields(Making)}
    made = make(product, Making(**how))
    for pairs in made.splits.values():
        size = sum(shard["bytes"] for shard in pairs.manifest["shards"]) / 1e6
        state = "written" if made.is_new else "kept"
        print(f"{pairs.folder}: {len(pairs):,} pairs, {size:.1f} MB, {state}")
    print(f"dropped: {made.dropped.total():,}" + listed(made.dropped))


def _check(options: argparse.Namespace) -> None:
    least_of = {"limit": 1, "num_workers": 0, "num_negatives": 0, "words": 0, "hold_out": 0}
    for name, least in least_of.items():
        value = getattr(options, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if not 0 <= options.max_dropped <= 1:
        raise UserError(f"--max-dropped is a share, 0 to 1, not {options.max_dropped}")
    held_out = getattr(options, "held_out", None)
    if held_out is not None and not 0 <= held_out < 1:
        raise UserError(f"--held-out is a share, 0 to below 1, not {held_out}")
