"""What can be embedded: JSON Lines, shards, PDFs, a folder of pictures and PDFs.

A source knows how many items it has and gives them one by one; a picture is decoded and a page
drawn only when it is its turn to be embedded, so a source may be larger than memory.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from metaembed_pl.data.remote import is_remote
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, check_unique, read_json_lines
from metaembed_pl.picture import MAX_PIXELS, files_below, is_picture
from metaembed_pl.retrieval.embedding import Entry, shown

PDF_SUFFIX = ".pdf"
PDF_SCALE = 2.0
"""Pixels a point: 144 a inch, an A4 page of 1190 x 1684."""


@dataclass(frozen=True)
class Source:
    """Items to be embedded.

    Args:
        total: how many there are, those that come twice counted twice.
        entries: gives them anew each time.
    """

    total: int
    entries: Callable[[], Iterator[Entry]]

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Entry]:
        return self.entries()


def open_source(path: Path | str) -> Source:
    """The items at a path, or in shards at an address.

    A line of JSON Lines is an item, and may have `metadata`, an object. An item of shards is a
    positive, of a PDF a page.

    Raises:
        UserError: there is nothing that can be embedded.
    """
    if is_remote(path):
        return _shards(path)
    path = Path(path)
    if path.suffix.lower() == PDF_SUFFIX and path.is_file():
        return _files(path.parent, [path])
    if not path.is_dir():
        return _json_lines(path)
    if any(path.glob("*.tar")):
        return _shards(path)
    files = files_below(path, lambda file: file.suffix.lower() == PDF_SUFFIX or is_picture(file))
    if not files:
        deeper = next(path.rglob("*.tar"), None)
        hint = f"; choose one folder of shards, such as {deeper.parent}" if deeper else ""
        raise UserError(f"{path} holds no pictures and no PDFs{hint}")
    return _files(path, files)


def _json_lines(path: Path) -> Source:
    total = sum(1 for _ in read_json_lines(path))
    if not total:
        raise UserError(f"{path} holds no items: expected one JSON object or string a line")

    def entries() -> Iterator[Entry]:
        lines: dict[str, int] = {}
        for number, value in read_json_lines(path):
            try:
                entry = _of_json(value, path.parent)
                if isinstance(value, dict) and value.get("id") is not None:
                    check_unique(entry.id, number, lines)
            except UserError as error:
                raise UserError(f"{path}:{number}: {error}") from error
            yield entry

    return Source(total, entries)


def _of_json(value: Any, folder: Path) -> Entry:
    metadata: Any = {}
    if isinstance(value, dict):
        value = dict(value)
        metadata = value.pop("metadata", None) or {}
        if not isinstance(metadata, dict):
            raise UserError(f"an item's metadata must be an object, not {type(metadata).__name__}")
    item = Item.parse(value, folder)
    return Entry.given(item.uid, item, shown(item) | metadata)


def _shards(folder: Path | str) -> Source:
    from metaembed_pl.data.shards import ShardedPairs

    pairs = ShardedPairs(folder)

    def entries() -> Iterator[Entry]:
        for pair in pairs:
            item = pair.positive
            asked = {} if pair.query.text is None else {"asked_as": pair.query.text}
            yield Entry.given(item.uid, item, shown(item) | asked)

    return Source(len(pairs), entries)


def _files(folder: Path, files: list[Path]) -> Source:
    pdfs = (file for file in files if file.suffix.lower() == PDF_SUFFIX)
    # Of one that cannot be opened there is a page too, which says so when it is its turn.
    pages = {file: max(1, _num_pages(file)) for file in pdfs}

    def entries() -> Iterator[Entry]:
        for file in files:
            name, where = file.relative_to(folder).as_posix(), {"file": str(file.resolve())}
            if file not in pages:
                yield Entry(name, partial(Item, image=file), where, file)
            for page in range(1, pages.get(file, 0) + 1):
                load = partial(draw_page, file, page)
                yield Entry(f"{name}#page={page}", load, where | {"page": page}, file)

    return Source(sum(pages.get(file, 1) for file in files), entries)


def _num_pages(file: Path) -> int:
    """Pages of a PDF; 0 of one that cannot be opened."""
    pdfium = _pdfium(file)
    try:
        with pdfium.PdfDocument(file) as document:
            return len(document)
    except (pdfium.PdfiumError, OSError):
        return 0


def draw_page(file: Path, page: int) -> Item:
    """A page of a PDF, counted from 1, as a picture.

    Raises:
        UserError: it is not there, too large, or not to be drawn.
    """
    pdfium = _pdfium(file)
    try:
        with pdfium.PdfDocument(file) as document:
            sheet = document[page - 1]
            pixels = sheet.get_width() * sheet.get_height() * PDF_SCALE**2
            if pixels > MAX_PIXELS:
                raise UserError(f"{pixels:,.0f} pixels; at most {MAX_PIXELS:,} are drawn")
            return Item(image=sheet.render(scale=PDF_SCALE).to_pil())
    except (pdfium.PdfiumError, UserError, OSError, IndexError) as error:
        raise UserError(f"page {page} of {file} cannot be drawn: {error}") from error


def _pdfium(file: Path) -> Any:
    try:
        import pypdfium2
    except ImportError as error:
        raise UserError(f"{file}: PDFs need pypdfium2: pip install 'metaembed-pl[pdf]'") from error
    return pypdfium2
