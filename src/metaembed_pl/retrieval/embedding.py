"""Embed items into a store: encoded and committed batch by batch, on one process or many.

Items already in the store are not encoded again, so a killed run resumes and loses only the batch
in flight. On several ranks (torchrun), each rank encodes its share of every step, and rank 0 writes
every item once, in the order in which one process would.
"""

import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
"""Items that a projection is learned from."""
ITEM_METADATA = ("text", "image", "instruction", "content_hash")
"""Metadata that show whether an id stands for another item now."""


@dataclass(frozen=True)
class Entry:
    """An item to embed; its picture is read or rendered only when it is encoded.

    Args:
        id: of the item in the store.
        load: returns the item.
        metadata: for the store.
        file: the file that the item is, or is a part of.
        is_text: the item is known to have no picture.
    """

    id: str
    load: Callable[[], Item]
    metadata: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None
    is_text: bool = False

    @classmethod
    def of(cls, item: "Entry | Item | str | dict") -> "Entry":
        """An entry of whatever callers pass, with text and picture as metadata."""
        if isinstance(item, Entry):
            return item
        parsed = Item.parse(item)
        return cls.given(parsed.uid, parsed, metadata_of(parsed))

    @classmethod
    def given(cls, id: str, item: Item, metadata: dict[str, Any] | None = None) -> "Entry":
        """An item that is in memory; its picture need not be decoded yet."""
        load = partial(Item.parse, item)  # returns it as it is
        return cls(id, load, metadata or {}, is_text=item.image is None)

    @classmethod
    def read(cls, id: str, read: Callable[[], Item]) -> "Entry":
        """Read an item now, in this process; an error is raised when the item is encoded."""
        try:
            return cls.given(id, read())
        except UserError as error:
            return cls.unreadable(id, error)

    @classmethod
    def unreadable(cls, id: str, error: UserError) -> "Entry":
        """An item that cannot be read; the error is raised when it would be encoded."""
        return cls(id, partial(_raise, error))


def _raise(error: UserError) -> Item:
    raise error


class PartOf(NamedTuple):
    """A part of the items, see parts.py: its number, from 1, and the number of parts.

    >>> PartOf.parse("2/4")
    PartOf(number=2, of=4)
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "PartOf":
        """Read a part such as `3/8`.

        Raises:
            UserError: the text is not a part.
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"expected a part such as 3/8, from 1/8 to 8/8; got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def has(self, position: int, total: int) -> bool:
        """Whether this part has the window that begins at an item."""
        return min(position, total - 1) * self.of // total == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"


@dataclass
class EmbedStatus:
    """The status of a run that embeds.

    Args:
        seen: entries looked at.
        embedded: entries that this run encoded and committed.
        skipped: unreadable entries, with the reason.
        changed: ids of items that differ from the store's in text or picture; the store's remain.
        sample: ids and vectors of the first items, as the model returned them.
    """

    seen: int = 0
    embedded: int = 0
    skipped: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    sample: list[tuple[list[str], Tensor]] = field(default_factory=list)


def metadata_of(item: Item) -> dict[str, Any]:
    """An item as metadata: its text, and the path of its picture."""
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
    """A projection of a model's vectors to a width, and the trained widths that remain usable."""
    if width in (None, model.width):
        return None, model.widths
    check_width(width, model.width)
    if width in model.widths:
        return Projection.first(model.width, width), model.widths
    return Projection.learn(_lesson(model, items, skip_bad), width), ()


def _lesson(
    model: Engine, items: Iterable["Entry | Item | str | dict"], skip_bad: bool
) -> Iterator[Float[Tensor, "_ R D"]]:
    """The vectors of items spread over a source, which may be sorted; to learn a projection."""
    if not isinstance(items, Sized):
        raise UserError(
            "a projection is learned from items spread over the source, which are read again "
            "later: give a list, or another iterable with a length"
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
) -> Iterator[EmbedStatus]:
    """Embed items into a store, as candidates.

    Args:
        store: of this model.
        model: encodes the items.
        items: in the order of the store; of items with the same id, the first is embedded.
        pace: items that each rank encodes and commits at a time; an integer N stands for N
            pictures or 8 N texts.
        again: embed items that are in the store as well, and replace them.
        skip_bad: skip items that cannot be read, instead of stopping.
        previews: store a small JPEG of each picture.
        part: embed only this part of the items, which must have a length; see parts.py.

    Yields:
        The status after each step; the same object each time.

    Raises:
        UserError: the store is another model's, or an item cannot be read.
    """
    pace = Pace(pace) if isinstance(pace, int) else pace
    store.check_model(model)
    if part is not None and not isinstance(items, Sized):
        raise UserError("a part of the items needs their number: give a list of them")
    rank, world = rank_and_world()
    status = EmbedStatus()
    prepare = Prepare(model.processor(), "candidate", pace.chunk_tokens, skip_bad, previews)
    with store.writing() if rank == 0 else nullcontext():
        windows = _new_windows(_looks(store, items, again, status), pace, part, items)
        share = _share_of(windows, rank, world)
        ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        encoded = model.encoded(share, prepare, "candidate", pace.num_workers, ranks_here)
        for window, vectors in encoded:
            window.about.embeddings = vectors
            for each in gather_objects(window.about):
                status.skipped += [f"{id}: {reason}" for id, reason in each.skipped]
                store.add(each.ids, each.embeddings, each.metadata, each.previews)
                _sample(status, each)
                status.embedded += len(each.ids)
            yield status
    yield status


@dataclass
class WindowItems:
    """The items of a window, encoded; `skipped` has ids and reasons."""

    ids: list[str] = field(default_factory=list)
    metadata: list[dict[str, Any]] = field(default_factory=list)
    previews: list[bytes | None] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    embeddings: Tensor = field(default_factory=lambda: torch.empty(0))


class _Look(NamedTuple):
    """An entry, its position among all items, and whether to embed it."""

    entry: Entry
    position: int
    is_new: bool


def _new_windows(
    looks: Iterable[_Look], pace: Pace, part: PartOf | None, items: Any
) -> Iterator[list[Entry]]:
    """The entries to embed, in windows.

    Items that are in the store already do not move the bounds of the windows, so that a resumed run
    gives the model the same windows. What is left of incomplete windows is put together.
    """
    rest: list[Entry] = []
    for window in pace.windows(looks, lambda look: look.entry.is_text):
        if part is not None and not part.has(window[0].position, len(items)):
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
    store: "Store", items: Iterable["Entry | Item | str | dict"], again: bool, status: EmbedStatus
) -> Iterator[_Look]:
    before = type(store).open(store.folder)  # as it is now, whatever is added meanwhile
    seen: set[str] = set()
    for item in several(items, "items"):
        entry = Entry.of(item)
        status.seen += 1
        if entry.file is not None:
            with suppress(OSError):  # deleted meanwhile: reported when it is read
                stat = entry.file.stat()
                entry.metadata["file_stamp"] = f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"
            entry = _with_own_id(before, entry, seen)
        if entry.id in seen:
            continue
        seen.add(entry.id)
        is_new = again or entry.id not in before
        if not is_new and entry.file is not None:
            is_new = _differs(before, entry.id, entry, "file_stamp")
        elif not is_new and _is_another(before, entry):
            status.changed.append(entry.id)
        yield _Look(entry, status.seen - 1, is_new)


def _share_of(windows: Iterator[list[Entry]], rank: int, world: int) -> Iterator[list[Entry]]:
    """A rank's windows: one of each step, empty if the step has fewer windows than ranks."""
    while step := list(itertools.islice(windows, world)):
        yield step[rank] if rank < len(step) else []


def _with_own_id(store: "Store", entry: Entry, seen: set[str]) -> Entry:
    """The entry of a file, under an id that no other file has: with as many folders as needed."""
    assert entry.file is not None
    id = entry.id
    for folder in entry.file.resolve().parents:
        if id not in seen and not (id in store and _differs(store, id, entry, "file")):
            break
        id = f"{folder.name}/{id}"
    return replace(entry, id=id)


def _differs(store: "Store", id: str, entry: Entry, name: str) -> bool:
    """Whether stored metadata differ from those of an entry; not if they lack the key."""
    (stored,) = store.metadata(store.rows_of([id]))
    return name in stored and stored[name] != entry.metadata.get(name)


def _is_another(store: "Store", entry: Entry) -> bool:
    """Whether the stored item of this id was another, if its metadata show what it was."""
    (stored,) = store.metadata(store.rows_of([entry.id]))
    before, now = ([of.get(key) for key in ITEM_METADATA] for of in (stored, entry.metadata))
    return any(before) and before != now


@dataclass(frozen=True)
class Prepare:
    """Reads the items of a window and prepares them, in this process or in a worker.

    Args:
        process: the model's.
        side: of the items.
        chunk_tokens: see `Pace`.
        skip_bad: skip items that cannot be read, instead of raising a UserError.
        previews: make previews.
    """

    process: Preparer
    side: Side
    chunk_tokens: int
    skip_bad: bool
    previews: bool

    def __call__(self, entries: list[Entry]) -> Prepared:
        """The prepared window; its `about` is a `WindowItems`."""
        window, items = WindowItems(), []
        for entry in entries:
            try:
                item = entry.load()
                picture = item.load_image()
            except UserError as error:
                if not self.skip_bad:
                    raise UserError(
                        f"item {entry.id!r}: {error}; skip it with --skip-bad (skip_bad=True)"
                    ) from error
                window.skipped.append((entry.id, str(error)))
                continue
            items.append(replace(item, image=picture))
            window.ids.append(entry.id)
            window.metadata.append(entry.metadata)
            small = small_jpeg(picture, PREVIEW_PIXELS, 85) if self.previews and picture else None
            window.previews.append(small)
        return self.process.prepared(items, self.side, self.chunk_tokens, window)


def _sample(status: EmbedStatus, window: WindowItems) -> None:
    num_sampled = sum(len(ids) for ids, _ in status.sample)
    size = window.embeddings[:1].numel() * 4
    room = min(SAMPLE_ITEMS, SAMPLE_BYTES // max(1, size)) - num_sampled
    if room > 0 and window.ids:
        status.sample.append((window.ids[:room], window.embeddings[:room]))
