"""Batches for encoding: items are prepared in windows and run in chunks of similar length.

A window of items is prepared, encoded and returned at a time. DataLoader workers read and prepare
windows while the device computes. A window is split into chunks of similar length under a budget of
tokens, to reduce padding. Windows do not depend on the number of workers.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch.utils.data import Dataset, Sampler

from metaembed_pl.data.collate import Cut, WithTensors
from metaembed_pl.data.workers import Loader, workers_for
from metaembed_pl.errors import UserError

T = TypeVar("T")
TEXTS_AS_ONE = 8
"""A window has so many times more texts than pictures, because they take less memory."""
CHUNK_TOKENS = 4096


@dataclass
class Prepared(WithTensors):
    """A window of items, ready for the model.

    Args:
        chunks: `Chunk`s of rows of similar length; for vLLM, prompts.
        num_items: rows of all chunks.
        cut: of its texts.
        about: the caller's data about it.
    """

    chunks: list[Any]
    num_items: int
    cut: Cut = field(default_factory=Cut)
    about: Any = None


@dataclass(frozen=True)
class Pace:
    """Settings of encoding that change speed and memory, but not the result.

    Args:
        batch_size: pictures of a window; it has eight times as many texts.
        chunk_tokens: of one forward pass, padding included.
        num_workers: processes that read and prepare items; None: depends on the device.
    """

    batch_size: int = 32
    chunk_tokens: int = CHUNK_TOKENS
    num_workers: int | None = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("chunk_tokens", 1), ("num_workers", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name} must be at least {least}, got {value}")

    def windows(self, items: Iterable[T], is_text: Callable[[T], bool]) -> Iterator[list[T]]:
        """Items in windows, in order.

        >>> [len(w) for w in Pace(batch_size=1).windows("tttttttttttp", lambda item: item == "t")]
        [8, 3, 1]
        """
        room = full = TEXTS_AS_ONE * self.batch_size
        window: list[T] = []
        for item in items:
            size = 1 if is_text(item) else TEXTS_AS_ONE
            if size > room:
                yield window
                window, room = [], full
            window.append(item)
            room -= size
        if window:
            yield window


def prepared(
    windows: Iterable[T],
    prepare: Callable[[T], Prepared],
    device: torch.device,
    num_workers: int | None,
    num_ranks: int = 1,
) -> Iterable[Prepared]:
    """Windows, prepared in order; by workers, ahead of time, where there are any.

    Args:
        windows: iterated in this process, a few ahead; with workers, each is sent to one.
        prepare: runs in a worker; its errors are raised when the window's turn comes.
        device: of the model.
        num_workers: None: none on a CPU, which the model needs for itself.
        num_ranks: processes on this machine.
    """
    on_gpu = device.type == "cuda"
    if num_workers is None:
        num_workers = workers_for(num_ranks) if on_gpu else 0
    if num_workers == 0:
        return map(prepare, windows)
    return Loader(
        _Calls(prepare),
        sampler=_Order(windows),
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=1,
        pin_memory=on_gpu,
        generator=torch.Generator(),  # not the one that training draws from
        setting="--workers 0",
    )


class _Calls(Dataset):
    """A dataset whose indices are the arguments of a function."""

    def __init__(self, function: Callable[[Any], Any]):
        self._function = function

    def __getitem__(self, argument: Any) -> Any:
        return self._function(argument)


class _Order(Sampler):
    """Gives a loader its indices one by one, as they come."""

    def __init__(self, values: Iterable[Any]):
        self._values = values

    def __iter__(self) -> Iterator[Any]:
        return iter(self._values)


def one_ahead(values: Iterable[T]) -> Iterator[T]:
    """The same values; each is handed on once the next one was begun.

    >>> def say(n): print("begin", n); return n
    >>> for n in one_ahead(map(say, range(2))): print("done", n)
    begin 0
    begin 1
    done 0
    done 1
    """
    waiting: list[T] = []
    for value in values:
        waiting.append(value)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting
