"""Progress of long jobs, by tqdm: a bar in a terminal, lines in a pipe."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from shutil import get_terminal_size
from types import TracebackType
from typing import Any, TypeVar

Step = TypeVar("Step")

LINE_EVERY_S = 10.0
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"


class Progress:
    """Shows on standard error how far a job is; used in a `with` block.

    Args:
        does: what the job does, such as "embedding".
        total: how many things there are; None where nobody knows.
        things: what they are called.
        done: of them, by an earlier run.
        is_shown: False shows nothing.
    """

    def __init__(
        self,
        does: str,
        total: int | None,
        things: str = "items",
        done: int = 0,
        is_shown: bool = True,
    ):
        self.does, self.total, self.things = does, total, things
        self._done, self._is_shown = done, is_shown
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._close()

    def begin(self, does: str, total: int) -> None:
        """Go over to another job, in the place of the one before; the same goes on."""
        if (does, total) != (self.does, self.total):
            self._close()
            self.does, self.total, self._done = does, total, 0

    def update(self, seen: int) -> None:
        """Say how many things were looked at."""
        if self._bar is None:
            self._bar = self._open()
        self._bar.update(seen - self._bar.n)

    def _open(self) -> Any:
        from tqdm import tqdm

        # Not found out by tqdm: it shows nothing in a terminal that does not tell its size.
        in_terminal: dict[str, Any] = dict(
            zip(("ncols", "nrows"), get_terminal_size(), strict=True)
        )
        in_pipe: dict[str, Any] = {
            "file": _Lines(),
            "bar_format": LINE,
            "mininterval": LINE_EVERY_S,
            "delay": LINE_EVERY_S,
            "leave": False,
        }
        return tqdm(
            desc=self.does,
            total=self.total,
            initial=self._done,
            unit=f" {self.things}",
            miniters=1,
            disable=not self._is_shown,
            **(in_terminal if sys.stderr.isatty() else in_pipe),
        )

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        self._bar = None


class _Lines:
    """Gives what tqdm writes over a line a line of its own."""

    def write(self, text: str) -> None:
        if text.strip():
            sys.stderr.write(f"{text.strip()}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def with_progress(
    steps: Iterable[Step],
    does: str,
    total: int | None = None,
    seen: Callable[[Step], int] | None = None,
    done: int = 0,
) -> Iterator[Step]:
    """The same steps with their progress; only the first process shows it.

    Args:
        steps: of a job.
        does: what it does.
        total: how many things there are; None where nobody knows.
        seen: how many were looked at after a step; None: one more.
        done: things that an earlier run has done.
    """
    is_first = not int(os.environ.get("RANK", "0"))
    with Progress(does, total, done=done, is_shown=is_first) as progress:
        for number, step in enumerate(steps, start=done + 1):
            yield step
            progress.update(number if seen is None else seen(step))
