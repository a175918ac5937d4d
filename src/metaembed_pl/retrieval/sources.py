"""Sources of items: JSON Lines, Parquet, shards, PDFs, a folder of pictures and PDFs.

A source knows its number of items and yields them one by one. Pictures are decoded and pages
rendered only when they are embedded, so a source may be larger than memory.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from metaembed_pl.data import tables
from metaembed_pl.data.fetch import Fetch
from metaembed_pl.data.remote import address_below, is_remote, kept_copy, read_bytes
from metaembed_pl.errors import BadSample, Unreachable, UserError
from metaembed_pl.item import ITEM_KEYS, Item, check_unique, read_json_lines
from metaembed_pl.picture import MAX_PIXELS, files_below, is_picture
from metaembed_pl.retrieval.embedding import Entry, metadata_of
from metaembed_pl.retrieval.rows import metadata_text

PDF_SUFFIX = ".pdf"
ITEM_COLUMNS = ("text", "image", "id", "instruction")
PDF_SCALE = 2.0
"""Pixels a point: 144 a inch, an A4 page of 1190 x 1684."""


@dataclass(frozen=True)
class ItemSource:
    """Items to embed.

    Args:
        total: their number, including duplicates.
        entries: returns a new iterator over them.
        takes: the arguments of `open_source` that this form of items has a use for.
    """

    total: int
    entries: Callable[[], Iterator[Entry]]
    takes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Entry]:
        return self.entries()


def open_source(
    path: Path | str, columns: Mapping[str, str] | None = None, fetch: Fetch | None = None
) -> ItemSource:
    """The items at a path or an address.

    An item is a line of JSON Lines, which may have an object `metadata`, a positive of shards, a
    page of a PDF, or a row of Parquet.

    Args:
        path: a file or a folder; for JSON Lines, Parquet and shards also an address that fsspec
            reads, such as `s3://bucket/pages`.
        columns: columns of Parquet for `text`, `image`, `id` and `instruction`; None: the columns
            of these names. Other columns are metadata, except `id`.
        fetch: fetches pictures that items name by an address; None: they are refused.

    Raises:
        UserError: there is nothing to embed, or items of this form have no columns or addresses.
    """
    find = _at_address if is_remote(path) else _on_disk
    source = find(str(path), columns, fetch)
    if columns and "columns" not in source.takes:
        raise UserError(f"{path} is not Parquet: only its items can have columns chosen for them")
    if fetch and "fetch" not in source.takes:
        raise UserError(f"{path} has no addresses of pictures to fetch: leave out --fetch-images")
    return source


def _on_disk(where: str, columns: Mapping[str, str] | None, fetch: Fetch | None) -> ItemSource:
    path = Path(where)
    suffix = path.suffix.lower()
    if suffix == PDF_SUFFIX and path.is_file():
        return _files(path.parent, [path])
    if suffix == tables.SUFFIX and path.is_file():
        return _table(tables.Table.open(path), columns, fetch)
    if not path.is_dir():
        return _json_lines(path, path.parent, fetch)
    if any(path.glob("*.tar")):
        return _shards(path)
    if any(path.rglob(f"*{tables.SUFFIX}")):
        return _table(tables.Table.open(path), columns, fetch)
    files = files_below(path, lambda file: file.suffix.lower() == PDF_SUFFIX or is_picture(file))
    if not files:
        deeper = next(path.rglob("*.tar"), None)
        hint = f"; choose one folder of shards, such as {deeper.parent}" if deeper else ""
        raise UserError(f"{path} holds no pictures and no PDFs{hint}")
    return _files(path, files)


def _at_address(url: str, columns: Mapping[str, str] | None, fetch: Fetch | None) -> ItemSource:
    name = url.rpartition("/")[2]
    if name.endswith((".jsonl", ".json")):
        return _json_lines(kept_copy(url), url.rpartition("/")[0], fetch)
    if tables.SUFFIX in name or "*" in url:
        return _table(tables.Table.open(url), columns, fetch)
    try:
        return _shards(url)
    except Unreachable:  # no manifest: not shards
        if url.startswith(("http://", "https://")):
            raise  # folders cannot be listed
    return _table(tables.Table.open(url), columns, fetch)


def _table(
    table: tables.Table, columns: Mapping[str, str] | None, fetch: Fetch | None
) -> ItemSource:
    chosen = _item_columns(table, columns)
    others = [field.name for field in table.schema if _is_plain(field.type)]
    metadata = [name for name in others if name not in chosen.values()]

    def entries() -> Iterator[Entry]:
        for where, row in table.rows([*chosen.values(), *metadata]):
            given = {key: tables.picture_bytes(row[name]) for key, name in chosen.items()}
            known = {name: row[name] for name in metadata if _is_known(row[name])}
            file = where.rpartition(":")[0]
            folder = file.rpartition("/")[0] if is_remote(file) else Path(file).parent
            value = {key: v for key, v in given.items() if v not in (None, "", b"")}
            yield _of_json(where, {**value, "metadata": known}, folder, fetch)

    return ItemSource(table.num_rows, entries, ("columns", "fetch"))


def _item_columns(table: tables.Table, columns: Mapping[str, str] | None) -> dict[str, str]:
    """The column for each key of an item."""
    kept = {"id"} - set(columns.values()) if columns else ITEM_COLUMNS
    chosen = {key: key for key in kept if key in table.columns} | dict(columns or {})
    for key, name in chosen.items():
        if key not in ITEM_COLUMNS:
            raise UserError(
                f"an item has no {key!r} to take from a column: expected one of "
                f"{', '.join(ITEM_COLUMNS)}"
            )
        if name not in table.columns:
            raise UserError(
                f"{table.files[0]} has no column {name!r}; it has {', '.join(table.columns)}"
            )
    if not chosen.keys() & {"text", "image"}:
        raise UserError(
            f"{table.files[0]} has the columns {', '.join(table.columns)}: say which is an item's "
            "text or image, as in `embed --columns text=caption,image=picture`"
        )
    return chosen


def _is_plain(kind: pa.DataType) -> bool:
    """Whether metadata can have values of this type."""
    types = pa.types
    is_text = types.is_string(kind) or types.is_large_string(kind)
    return is_text or types.is_boolean(kind) or types.is_integer(kind) or types.is_floating(kind)


def _is_known(value: Any) -> bool:
    """Whether a table has a value: tables also write NaN where there is none."""
    return value is not None and not (isinstance(value, float) and not math.isfinite(value))


def _json_lines(path: Path, base: Path | str, fetch: Fetch | None) -> ItemSource:
    total = sum(1 for _ in read_json_lines(path))
    if not total:
        raise UserError(f"{path} contains no items: expected one JSON object or string per line")

    def entries() -> Iterator[Entry]:
        lines: dict[str, int] = {}
        for number, value in read_json_lines(path):
            entry = _of_json(f"{path}:{number}", value, base, fetch)
            if isinstance(value, dict) and value.get("id") is not None:
                try:
                    check_unique(entry.id, number, lines)
                except UserError as error:
                    raise UserError(f"{path}:{number}: {error}") from error
            yield entry

    return ItemSource(total, entries, ("fetch",))


def _of_json(where: str, value: Any, base: Path | str, fetch: Fetch | None) -> Entry:
    """The entry of a line or a row, as JSON, except that a picture may be bytes.

    Args:
        where: its file and its number there, which stand for the id if it is no item.
        value: of the line or row.
        base: paths of pictures are relative to this folder or address.
        fetch: see `open_source`.
    """
    try:
        return _parsed(value, base, fetch)
    except UserError as error:
        image = value.get("image") if isinstance(value, dict) else None
        is_address = isinstance(image, str) and is_remote(image)
        if is_address and fetch is None and isinstance(base, Path):
            raise UserError(f"{where}: {error}") from error  # a flag is missing, not this item
        return Entry.unreadable(where, error)


def _parsed(value: Any, base: Path | str, fetch: Fetch | None) -> Entry:
    metadata: Any = {}
    if isinstance(value, dict):
        value = dict(value)
        metadata = value.pop("metadata", None) or {}
        metadata_text(metadata)  # refuses what a store cannot hold
        if others := [key for key in value if key not in ITEM_KEYS]:
            raise UserError(
                f"an item has unknown key {others[0]!r}; known are {', '.join(ITEM_KEYS)}, and "
                f"metadata for your own: {{'metadata': {{{others[0]!r}: ...}}}}"
            )
        if isinstance(image := value.get("image"), str):
            is_address = is_remote(image) and fetch is not None
            if is_address or isinstance(base, str):
                url = image if is_address else address_below(str(base), image)
                # Read when it is encoded; the address serves as the id.
                known = {**value, "image": b"not read yet", "id": value.get("id") or url}
                item = Item.parse(known)
                read: Any = fetch if is_address else read_bytes
                load = partial(_with_picture, item, read, url)
                return Entry(item.uid, load, {**metadata_of(item), "image": url, **metadata})
    item = Item.parse(value, base if isinstance(base, Path) else None)
    return Entry.given(item.uid, item, metadata_of(item) | metadata)


def _with_picture(item: Item, read: Callable[[str], bytes], url: str) -> Item:
    return replace(item, image=read(url))


def _shards(folder: Path | str) -> ItemSource:
    from metaembed_pl.data.shards import ShardedPairs

    pairs = ShardedPairs(folder)

    def entries() -> Iterator[Entry]:
        for i in range(len(pairs)):
            try:
                pair = pairs[i]
            except BadSample as error:
                yield Entry.unreadable("/".join(pairs.locate(i)), error)
                continue
            item = pair.positive
            query = {} if pair.query.text is None else {"asked_as": pair.query.text}
            yield Entry.given(item.uid, item, metadata_of(item) | query)

    return ItemSource(len(pairs), entries)


def _files(folder: Path, files: list[Path]) -> ItemSource:
    pdfs = (file for file in files if file.suffix.lower() == PDF_SUFFIX)
    # An unreadable PDF counts as one page, whose error is raised when it is encoded.
    pages = {file: max(1, _num_pages(file)) for file in pdfs}

    def entries() -> Iterator[Entry]:
        for file in files:
            name, where = file.relative_to(folder).as_posix(), {"file": str(file.resolve())}
            if file not in pages:
                yield Entry(name, partial(Item, image=file), where, file)
            for page in range(1, pages.get(file, 0) + 1):
                load = partial(draw_page, file, page)
                yield Entry(f"{name}#page={page}", load, where | {"page": page}, file)

    return ItemSource(sum(pages.get(file, 1) for file in files), entries)


def _num_pages(file: Path) -> int:
    """Pages of a PDF; 0 if it cannot be opened."""
    pdfium = _pdfium(file)
    try:
        with pdfium.PdfDocument(file) as document:
            return len(document)
    except (pdfium.PdfiumError, OSError):
        return 0


def draw_page(file: Path, page: int) -> Item:
    """Render a page of a PDF, counted from 1.

    Raises:
        UserError: the page does not exist, is too large, or cannot be rendered.
    """
    pdfium = _pdfium(file)
    try:
        with pdfium.PdfDocument(file) as document:
            sheet = document[page - 1]
            pixels = sheet.get_width() * sheet.get_height() * PDF_SCALE**2
            if pixels > MAX_PIXELS:
                raise UserError(f"{pixels:,.0f} pixels; at most {MAX_PIXELS:,} can be rendered")
            return Item(image=sheet.render(scale=PDF_SCALE).to_pil())
    except (pdfium.PdfiumError, UserError, OSError, IndexError) as error:
        raise UserError(f"page {page} of {file} cannot be rendered: {error}") from error


def _pdfium(file: Path) -> Any:
    try:
        import pypdfium2
    except ImportError as error:
        raise UserError(f"{file}: PDFs need pypdfium2: pip install 'metaembed-pl[pdf]'") from error
    return pypdfium2
