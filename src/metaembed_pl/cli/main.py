"""`python -m metaembed_pl VERB`: dispatch to the verb.

Nothing heavy is imported here, so that help and light verbs are fast.
"""

import argparse
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from metaembed_pl import __version__
from metaembed_pl.cli import TRAINING_VERBS, VERBS
from metaembed_pl.cli.recipe_path import with_settings
from metaembed_pl.errors import UserError
from metaembed_pl.files import disk_error


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a verb.

    Returns:
        The exit status: 0 done, 2 wrong input or a disk that is full, 130 interrupted, 143 stopped
        by SIGTERM; more in docs/operations.md.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may be no UTF-8
            stream.reconfigure(errors="backslashreplace")
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    if debug:
        argv.remove("--debug")
    try:
        return _dispatch(argv)
    except UserError as error:
        if debug:
            raise
        print(f"metaembed-pl: {one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        # The reader of our output (head, less) has gone; Python would complain again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        message = disk_error(error)
        if debug or message is None:
            raise
        print(f"metaembed-pl: {message}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("metaembed-pl: interrupted", file=sys.stderr)
        return 130


def one_line(error: BaseException) -> str:
    """An error's message on one line; of one sent by a worker process, what it said itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if lines and lines[0].startswith("Caught "):
        return lines[-1].partition("Error: ")[2] or lines[-1]
    return " ".join(lines)


def _dispatch(argv: list[str]) -> int:
    if argv and argv[0] in TRAINING_VERBS:
        from metaembed_pl.cli.train import ParsingError, run

        try:
            run(argv)
        except ParsingError as error:
            from metaembed_pl.cli.recipe_faults import first_fault

            raise UserError(first_fault(argv) or str(error)) from error
        return 0
    if argv and argv[0] in ("check", "tune"):
        argv = with_settings(argv)
    arguments = _parser(argv).parse_args(argv)
    with _ends_on_signals():
        arguments.run(arguments)
    return 0


@contextmanager
def _ends_on_signals() -> Iterator[None]:
    """SIGTERM and SIGHUP end a verb as Ctrl-C does: with its processes, temporary files and locks.

    Batch systems, containers and closed terminals send them; `fit` has its own way to stop.
    """

    def end(number: int, frame: FrameType | None) -> None:
        os.write(2, f"metaembed-pl: stopped by {signal.Signals(number).name}\n".encode())
        raise SystemExit(128 + number)

    wanted = [signal.SIGTERM, signal.SIGHUP]
    if threading.current_thread() is not threading.main_thread():
        wanted = []
    taken = [number for number in wanted if signal.getsignal(number) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def _parser(argv: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="metaembed-pl",
        description="Train a vision-language model into a MetaEmbed retriever, and search with it.",
        epilog="Any verb takes --help, and --debug for the traceback of an error.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for name, does in TRAINING_VERBS.items():
        verbs.add_parser(name, help=does, add_help=False)
    for name, does in VERBS.items():
        verb = verbs.add_parser(name, help=does, description=does)
        if argv[:1] == [name]:
            module = importlib.import_module(f"metaembed_pl.cli.{name}")
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
    return parser
