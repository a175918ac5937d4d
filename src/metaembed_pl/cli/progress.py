"""Progress of long jobs: a bar with rate and time left in a terminal, lines in a pipe."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

Step = TypeVar("Step")

LINE_EVERY_S = 10.0


class Progress:
    """Shows on standard error how far a job is; used in a `with` block.

    Args:
        does: what the job does, such as "embedding".
        total: how many things there are.
        things: what they are called.
    """

    def __init__(self, does: str, total: int, things: str = "items"):
        self.does, self.total, self.things = does, total, things
        self._started = self._told = time.monotonic()
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TextColumn("{task.fields[rate]}"),
                progress.TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._bar.add_task(self.does, total=self.total, rate="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, does: str, total: int) -> None:
        """Go over to another job, in the place of the one before; the same goes on."""
        if (does, total) == (self.does, self.total):
            return
        self.does, self.total, self._started = does, total, time.monotonic()
        if self._bar is not None:
            self._bar.reset(self._bar.task_ids[0], description=does, total=total)

    def update(self, seen: int, done: int) -> None:
        """Say how many things were looked at, and how many of them took work."""
        now = time.monotonic()
        rate = done / max(1e-9, now - self._started)
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=seen, rate=f"{rate:.1f}/s")
        elif now - self._told >= LINE_EVERY_S:
            self._told = now
            left = duration((self.total - seen) / rate) if rate else "an unknown time"
            print(
                f"{self.does}: {seen:,} of {self.total:,} {self.things}, {rate:.1f}/s, {left} left",
                file=sys.stderr,
                flush=True,
            )


def shown(
    steps: Iterable[Step], does: str, total: int, seen: Callable[[Step], int]
) -> Iterator[Step]:
    """The same steps with their progress; only the first process shows it.

    Args:
        steps: of a job.
        does: what it does.
        total: how many things there are.
        seen: how many were looked at after a step.
    """
    if int(os.environ.get("RANK", "0")):
        yield from steps
        return
    with Progress(does, total) as progress:
        for step in steps:
            progress.update(seen(step), seen(step))
            yield step


def duration(seconds: float) -> str:
    """A time as people say it.

    >>> duration(42), duration(600), duration(4000)
    ('42 s', '10 min', '1 h 7 min')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
