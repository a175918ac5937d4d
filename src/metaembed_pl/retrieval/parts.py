"""A store embedded in parts, by independent processes, and then merged.

    metaembed-pl embed --model M --items things.jsonl --part 3/8 --store parts/3
    metaembed-pl store merge parts/* --out shelf

A part is a store of its own, with one of N consecutive ranges of the windows that a single process
would encode. So the merged store is bit-identical to one embedded by a single process.
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from metaembed_pl.errors import UserError
from metaembed_pl.files import new_folder, read_json_object, write_text
from metaembed_pl.retrieval.embedding import PartOf
from metaembed_pl.retrieval.manifest import Manifest
from metaembed_pl.retrieval.projection import PROJECTION_FILE
from metaembed_pl.retrieval.store import Store
from metaembed_pl.retrieval.writing import begin_store, copy_items

PART_FILE = "part.json"


@dataclass(frozen=True)
class PartNote:
    """The description of a part, in a file beside its store.

    Args:
        part: such as `3/8`.
        items: number of items of all parts, including duplicates.
        batch_size: of the windows, see `Pace`.
        done: the part is complete.
    """

    part: str
    items: int
    batch_size: int
    done: bool = False

    @classmethod
    def read(cls, folder: Path) -> "PartNote":
        """Read the description in a folder.

        Raises:
            UserError: the folder is not a part of a store.
        """
        if not (folder / PART_FILE).is_file():
            raise UserError(
                f"{folder} is not a part of a store: it has no {PART_FILE}; make one with "
                "`embed --part I/N`"
            )
        try:
            found = cls(**read_json_object(folder / PART_FILE))
            PartOf.parse(found.part)
        except (TypeError, UserError) as error:
            raise UserError(f"{folder / PART_FILE} is malformed: {error}") from error
        return found

    def write(self, folder: Path) -> None:
        """Write it beside a store."""
        write_text(folder / PART_FILE, json.dumps(asdict(self), indent=2) + "\n")


def begin(store: Store, note: PartNote) -> None:
    """Mark a store as a part; if it is one already, check that it is the same.

    Raises:
        UserError: the store is another part, not a part at all, or of other items.
    """
    if not (store.folder / PART_FILE).is_file():
        if len(store):
            raise UserError(
                f"{store.folder} has items but is not a part: give part {note.part} a --store of "
                "its own"
            )
        note.write(store.folder)
        return
    known = PartNote.read(store.folder)
    if replace(known, done=False) != note:
        raise UserError(
            f"{store.folder} is part {known.part} of {known.items:,} items in batches of "
            f"{known.batch_size}, not part {note.part} of {note.items:,} in batches of "
            f"{note.batch_size}: give it another --store"
        )


def merge(folders: Sequence[Path], out: Path) -> Store:
    """Merge all parts into one store, in the order of the items; the first of equal ids is kept.

    Args:
        folders: of the parts, in any order.
        out: must not exist, or be empty.

    Raises:
        UserError: a part is missing, incomplete, given twice, or unlike the others.
    """
    stores = _ordered(folders)
    first = stores[0].description
    for store in stores[1:]:
        _refuse_unlike(store, stores[0])
    new = Manifest(first.identity, first.groups, first.width, first.dtype, widths=first.widths)
    projection = stores[0].folder / PROJECTION_FILE
    content = None if first.projection is None else projection.read_bytes()
    with new_folder(out) as temporary:
        data, new = begin_store(temporary, new, content)
        seen: set[str] = set()
        for store in stores:
            snapshot = store.snapshot()
            is_first = torch.tensor([id not in seen for id in snapshot.ids], dtype=torch.bool)
            seen.update(snapshot.ids)
            new = copy_items(data, new, snapshot, snapshot.places[is_first])
        replace(new, generation=len(stores)).write(temporary)
    return Store.open(out)


def _ordered(folders: Sequence[Path]) -> list[Store]:
    """The stores of all parts, by number; refuses missing, incomplete and repeated parts."""
    notes = {folder: PartNote.read(folder) for folder in folders}
    parts = {folder: PartOf.parse(note.part) for folder, note in notes.items()}
    # Another batch size cuts the items at other places.
    kinds = {
        folder: f"of {part.of} parts of {notes[folder].items:,} items in batches of "
        f"{notes[folder].batch_size}"
        for folder, part in parts.items()
    }
    if len(set(kinds.values())) > 1:
        some = "; ".join(f"{folder} is one {kind}" for folder, kind in kinds.items())
        raise UserError(f"these are not parts of one store: {some}")
    of = next(iter(parts.values())).of
    given = Counter(part.number for part in parts.values())
    missing = [f"{number}/{of}" for number in range(1, of + 1) if number not in given]
    twice = [f"{number}/{of}" for number, count in given.items() if count > 1]
    if missing or twice:
        problem = f"missing: part {', '.join(missing)}" if missing else f"twice: part {twice[0]}"
        raise UserError(f"{problem}; expected each of 1/{of} to {of}/{of} exactly once")
    for folder, note in notes.items():
        if not note.done:
            raise UserError(
                f"part {note.part} in {folder} is not complete: run its `embed` command again, "
                "which resumes"
            )
    return [Store.open(folder) for folder in sorted(parts, key=lambda f: parts[f].number)]


def _refuse_unlike(store: Store, first: Store) -> None:
    for name in ("identity", "groups", "width", "dtype", "projection"):
        mine, others = getattr(store.description, name), getattr(first.description, name)
        if mine != others:
            hint = (
                "; a projection is learned anew for each part, from the same items, and other "
                "machines round otherwise: embed all parts on one kind of machine"
                if name == "projection"
                else ""
            )
            raise UserError(
                f"{store.folder} has {name} {mine!s:.40}, {first.folder} has {others!s:.40}: parts "
                f"of one store are embedded by one model, with the same flags{hint}"
            )
