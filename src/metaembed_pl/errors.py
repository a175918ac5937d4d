"""The errors a user can cause: one line that says what was expected, what came and what to do."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class UserError(ValueError):
    """Wrong input. The command line prints its one line on stderr and exits with 2."""


class Unreachable(UserError):
    """Remote data cannot be read now: no fault of a sample, and no reason to replace it."""


class BadSample(UserError):
    """An unusable pair of a shard; training replaces and counts it.

    Args:
        shard: file name of the shard.
        key: the sample's key in it.
        reason: what is wrong, in a few words.
    """

    def __init__(self, shard: str, key: str, reason: str):
        super().__init__(f"{shard}: sample {key!r} cannot be used: {reason}")
        self.shard, self.key, self.reason = shard, key, reason

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        # DataLoader workers send exceptions to the main process by pickling their arguments.
        return type(self), (self.shard, self.key, self.reason)


def first_line(error: BaseException) -> str:
    r"""The first line of an error's message; its type if it has none.

    >>> first_line(OSError("no such file\nhint: ...")), first_line(MemoryError())
    ('no such file', 'MemoryError')
    """
    lines = filter(None, map(str.strip, str(error).splitlines()))
    return next(lines, type(error).__name__)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those it was raised from, the last one first."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        yield error
        seen.append(error)
        error = error.__cause__ or error.__context__


@contextmanager
def about_key(key: str) -> Iterator[None]:
    """While open, errors of the user begin with a key of the recipe."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(key):
            raise
        raise UserError(f"{key}: {error}") from error


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a message about an unknown name; empty if no known one is close.

    >>> did_you_mean("ddp_", ["auto", "ddp"])
    "; did you mean 'ddp'?"
    """
    near = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {near[0]!r}?" if near else ""
