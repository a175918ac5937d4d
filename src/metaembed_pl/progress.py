"""Progress of long jobs, by tqdm: a bar in a terminal, lines in a pipe."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from shutil import get_terminal_size
from typing import Any, TypeVar

Step = TypeVar("Step")

LINE_EVERY_S = 10.0
LINE = "{desc}: {n_fmt} of {total_fmt}{unit}, {rate_noinv_fmt}, {remaining} left"


class Progress:
    """A progress bar on standard error; used in a `with` block.

    Args:
        does: what the job does, such as "embedding".
        total: number of things; None: unknown.
        things: their name.
        done: number of things done by an earlier run.
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

    def __exit__(self, *_error: object) -> None:
        self._close()

    def begin(self, does: str, total: int, things: str = "items") -> None:
        """Continue with another job in place of the previous one; no effect if it is the same."""
        if (does, total, things) != (self.does, self.total, self.things):
            self._close()
            self.does, self.total, self.things, self._done = does, total, things, 0

    def update(self, seen: int) -> None:
        """Set the number of things done."""
        if self._bar is None:
            self._bar = self._open()
        self._bar.update(seen - self._bar.n)

    def _open(self) -> Any:
        from tqdm import tqdm

        # tqdm itself shows nothing in a terminal of unknown size.
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
    """Puts each update of tqdm on a line of its own."""

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
    things: str = "items",
) -> Iterator[Step]:
    """Iterate over steps with a progress bar, which only the first process shows.

    Args:
        steps: of a job.
        does: what the job does.
        total: number of things; None: unknown.
        seen: number of things done after a step; None: one more.
        done: number of things done by an earlier run.
        things: their name.
    """
    is_first = not int(os.environ.get("RANK", "0"))
    with Progress(does, total, things, done, is_shown=is_first) as progress:
        for number, step in enumerate(steps, start=done + 1):
            yield step
            progress.update(number if seen is None else seen(step))
