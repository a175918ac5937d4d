"""A PDF's own information about its pages: text layer, outline, page numbers, index."""

import io
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from metaembed_pl.errors import UserError
from metaembed_pl.files import new_file

LISTING_LINES = 15  # fewer are no page of an index or of a table of contents
LISTING_SHARE = 0.7  # of the lines that end in page numbers, on such a page
NUMBERED_SHARE = 0.3  # of the pages whose printed number must be found, to trust them
MAX_NUMBERS = 12  # pages of one entry; more name something that is everywhere

_NUMBERS = re.compile(
    r"^(?P<term>.*?\S)(?:\s*,\s*|\s*(?:\.\s*){2,}|\s+)"
    r"(?P<pages>\d{1,4}(?:\s*[-\u2013]\s*\d{1,4})?(?:\s*,\s*\d{1,4}(?:\s*[-\u2013]\s*\d{1,4})?)*)\.?$"
)
_CHAPTER = re.compile(
    r"^(?:(?:chapter|appendix|part)\s+)?(?:[A-Z]?\d+(?:\.\d+)*|[IVXLC]+|[A-Z])[.:]?\s+"
)


@dataclass(frozen=True)
class IndexLine:
    """A line of an index: a term and the printed numbers of its pages."""

    term: str
    numbers: tuple[int, ...]


@dataclass
class Document:
    """The content of a PDF.

    Args:
        texts: the text layer of each page.
        outline: titles and the pages that they lead to, from 0, in the outline's order.
        titles: right pages by title, without listings.
        terms: right pages by index term, without listings.
        listings: pages of the table of contents and of the index.
    """

    texts: list[str]
    outline: list[tuple[str, int]]
    titles: dict[str, list[int]] = field(default_factory=dict)
    terms: dict[str, list[int]] = field(default_factory=dict)
    listings: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        first = printed_numbers(self.texts)
        found = find_listings(self.texts, first)
        self.listings = set(found)
        for title, page in self.outline:
            if page not in self.listings:
                _add(self.titles, plain_title(title), page)
        if first is None:
            return
        for page, entries in found.items():
            if page > len(self.texts) // 2:  # before that it is a table of contents
                for entry in entries:
                    for number in entry.numbers:
                        if 0 <= number - first < len(self.texts):
                            _add(self.terms, entry.term, number - first)
        for pages in self.terms.values():
            pages[:] = [page for page in pages if page not in self.listings]

    def section(self, page: int) -> range:
        """The pages from the last title at or before a page to the first one after it."""
        starts = sorted({start for _, start in self.outline})
        before = [start for start in starts if start <= page]
        behind = [start for start in starts if start > page]
        return range(before[-1] if before else 0, behind[0] if behind else len(self.texts))


def _add(pages: dict[str, list[int]], text: str, page: int) -> None:
    if any(c.isalpha() for c in text) and page not in pages.setdefault(text, []):
        pages[text].append(page)


def read_document(path: Path) -> Document:
    """Read a PDF's text and outline.

    Raises:
        UserError: it is not a PDF, or is broken or encrypted.
    """
    with _opened(path) as pdf:
        texts = [_text_of(pdf, page) for page in range(len(pdf))]
        outline = []
        for bookmark in pdf.get_toc():
            destination = bookmark.get_dest()
            page = None if destination is None else destination.get_index()
            title = " ".join((bookmark.get_title() or "").split())
            if title and page is not None and 0 <= page < len(texts):
                outline.append((title, page))
    return Document(texts, outline)


def render(path: Path, page: int, side: int, target: Path) -> str | None:
    """Render a page to a PNG with `side` pixels on its longer side; returns the fault, if any.

    Pages without colour are saved in 16 greys, others in 64 colours: the smallest (30 kB at 700
    pixels) and fastest of the measured formats; 256 greys take 52 kB.
    """
    try:
        with _opened(path) as pdf:
            width, height = pdf.get_page_size(page)
            if not min(width, height) > max(width, height) / side:
                return f"page has no area: {width:g} x {height:g} points"
            picture = pdf[page].render(scale=side / max(width, height)).to_pil().convert("RGB")
    except Exception as error:  # pdfium's errors have no common class
        return f"page cannot be rendered: {error}"
    if _is_grey(picture):
        picture = picture.convert("L").point(lambda grey: (grey >> 4) * 17)
    else:
        picture = picture.quantize(64)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as partial:
        partial.write_bytes(buffer.getvalue())
    return None


def printed_numbers(texts: list[str]) -> int | None:
    r"""The printed number of the first page, by most pages' first and last lines; or None.

    >>> printed_numbers(["Title", "one\n2", "two\n3", "three\n4"])
    1
    """
    votes: Counter[int] = Counter()
    for page, text in enumerate(texts):
        lines = _lines(text)
        edges = {
            int(n) for line in lines[:1] + lines[-1:] for n in re.findall(r"\b\d{1,4}\b", line)
        }
        votes.update(number - page for number in edges)
    first, count = votes.most_common(1)[0] if votes else (0, 0)
    return first if count > NUMBERED_SHARE * len(texts) else None


def find_listings(texts: list[str], first: int | None) -> dict[int, list[IndexLine]]:
    """The entries on pages of index and table of contents, where most lines end in numbers.

    A short page counts if it follows another one.

    Args:
        texts: of all pages.
        first: the printed number of the first page, if known.
    """
    found: dict[int, list[IndexLine]] = {}
    short: dict[int, list[IndexLine]] = {}
    for page, text in enumerate(texts):
        lines = _lines(text)
        entries = [entry for line in lines if (entry := parse_entry(line, len(texts)))]
        if len(entries) >= LISTING_SHARE * len(lines) > 0:
            # The first and the last line may be the page's own header, which ends in its number.
            headers = {_term(line) for line in lines[:1] + lines[-1:]} if first is not None else ()
            own = [
                entry
                for entry in entries
                if entry.term not in headers or entry.numbers != (page + (first or 0),)
            ]
            (found if len(entries) >= LISTING_LINES else short)[page] = own
    found.update({page: entries for page, entries in short.items() if page - 1 in found})
    return found


def parse_entry(line: str, num_pages: int) -> IndexLine | None:
    """The entry of a line that ends in valid page numbers; None for other lines.

    >>> parse_entry("palette, gray, 64, 141-142", 300)
    IndexLine(term='palette, gray', numbers=(64, 141, 142))
    >>> parse_entry("closure_arity . . . . . . 5", 300)
    IndexLine(term='closure_arity', numbers=(5,))
    >>> parse_entry("gnuplot 5.4", 300), parse_entry("in the year 2019", 300)
    (None, None)
    """
    match = _NUMBERS.match(line)
    if match is None or len(match["term"]) > 80:
        return None
    numbers: list[int] = []
    for part in match["pages"].split(","):
        first, *last = (int(number) for number in re.findall(r"\d+", part))
        numbers += range(first, max(first, *last) + 1) if last else [first]
    if not numbers or max(numbers) > num_pages or min(numbers) < 1 or len(numbers) > MAX_NUMBERS:
        return None
    return IndexLine(_term(line), tuple(numbers))


def plain_title(title: str) -> str:
    """A title without its number.

    >>> plain_title("3.1.2 Line styles"), plain_title("II Plotting styles"), plain_title("A plot")
    ('Line styles', 'Plotting styles', 'plot')
    """
    return _CHAPTER.sub("", title).strip() or title


def _term(line: str) -> str:
    match = _NUMBERS.match(line)
    return " ".join((match["term"] if match else line).split()).strip(" ,.;:")


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _is_grey(picture: Image.Image) -> bool:
    red, green, blue = picture.split()
    return not any(ImageChops.difference(red, other).getbbox() for other in (green, blue))


def _text_of(pdf: Any, page: int) -> str:
    try:
        return pdf[page].get_textpage().get_text_bounded().replace("\r\n", "\n")
    except Exception:  # a page that cannot be read is counted when it is rendered
        return ""


def _opened(path: Path) -> Any:
    try:
        import pypdfium2
    except ImportError as error:
        raise UserError(
            "reading PDFs takes the package pypdfium2: run pip install 'metaembed-pl[pdf]'"
        ) from error
    try:
        return pypdfium2.PdfDocument(path)
    except (pypdfium2.PdfiumError, OSError) as error:
        raise UserError(f"PDF cannot be opened: {path.name} ({error})") from error
