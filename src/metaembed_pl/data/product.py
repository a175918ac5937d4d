"""Shards from drafts: checked in processes, written in order, with a data card.

*Drafts* are pairs as JSON has them, whose pictures may be paths, bytes or `Readable`:

    {"id": "CIRR:17", "query": {"text": "with a hat", "image": Named(...)}, "positive": {...}}

Worker processes read and decode them. Pairs that cannot be used are dropped and counted; a bad hard
negative is dropped alone. The rest is written to shards, in order. A killed run resumes after its
last complete shard, and finished products are not made again.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from metaembed_pl.data.parallel import count_cores, in_order
from metaembed_pl.data.shard_index import MANIFEST_FILE, sha256_of
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.errors import UserError
from metaembed_pl.files import write_text
from metaembed_pl.item import Item, Pair, stable_hash
from metaembed_pl.progress import with_progress

Draft = dict[str, Any]
BUCKETS = 1000  # the share held out has steps of a thousandth
JUDGED_FROM = 1000  # pairs; with fewer, the share of dropped ones means little
SHOWN = 5  # dropped pairs that are named
REMEMBERED = 200_000  # digests of pictures that a process has decoded
_DECODED: set[bytes] = set()


@runtime_checkable
class Readable(Protocol):
    """A picture that is read when its draft is checked."""

    def read(self) -> bytes:
        """The encoded picture."""
        ...


@dataclass(frozen=True)
class Product:
    """A folder of shards with a data card, written atomically.

    Args:
        name: of the source, in metrics and logs.
        folder: the output folder.
        drafts: iterates over the drafts; each call gives the same ones.
        source: origin of the data.
        held_out: share of the candidates (or of the drafts' `held_out_by`) that goes to `test/`
            instead of `train/`; None writes shards into `folder` itself.
        settings: everything that determines the pairs.
        licence: for manifest and card, like the next two.
        attribution: whom to name.
        note: anything else.
    """

    name: str
    folder: Path
    drafts: Callable[[], Iterable[Draft]]
    source: str
    held_out: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    attribution: str = ""
    note: str = ""

    @property
    def splits(self) -> dict[str, Path]:
        """Folders of shards by split; without a split, the key is empty."""
        if self.held_out is None:
            return {"": self.folder}
        names = ("train", "test") if self.held_out else ("train",)
        return {name: self.folder / name for name in names}


@dataclass(frozen=True)
class Making:
    """How shards are made.

    Args:
        command: for the card.
        limit: use only the first so many rows.
        num_workers: processes that decode.
        max_dropped: share of the pairs that may be dropped.
        licence: for manifest and card, instead of the product's own.
        force: replace existing shards.
    """

    command: str
    limit: int | None = None
    num_workers: int = field(default_factory=count_cores)
    max_dropped: float = 0.01
    licence: str | None = None
    force: bool = False


@dataclass(frozen=True)
class Made:
    """The shards of a product.

    Args:
        splits: by name; without a split, the name is empty.
        is_new: they were written now.
    """

    splits: dict[str, ShardedPairs]
    is_new: bool

    @property
    def dropped(self) -> Counter[str]:
        """Counts of dropped pairs, by reason."""
        return _total(self.splits, "dropped")


def make(product: Product, how: Making) -> Made:
    """Write a product unless it is there already, and its card.

    Raises:
        UserError: the folder must not be overwritten, too many pairs were dropped, or a split has
            no pairs.
    """
    settings = {**product.settings, "limit": how.limit}
    is_new = how.force or not all(_is_made(path, settings) for path in product.splits.values())
    if is_new:
        _write(product, settings, how)
    made = {split: ShardedPairs(path) for split, path in product.splits.items()}
    write_text(product.folder / "README.md", _card(product, made))
    return Made(made, is_new)


@dataclass(frozen=True)
class Checked:
    """The result of checking a draft.

    Args:
        id: of the draft.
        pair: None if it cannot be used, or belongs to another split.
        dropped: the reason why it cannot be used.
        left_out: the reasons why some of its hard negatives cannot be used.
    """

    id: str
    pair: Pair | None = None
    dropped: str | None = None
    left_out: tuple[str, ...] = ()


def check(draft: Draft, held_out: float | None = None, split: str = "") -> Checked:
    """Read and decode a draft.

    Args:
        draft: a pair as in JSON; pictures may be `Readable`, items may be `Item`. Its `held_out_by`
            determines the split, if given, instead of its candidate.
        held_out: share of the candidates in the test split; None: there are no splits.
        split: `train` or `test`; empty without splits.
    """
    draft, left_out = dict(draft), []
    id, owner = str(draft["id"]), draft.pop("held_out_by", None)
    try:
        if owner is not None and held_out and is_held_out(owner, held_out) != (split == "test"):
            return Checked(id)
        positive = loaded(draft["positive"], "positive")
        if owner is not None:
            held_out = None
        elif held_out and is_held_out(positive.uid, held_out) != (split == "test"):
            return Checked(id)
        query = loaded(draft["query"], "query")
        for item in (query, positive):
            check_picture(item)
        negatives = []
        for value in draft.get("negatives") or ():
            try:
                negatives.append(_negative(value, positive, held_out if split == "train" else None))
            except UserError as error:
                left_out.append(str(error))
        draft = {**draft, "id": id, "query": query, "positive": positive, "negatives": negatives}
        return Checked(id, Pair.parse(draft), left_out=tuple(left_out))
    except UserError as error:
        return Checked(id, dropped=str(error))


def is_held_out(uid: str, share: float) -> bool:
    """Whether a candidate is in the test split, by its uid: its id, or else its content."""
    return stable_hash(uid) % BUCKETS < share * BUCKETS


def check_picture(item: Item) -> None:
    """Decode an item's picture, unless this process has decoded it before.

    Raises:
        UserError: it does not decode, or is too large.
    """
    if item.image is None:
        return
    digest = hashlib.sha256(item.image_content()).digest()
    if digest not in _DECODED:
        item.load_image()
        if len(_DECODED) >= REMEMBERED:
            _DECODED.clear()
        _DECODED.add(digest)


def kind_of(reason: str) -> str:
    """A reason without its details, to count by.

    >>> kind_of("picture not found: a.png"), kind_of("the image does not decode (cut): expected")
    ('picture not found', 'the image does not decode')
    """
    return re.split(r"[:(;]", reason, maxsplit=1)[0].strip()


def _is_made(folder: Path, settings: dict[str, Any]) -> bool:
    try:
        manifest = ShardedPairs(folder).manifest
    except UserError:
        return False
    return "record" in manifest and manifest.get("settings") == settings


def _write(product: Product, settings: dict[str, Any], how: Making) -> None:
    card = product.folder / "README.md"
    if card.exists() and not any(path.is_dir() for path in product.splits.values()):
        raise UserError(
            f"{card} exists already and was not written by this script: choose another --out"
        )
    writers = {
        split: ShardWriter(
            path,
            product.name,
            licence=product.licence if how.licence is None else how.licence,
            attribution=product.attribution,
            source=product.source,
            note=product.note,
            settings=settings,
            overwrite=how.force,
            resume=not how.force,
        )
        for split, path in product.splits.items()
    }
    with ExitStack() as stack:
        for split, writer in writers.items():
            stack.enter_context(writer)
            if not writer.record:
                writer.record = {"command": "", "rows": 0, "dropped": {}, "left_out": {}}
            writer.record["command"] = how.command
            _fill(writer, product, split, how)
        # Before any folder gets its name.
        _judge(writers.values(), how.max_dropped)
        for split, writer in writers.items():
            if not writer.num_pairs:
                rows = writer.record["rows"]
                raise UserError(
                    f"{product.name}: none of {rows:,} rows produced a pair: is --from right?"
                    if product.held_out is None
                    else f"no pair fell to {split} with --held-out {product.held_out} of {rows:,} "
                    "pairs: change the share, or add candidates"
                )


def _fill(writer: ShardWriter, product: Product, split: str, how: Making) -> None:
    record = writer.record
    done = record["rows"]
    drafts = islice(product.drafts(), done, how.limit)
    function = partial(check, held_out=product.held_out, split=split)
    checked = in_order(function, drafts, how.num_workers)
    what = f"{product.name} {split}".strip()
    for result in with_progress(checked, what, how.limit, done=done, things="rows"):
        record["rows"] += 1
        for reason in result.left_out:
            _count(record["left_out"], reason)
        if result.dropped is not None:
            if sum(record["dropped"].values()) < SHOWN:
                print(f"dropped {result.id}: {result.dropped}", file=sys.stderr)
            _count(record["dropped"], result.dropped)
            _judge([writer], how.max_dropped, at_least=JUDGED_FROM)
        elif result.pair is not None:
            writer.write(result.pair)


def _count(counts: dict[str, int], reason: str) -> None:
    kind = kind_of(reason)
    counts[kind] = counts.get(kind, 0) + 1


def _judge(writers: Iterable[ShardWriter], max_dropped: float, at_least: int = 0) -> None:
    """Stop if too many pairs were dropped.

    Raises:
        UserError: more than the share `max_dropped` of the pairs, counted as `at_least` so many.
    """
    writers = list(writers)
    reasons = Counter()
    for writer in writers:
        reasons.update(writer.record["dropped"])
    total = sum(writer.num_pairs for writer in writers) + reasons.total()
    if reasons.total() > max_dropped * max(total, at_least):
        raise UserError(
            f"{reasons.total()} of {total} pairs cannot be used, more than --max-dropped "
            f"{max_dropped}{listed(reasons)}"
        )


def loaded(value: Any, side: str) -> Item:
    """An item of a draft, with its picture read.

    Raises:
        UserError: it has neither text nor picture, or the picture cannot be read.
    """
    if isinstance(value, str):
        value = {"text": value}
    if isinstance(value, dict):
        value = {key: given for key, given in value.items() if given}
        if not value.keys() & {"text", "image"}:
            raise UserError(f"empty {side}")
        image = value.get("image")
        value = Item.parse(
            {**value, "image": image.read() if isinstance(image, Readable) else image}
        )
    if isinstance(value.image, Path):
        try:
            return replace(value, image=value.image.read_bytes())
        except OSError as error:
            name = value.image.name
            raise UserError(f"picture cannot be read: {name} ({error.strerror})") from error
    return value


def _negative(value: Any, positive: Item, held_out: float | None) -> Item:
    item = loaded(value, "hard negative")
    if item.uid == positive.uid:
        raise UserError("hard negative equals the positive")
    if held_out and is_held_out(item.uid, held_out):
        raise UserError("hard negative is held out")
    check_picture(item)
    return item


def _total(made: dict[str, ShardedPairs], what: str) -> Counter[str]:
    total = Counter()
    for pairs in made.values():
        total.update(pairs.manifest["record"][what])
    return total


def listed(reasons: Counter[str]) -> str:
    """Reasons with their counts, in brackets, most frequent first; empty without any."""
    if not reasons:
        return ""
    return " (" + "; ".join(f"{kind}: {count:,}" for kind, count in reasons.most_common()) + ")"


def about_lines(manifest: dict[str, Any], command: str, more: dict[str, str]) -> str:
    """The lines of a data card: what the manifest says, then `more`; empty values are left out."""
    settings = {k: value for k, value in manifest["settings"].items() if value is not None}
    about = {
        "Source": manifest["source"],
        "Licence": manifest["licence"] or "unknown: look it up before you share the data",
        "Attribution": manifest["attribution"],
        "Note": manifest["note"],
        "Settings": ", ".join(f"{key} {value}" for key, value in settings.items()),
        **more,
        "Made by": f"`{command}`",
    }
    return "".join(f"- **{key}**: {value}\n" for key, value in about.items() if value)


def _counted(reasons: Counter[str]) -> str:
    return f"{reasons.total():,}{listed(reasons)}"


def _card(product: Product, made: dict[str, ShardedPairs]) -> str:
    manifest = next(iter(made.values())).manifest
    rows = "".join(
        f"| {split or 'train'} | {len(pairs):,} | "
        f"{sum(shard['bytes'] for shard in pairs.manifest['shards']) / 1e6:,.1f} MB | "
        f"{sha256_of(Path(pairs.folder) / MANIFEST_FILE)} |\n"
        for split, pairs in made.items()
    )
    about = about_lines(
        manifest,
        manifest["record"]["command"],
        {
            "Dropped pairs": _counted(_total(made, "dropped")),
            "Hard negatives left out": _counted(_total(made, "left_out")),
        },
    )
    return f"""# {product.name}

| split | pairs | size | SHA-256 of manifest.json |
|---|---|---|---|
{rows}
{about}
`manifest.json` holds the checksum of every shard.
"""
