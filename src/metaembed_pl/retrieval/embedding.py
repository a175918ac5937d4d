"""Embed items into a store: encoded and committed batch by batch, on one process or many.

Items already in the store are not encoded again, so a killed run resumes and loses only the batch
in flight. On several ranks (torchrun), each encodes its share of every step, and rank 0 writes
every item once, in order, as one process would.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.data.collate import Side
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, several
from metaembed_pl.model.encoder import Engine, Preparer
from metaembed_pl.model.encoding import Pace, Prepared
from metaembed_pl.picture import small_jpeg
from metaembed_pl.ranks import gather_objects, rank_and_world
from metaembed_pl.retrieval.projection import Projection, check_width
from metaembed_pl.samples import evenly_spread

if TYPE_CHECKING:
    from metaembed_pl.retrieval.store import Store

PREVIEW_PIXELS = 320
SAMPLE_ITEMS = 512
SAMPLE_BYTES = 2**27
LEARNED_FROM = 512
"""Items that teach a projection."""


@dataclass(frozen=True)
class Entry:
    """An item that may be embedded: its picture is read or drawn only when it is.

    Args:
        id: of the item in the store.
        load: gives the item.
        metadata: what the store keeps beside it.
        file: that the item is, or is a part of.
        is_text: it is known to have no picture.
    """

    id: str
    load: Callable[[], Item]
    metadata: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    is_text: bool = False

    @classmethod
    def of(cls, item: "Entry | Item | str | dict") -> "Entry":
        """What a caller brings, with what a result shows of it as metadata."""
        if isinstance(item, Entry):
            return item
        parsed = Item.parse(item)
        return cls.given(parsed.uid, parsed, shown(parsed))

    @classmethod
    def given(cls, id: str, item: Item, metadata: dict[str, Any] | None = None) -> "Entry":
        """An item that was read, though its picture may not be decoded."""
        return cls(id, partial(_same, item), metadata or {}, is_text=item.image is None)

    @classmethod
    def read(cls, id: str, read: Callable[[], Item]) -> "Entry":
        """An item that is read now, by what need not be sent to a worker.

        A fault is raised when it is the item's turn.
        """
        try:
            return cls.given(id, read())
        except UserError as error:
            return cls(id, partial(_raise, error))


def _same(item: Item) -> Item:
    return item


def _raise(error: UserError) -> Item:
    raise error


@dataclass(frozen=True)
class PartOf:
    """Which part of the items.

    Args:
        number: counted from 1.
        of: how many parts there are.

    >>> PartOf.parse("2/4")
    PartOf(number=2, of=4)
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "PartOf":
        """A part such as `3/8`.

        Raises:
            UserError: it is none.
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"expected a part such as 3/8, from 1/8 to 8/8; got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def has(self, position: int, total: int) -> bool:
        """Whether the window that begins at an item is in this part."""
        return min(position, total - 1) * self.of // total == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass
class Progress:
    """How far embedding is.

    Args:
        seen: entries looked at.
        embedded: of them, encoded and committed by this run.
        skipped: cannot be read, with the reason, where that is allowed.
        changed: ids under which the store has an item of another text or picture, and keeps it.
        sample: the first of them and their vectors before they were stored.
    """

    seen: int = 0
    embedded: int = 0
    skipped: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    sample: list[tuple[list[str], Tensor]] = field(default_factory=list)


def shown(item: Item) -> dict[str, Any]:
    """What a result shows of an item: its text, and the file of its picture."""
    metadata = item.to_json()
    metadata.pop("id", None)
    if isinstance(item.image, Path):
        metadata["image"] = str(item.image.resolve())
    return metadata


def projection_for(
    model: Engine,
    width: int | None,
    items: Iterable["Entry | Item | str | dict"],
    skip_bad: bool,
) -> tuple[Projection | None, Sequence[int]]:
    """The projection of a model's vectors to a width, and the trained widths that it keeps."""
    if width in (None, model.width):
        return None, model.widths
    check_width(width, model.width)
    if width in model.widths:
        return Projection.first(model.width, width), model.widths
    return Projection.learn(_lesson(model, items, skip_bad), width), ()


def _lesson(
    model: Engine, items: Iterable["Entry | Item | str | dict"], skip_bad: bool
) -> Iterator[Float[Tensor, "_ R D"]]:
    """The vectors that a projection is learned from: of items all over, which may be sorted."""
    if not isinstance(items, Sized):
        raise UserError(
            "a projection is learned from items all over, which are then embedded with the others: "
            "give a list of items, or what has a length and can be read twice"
        )
    chosen = set(evenly_spread(len(items), LEARNED_FROM))
    entries = (Entry.of(item) for number, item in enumerate(items) if number in chosen)
    pace = Pace()
    windows = pace.windows(entries, lambda entry: entry.is_text)
    prepare = Prepare(model.processor(), "candidate", pace.chunk_tokens, skip_bad, previews=False)
    for _, vectors in model.encoded(windows, prepare, "candidate"):
        yield vectors


def embed(
    store: "Store",
    model: Engine,
    items: Iterable["Entry | Item | str | dict"],
    pace: Pace | int = 32,
    *,
    again: bool = False,
    skip_bad: bool = False,
    previews: bool = True,
    part: PartOf | None = None,
) -> Iterator[Progress]:
    """Embed items into a store, as candidates; what it yields after each step says how far it is.

    Args:
        store: of this model.
        model: encodes.
        items: in the order of the store; of an id that comes twice the first is embedded.
        pace: how many are encoded and committed at a time, on each rank; a number: so many
            pictures, and eight times as many texts.
        again: embed also what is there already, and replace it.
        skip_bad: leave out items that cannot be read, instead of stopping.
        previews: keep a small JPEG of each picture in the store.
        part: embed this part of the items alone; see parts.py. They must have a length.

    Yields:
        The same object each time.

    Raises:
        UserError: the store is another model's, or an item cannot be read.
    """
    pace = Pace(pace) if isinstance(pace, int) else pace
    store.check_model(model)
    rank, world = rank_and_world()
    progress = Progress()
    prepare = Prepare(model.processor(), "candidate", pace.chunk_tokens, skip_bad, previews)
    with store.writing() if rank == 0 else nullcontext():
        to_do = _to_do(store, items, pace, again, progress, part)
        share = _share_of(to_do, rank, world)
        encoded = model.encoded(share, prepare, "candidate", pace.num_workers, _ranks_here())
        for window, vectors in encoded:
            window.about.embeddings = vectors
            for each in gather_objects(window.about):
                progress.skipped += [f"{id}: {reason}" for id, reason in each.skipped]
                store.add(each.ids, each.embeddings, each.metadata, each.previews)
                _sample(progress, each)
                progress.embedded += len(each.ids)
            yield progress
    yield progress


@dataclass
class Part:
    """What a rank encoded in a step; `skipped`: ids and reasons."""

    ids: list[str] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    previews: list[bytes | None] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0))


@dataclass
class _Look:
    """An entry, its place among all items, and whether it is to be embedded."""

    entry: Entry
    position: int
    is_new: bool


def _to_do(
    store: "Store",
    items: Iterable["Entry | Item | str | dict"],
    pace: Pace,
    again: bool,
    progress: Progress,
    part: PartOf | None,
) -> Iterator[list[Entry]]:
    """What is to be embedded, in windows.

    What the store has already does not move the bounds of the windows, so that a run that goes on
    gives the model the same windows. Those of which little is left are put together.
    """
    looks = _looks(store, items, again, progress)
    rest: list[Entry] = []
    for window in pace.windows(looks, lambda look: look.entry.is_text):
        if part is not None and not part.has(window[0].position, _length(items)):
            continue
        new = [look.entry for look in window if look.is_new]
        if len(new) < len(window):
            windows = list(pace.windows([*rest, *new], lambda entry: entry.is_text))
            yield from windows[:-1]
            rest = windows[-1] if windows else []
        else:
            yield from ([rest, new] if rest else [new])
            rest = []
    if rest:
        yield rest


def _looks(
    store: "Store", items: Iterable["Entry | Item | str | dict"], again: bool, progress: Progress
) -> Iterator[_Look]:
    known, seen = set(store.ids), set()
    for item in several(items, "items"):
        entry = Entry.of(item)
        progress.seen += 1
        if entry.file is not None:
            with suppress(OSError):  # gone meanwhile: reported when it is read
                stat = entry.file.stat()
                entry.metadata["file_stamp"] = f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"
            entry = _told_apart(store, entry, known, seen)
        if entry.id in seen:
            continue
        seen.add(entry.id)
        stored = _kept_of(store, entry.id) if entry.id in known and not again else None
        is_new = stored is None
        if stored is not None and entry.file is not None:
            is_new = _is_other(stored, entry, "file_stamp")
        elif stored is not None and _is_other(stored, entry, "text", "image"):
            progress.changed.append(entry.id)
        yield _Look(entry, progress.seen - 1, is_new)


def _length(items: Iterable[Any]) -> int:
    if not isinstance(items, Sized):
        raise UserError("a part of the items needs to know how many there are: give a list of them")
    return len(items)


def _share_of(windows: Iterator[list[Entry]], rank: int, world: int) -> Iterator[list[Entry]]:
    """A rank's windows: one of each step, which is empty where there are no more."""
    while step := list(itertools.islice(windows, world)):
        yield step[rank] if rank < len(step) else []


def _told_apart(store: "Store", entry: Entry, known: set[str], seen: set[str]) -> Entry:
    """An entry of a file under an id that no other file has: with as many folders as it takes."""
    assert entry.file is not None
    id = entry.id
    for folder in entry.file.resolve().parents:
        is_known = id in known and _is_other(_kept_of(store, id), entry, "file")
        if not is_known and id not in seen:
            break
        id = f"{folder.name}/{id}"
    return replace(entry, id=id)


def _kept_of(store: "Store", id: str) -> dict[str, Any]:
    return store.metadata(store.rows_of([id]))[0]


def _is_other(stored: dict[str, Any], entry: Entry, *names: str) -> bool:
    """Whether what is stored differs from an entry, in what both know."""
    given = entry.metadata
    return any(name in stored and stored[name] != given.get(name) for name in names)


@dataclass(frozen=True)
class Prepare:
    """Reads a window's items and prepares them; runs in this process or in a worker.

    Args:
        process: of the model.
        side: of the items.
        chunk_tokens: see `Pace`.
        skip_bad: leave out what cannot be read, instead of raising a UserError.
        previews: make them.
    """

    process: Preparer
    side: Side
    chunk_tokens: int
    skip_bad: bool
    previews: bool

    def __call__(self, entries: list[Entry]) -> Prepared:
        """The window; its `about` is a `Part`."""
        part, items = Part(), []
        for entry in entries:
            try:
                item = entry.load()
                picture = item.load_image()
            except UserError as error:
                if not self.skip_bad:
                    raise UserError(f"item {entry.id!r}: {error}") from error
                part.skipped.append((entry.id, str(error)))
                continue
            items.append(replace(item, image=picture))
            part.ids.append(entry.id)
            part.metadata.append(entry.metadata)
            small = small_jpeg(picture, PREVIEW_PIXELS, 85) if self.previews and picture else None
            part.previews.append(small)
        return self.process.prepared(items, self.side, self.chunk_tokens, part)


def _sample(progress: Progress, part: Part) -> None:
    held = sum(len(ids) for ids, _ in progress.sample)
    size = part.embeddings[:1].numel() * 4
    room = min(SAMPLE_ITEMS, SAMPLE_BYTES // max(1, size)) - held
    if room > 0 and part.ids:
        progress.sample.append((part.ids[:room], part.embeddings[:room]))


def _ranks_here() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
