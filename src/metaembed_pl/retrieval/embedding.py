"""From items to a store: encoded in batches and committed batch by batch, on one process or many.

What is in the store already is not encoded again, so a run that was killed goes on where it was:
the batch in flight is all that is lost. On several ranks (torchrun) each encodes its share of every
step, and rank 0 writes: every item once, in order, as one process would.
"""

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, several
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.identity import identity_of
from metaembed_pl.picture import small_jpeg
from metaembed_pl.retrieval.calibration import spread
from metaembed_pl.retrieval.projection import Projection, check_width
from metaembed_pl.retrieval.searchable import Searchable
from metaembed_pl.retrieval.store import Store, is_empty

PREVIEW_PIXELS = 320
SAMPLE_ITEMS = 512
SAMPLE_BYTES = 2**27
LEARNED_FROM = 512
"""Items that teach a projection."""
LEARNED_AT_A_TIME = 32
T = TypeVar("T")


@dataclass(frozen=True)
class Entry:
    """An item that may be embedded: its picture is read or drawn only when it is.

    Args:
        id: of the item in the store.
        load: gives the item.
        metadata: what the store keeps beside it.
        file: that the item is, or is a part of.
    """

    id: str
    load: Callable[[], Item]
    metadata: dict[str, Any] = field(default_factory=dict)
    file: Path | None = None

    @classmethod
    def of(cls, item: "Entry | Item | str | dict") -> "Entry":
        """What a caller brings, with what a result shows of it as metadata."""
        if isinstance(item, Entry):
            return item
        parsed = Item.parse(item)
        return cls(parsed.uid, lambda: parsed, shown(parsed))


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


def open_for(
    model: MetaEmbedder,
    folder: str | Path,
    dtype: str | None = None,
    width: int | None = None,
    items: Iterable["Entry | Item | str | dict"] = (),
    skip_bad: bool = False,
) -> Store:
    """The store of a model: opened where it is there, made, by rank 0, where it is not.

    Args:
        model: whose vectors it holds.
        folder: of the store.
        dtype: of a store that is made; None: bf16.
        width: of the vectors of a store that is made; None: the model's.
        items: that will be embedded; some of them teach the projection to a smaller width.
        skip_bad: learn without items that cannot be read, instead of stopping.

    Raises:
        UserError: it holds another model's vectors, has another dtype or width than asked for, or
            there are too few items to learn from.
    """
    rank, world = rank_and_world()
    if rank == 0 and (not Path(folder).exists() or is_empty(Path(folder))):
        projection = None
        if width not in (None, model.width):
            check_width(width, model.width)
            projection = Projection.learn(_lesson(model, items, skip_bad), width)
        identity = identity_of(model)
        Store.create(folder, model.groups, model.width, identity, dtype or "bf16", projection)
    if world > 1:
        dist.barrier()
    store = Store.open(folder)
    check_model(store, model)
    if dtype not in (None, store.dtype):
        raise UserError(f"{folder} stores {store.dtype}, not {dtype}: leave the dtype out")
    if width not in (None, store.width):
        raise UserError(
            f"{folder} stores vectors of width {store.width}, not {width}: leave the width out"
        )
    return store


def _lesson(
    model: MetaEmbedder, items: Iterable["Entry | Item | str | dict"], skip_bad: bool
) -> Iterator[Float[Tensor, "_ R D"]]:
    """The vectors that a projection is learned from: of items all over, which may be sorted."""
    if not isinstance(items, Sized):
        raise UserError(
            "a projection is learned from items all over, which are then embedded with the others: "
            "give a list of items, or what has a length and can be read twice"
        )
    chosen = set(spread(len(items), LEARNED_FROM).tolist())
    entries = (Entry.of(item) for number, item in enumerate(items) if number in chosen)
    while some := list(itertools.islice(entries, LEARNED_AT_A_TIME)):
        yield _encode(model, some, skip_bad, previews=False).embeddings


def check_model(store: Searchable, model: MetaEmbedder) -> None:
    """Refuse a model other than that whose vectors a store or collection holds.

    Raises:
        UserError: it is another one.
    """
    identity = identity_of(model)
    if identity != store.identity:
        raise UserError(
            f"{store.folder} holds the vectors of another model (identity {store.identity:.12}, "
            f"this model's is {identity:.12}): use the model it was embedded with, or embed the "
            "items again into another store"
        )


def embed(
    store: Store,
    model: MetaEmbedder,
    items: Iterable["Entry | Item | str | dict"],
    batch_size: int = 32,
    *,
    again: bool = False,
    skip_bad: bool = False,
    previews: bool = True,
) -> Iterator[Progress]:
    """Embed items into a store, as candidates; what it yields after each step says how far it is.

    Args:
        store: of this model.
        model: encodes.
        items: in the order of the store; of an id that comes twice the first is embedded.
        batch_size: items that are encoded and committed at a time, on each rank.
        again: embed also what is there already, and replace it.
        skip_bad: leave out items that cannot be read, instead of stopping.
        previews: keep a small JPEG of each picture in the store.

    Yields:
        The same object each time.

    Raises:
        UserError: the store is another model's, or an item cannot be read.
    """
    if batch_size < 1:
        raise UserError(f"batch_size must be at least 1, got {batch_size}")
    check_model(store, model)
    rank, world = rank_and_world()
    progress = Progress()
    with store.writing() if rank == 0 else nullcontext():
        new = _new_entries(store, items, again, progress)
        while step := list(itertools.islice(new, world * batch_size)):
            share = step[rank * batch_size : (rank + 1) * batch_size]
            for part in gathered(_encode(model, share, skip_bad, previews)):
                progress.skipped += part.skipped
                store.add(part.ids, part.embeddings, part.metadata, part.previews)
                _sample(progress, part)
                progress.embedded += len(part.ids)
            yield progress
    yield progress


@dataclass
class _Part:
    """What a rank encoded in a step."""

    ids: list[str]
    metadata: list[dict[str, Any]]
    previews: list[bytes | None]
    embeddings: Tensor
    skipped: list[str]


def _new_entries(
    store: Store, items: Iterable["Entry | Item | str | dict"], again: bool, progress: Progress
) -> Iterator[Entry]:
    known, seen = set(store.ids), set()
    for item in several(items, "items"):
        entry = Entry.of(item)
        progress.seen += 1
        if entry.file is not None:
            with suppress(OSError):  # gone meanwhile: told when it is its turn
                stat = entry.file.stat()
                entry.metadata["file_stamp"] = f"{stat.st_size} bytes, {stat.st_mtime_ns} ns"
            entry = _told_apart(store, entry, known, seen)
        if entry.id in seen:
            continue
        seen.add(entry.id)
        stored = _kept_of(store, entry.id) if entry.id in known and not again else None
        if stored is None or (entry.file is not None and _is_other(stored, entry, "file_stamp")):
            yield entry
        elif entry.file is None and _is_other(stored, entry, "text", "image"):
            progress.changed.append(entry.id)


def _told_apart(store: Store, entry: Entry, known: set[str], seen: set[str]) -> Entry:
    """An entry of a file under an id that no other file has: with as many folders as it takes."""
    assert entry.file is not None
    id = entry.id
    for folder in entry.file.resolve().parents:
        is_known = id in known and _is_other(_kept_of(store, id), entry, "file")
        if not is_known and id not in seen:
            break
        id = f"{folder.name}/{id}"
    return replace(entry, id=id)


def _kept_of(store: Store, id: str) -> dict[str, Any]:
    return store.metadata(store.rows_of([id]))[0]


def _is_other(stored: dict[str, Any], entry: Entry, *names: str) -> bool:
    """Whether what is stored differs from an entry, in what both know."""
    told = entry.metadata
    return any(name in stored and stored[name] != told.get(name) for name in names)


def _encode(model: MetaEmbedder, entries: list[Entry], skip_bad: bool, previews: bool) -> _Part:
    part = _Part([], [], [], torch.empty(0, model.groups[-1].r_c, model.width), [])
    items = []
    for entry in entries:
        try:
            item = entry.load()
            picture = item.load_image()
        except UserError as error:
            if not skip_bad:
                raise UserError(f"item {entry.id!r}: {error}") from error
            part.skipped.append(f"{entry.id}: {error}")
            continue
        items.append(replace(item, image=picture))
        part.ids.append(entry.id)
        part.metadata.append(entry.metadata)
        part.previews.append(
            small_jpeg(picture, PREVIEW_PIXELS, 85) if previews and picture else None
        )
    if items:
        part.embeddings = model.encode_candidate(items, len(items))
    return part


def _sample(progress: Progress, part: _Part) -> None:
    held = sum(len(ids) for ids, _ in progress.sample)
    size = part.embeddings[:1].numel() * 4
    room = min(SAMPLE_ITEMS, SAMPLE_BYTES // max(1, size)) - held
    if room > 0 and part.ids:
        progress.sample.append((part.ids[:room], part.embeddings[:room]))


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) outside torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gathered(part: T) -> list[T]:
    """What all ranks give, in order, on rank 0; nothing on the others."""
    rank, world = rank_and_world()
    if world == 1:
        return [part]
    parts: list[Any] | None = None if rank else [None] * world
    dist.gather_object(part, parts)
    return parts or []


@contextmanager
def ranks() -> Iterator[tuple[int, int]]:
    """Lets the ranks that torchrun started, if it did, talk to each other; `rank_and_world`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    # What is sent is on the CPU: embeddings on their way to the disk.
    dist.init_process_group("gloo")
    try:
        yield rank_and_world()
    finally:
        dist.destroy_process_group()
