"""A folder of PDFs -> pictures of their pages, shards of query -> page, and a retrieval set.

    python data_prep/pdf.py --from manuals --out data/manuals

| below OUT | content |
|---|---|
| pages/DOC/0062.png | rendered pages, except table of contents and index |
| items.jsonl | the pages as items, to search |
| train/, test/ | shards: a query, a page that answers it, and misleading pages |
| retrieval/ | the test queries over all pages, with their text layer for BM25 |

Queries are the author's own words: the titles of the outline, and the terms of the index at the
back with their pages. An index is recognised by its lines, most of which end in page numbers; the
numbers printed at the top and bottom of the pages map them to pages. No model is used, and nothing
is sent over the network.

A page is a picture. With --words N, it also gets the N most characteristic words of its text layer
(tf-idf), and queries are in lower case like these words: for models too small to read.

Hard negatives are neighbours and pages of the same section that lack the query's words. Queries are
held out, not pages: one in ten by a hash of its words (--held-out), so the test asks new questions
about the same pages. PDFs that do not open and pages that cannot be rendered are dropped, logged
and counted; duplicates are read once.
"""

import argparse
import json
import math
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from metaembed_pl.data.parallel import in_order
from metaembed_pl.data.product import Draft, Product, is_held_out, kind_of, listed
from metaembed_pl.data.shard_index import sha256_of
from metaembed_pl.data_prep._pdf import Document, read_document, render
from metaembed_pl.data_prep._retrieval import Record, RetrievalDraft
from metaembed_pl.data_prep._retrieval import make as make_benchmark
from metaembed_pl.data_prep._source import declare_split, main_of, make_and_print
from metaembed_pl.errors import UserError
from metaembed_pl.files import write_text
from metaembed_pl.picture import files_below
from metaembed_pl.progress import with_progress

RECIPE = 1  # raise it when the same PDFs make other pages or queries
STATE = "pages.json"


@dataclass
class Query:
    """A query and the pages that answer it.

    Args:
        text: as its author wrote it.
        kind: `title` or `term`.
        pages: ids of the right pages.
    """

    text: str
    kind: str
    pages: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Library:
    """All documents and their pages.

    Args:
        folder: the pages' pictures.
        documents: by name.
        pages: for the id of each rendered page its document and its number, from 0.
        queries: by their words, in lower case.
        words: for each page the words that the model gets in addition to the picture.
    """

    folder: Path
    documents: dict[str, Document]
    pages: dict[str, tuple[str, int]]
    queries: dict[str, Query]
    words: dict[str, str]

    def item(self, page: str) -> dict[str, Any]:
        """A page as an item."""
        return {"id": page, "image": self.folder / page, "text": self.words.get(page) or None}

    def query_text(self, key: str) -> str:
        """The words that the model reads of a query."""
        return key if self.words else self.queries[key].text

    def answers(self) -> dict[str, list[str]]:
        """The queries that each page answers."""
        found: dict[str, list[str]] = {}
        for key, query in self.queries.items():
            for page in query.pages:
                found.setdefault(page, []).append(key)
        return found

    def text_of(self, page: str) -> str:
        """A page's text layer."""
        name, number = self.pages[page]
        # PDFs may hold halves of characters, which no file does.
        return self.documents[name].texts[number].encode("utf-8", "replace").decode()


def page_id(name: str, number: int) -> str:
    """The path of a page's picture, below the folder of pages.

    >>> page_id("gnuplot", 61)
    'gnuplot/0062.png'
    """
    return f"{name}/{number + 1:04d}.png"


def find_pdfs(root: Path) -> dict[str, Path]:
    """PDFs below a folder by name, each content once.

    Raises:
        UserError: no folder, or none in it.
    """
    if not root.is_dir():
        raise UserError(f"no folder {root}: give --from a folder of PDFs")
    found: dict[str, Path] = {}
    seen: dict[str, Path] = {}
    for path in files_below(root, lambda file: file.suffix.lower() == ".pdf"):
        first = seen.setdefault(sha256_of(path), path)
        name = path.relative_to(root).with_suffix("").as_posix()
        if first is not path:
            print(f"{path.name} is a copy of {first.name}: read once", file=sys.stderr)
        else:  # beside a.pdf there may be another a.PDF
            found[f"{name}{path.suffix}" if name in found else name] = path
    if not found:
        raise UserError(f"{root} holds no PDFs")
    return found


def read_library(options: argparse.Namespace) -> tuple[Library, dict[str, Any]]:
    """Read all PDFs and render their pages.

    Returns:
        The library, and the settings that it depends on.

    Raises:
        UserError: nothing can be read, the folder holds pages of other settings, or there are no
            queries.
    """
    pdfs = find_pdfs(options.where)
    settings = {
        "recipe": RECIPE,
        "side": options.side,
        "pdfs": {name: sha256_of(path) for name, path in pdfs.items()},
    }
    folder = prepare_folder(options.out / "pages", settings, options.force)
    dropped: Counter[str] = Counter()
    documents = {}
    results = in_order(try_to_read, pdfs.values(), options.num_workers, chunk=1)
    for name, result in zip(pdfs, with_progress(results, "reading", len(pdfs)), strict=True):
        if isinstance(result, str):
            print(f"dropped {name}: {result}", file=sys.stderr)
            dropped[kind_of(result)] += 1
        else:
            documents[name] = result
    if not documents:
        raise UserError(f"none of {len(pdfs)} PDFs can be read{listed(dropped)}")
    jobs = [
        (pdfs[name], number, options.side, folder / page_id(name, number))
        for name, document in documents.items()
        for number in range(len(document.texts))
        if number not in document.listings
    ]
    pages = {}
    rendered = in_order(render_page, jobs, options.num_workers, chunk=8)
    watched = with_progress(rendered, "drawing", len(jobs))
    for (_, number, _, target), error in zip(jobs, watched, strict=True):
        id = target.relative_to(folder).as_posix()
        if error is None:
            pages[id] = (Path(id).parent.as_posix(), number)
        else:
            print(f"dropped {id}: {error}", file=sys.stderr)
            dropped[kind_of(error)] += 1
    if dropped.total() > options.max_dropped * (len(pages) + dropped.total()):
        raise UserError(
            f"{dropped.total()} pages and PDFs cannot be used, more than --max-dropped "
            f"{options.max_dropped}{listed(dropped)}"
        )
    texts = {page: documents[name].texts[number] for page, (name, number) in pages.items()}
    words = characteristic_words(texts, options.words)
    library = Library(folder, documents, pages, find_queries(documents, pages), words)
    if not library.queries:
        raise UserError(
            f"{len(documents)} PDFs have neither an outline nor an index: there are no queries. "
            f"Their pages are in {folder}; add your own pairs with metaembed-pl prepare pairs"
        )
    print(f"{folder}: {len(pages):,} pages of {len(documents)} PDFs{listed(dropped)}")
    return library, settings


def prepare_folder(folder: Path, settings: dict[str, Any], force: bool) -> Path:
    """A folder for pages of these settings only: pages that are there are kept."""
    state = folder / STATE
    known = json.loads(state.read_text()) if state.exists() else None
    if known != settings and folder.exists():
        if known is None or not force:
            raise UserError(f"{folder} contains other pages: choose another --out, or use --force")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(state, json.dumps(settings))
    return folder


def try_to_read(path: Path) -> Document | str:
    """A document, or the reason why it cannot be read."""
    try:
        return read_document(path)
    except UserError as error:
        return str(error)


def render_page(job: tuple[Path, int, int, Path]) -> str | None:
    """Render a page that is not there yet; returns the reason if that fails."""
    path, number, side, target = job
    return None if target.exists() else render(path, number, side, target)


def find_queries(
    documents: dict[str, Document], pages: dict[str, tuple[str, int]]
) -> dict[str, Query]:
    """Titles and index terms of all documents; equal words are one query, with all its pages."""
    queries: dict[str, Query] = {}
    for name, document in documents.items():
        for kind, texts in (("title", document.titles), ("term", document.terms)):
            for text, numbers in texts.items():
                query = queries.setdefault(text.casefold(), Query(text, kind))
                ids = (page_id(name, number) for number in numbers)
                query.pages += [id for id in ids if id in pages and id not in query.pages]
    return {key: query for key, query in queries.items() if query.pages}


def characteristic_words(texts: dict[str, str], count: int) -> dict[str, str]:
    """The most characteristic words of each text, by tf-idf, in the order of the text.

    >>> characteristic_words({"a": "the cat and the dog", "b": "the fox and a hen"}, 2)
    {'a': 'cat dog', 'b': 'fox a'}
    """
    if not count:
        return {}
    words = {key: re.findall(r"\w+", text.casefold()) for key, text in texts.items()}
    found_in = Counter(word for some in words.values() for word in set(some))
    distinctive = {}
    for key, some in words.items():
        times = Counter(some)
        own = sorted(times, key=lambda w: -times[w] * math.log(len(words) / found_in[w]))[:count]
        distinctive[key] = " ".join(sorted(own, key=some.index))
    return distinctive


def drafts(library: Library, num_negatives: int) -> Iterator[Draft]:
    """A pair for each page and each query that it answers; a page's queries are consecutive."""
    answers = library.answers()

    def item(page: str) -> dict[str, Any]:
        return library.item(page) | {"answers": answers.get(page, [])}

    for page, keys in answers.items():
        for key in keys:
            yield {
                "id": f"{key} -> {page}",
                "query": {"text": library.query_text(key)},
                "positive": item(page),
                "negatives": list(map(item, misleading_pages(library, key, page)[:num_negatives])),
                "asks": key,
                "held_out_by": key,
            }


def misleading_pages(library: Library, key: str, page: str) -> list[str]:
    """Pages near a right page, or in its section, that do not answer; the nearest first."""
    name, number = library.pages[page]
    document = library.documents[name]
    near = {number + step for step in (-2, -1, 1, 2)} | set(document.section(number))
    right = set(library.queries[key].pages)
    words = re.findall(r"\w+", key)
    return [
        other
        for place in sorted(near - {number}, key=lambda place: (abs(place - number), place))
        if (other := page_id(name, place)) in library.pages
        and other not in right
        # A page with all its words may well answer, whatever the index says.
        and not all(word in library.text_of(other).casefold() for word in words)
    ]


def benchmark(
    library: Library, options: argparse.Namespace, settings: dict[str, Any], source: str
) -> RetrievalDraft:
    """The held-out queries over all pages."""
    held_out = (k for k in library.queries if is_held_out(k, options.held_out))
    queries = {k: library.queries[k] for k in islice(held_out, options.limit)}

    def candidates() -> Iterator[Record]:
        for page in library.pages:
            yield library.item(page) | {"text_layer": library.text_of(page)}

    return RetrievalDraft(
        name=name_of(options),
        folder=options.out / "retrieval",
        candidates=candidates,
        queries=lambda: (
            {"id": k, "text": library.query_text(k), "kind": q.kind} for k, q in queries.items()
        ),
        judgements=lambda: ((k, page, 1) for k, q in queries.items() for page in q.pages),
        lists=None,
        source=source,
        settings={**settings, "held_out": options.held_out, "words": options.words},
        licence=options.licence or "",
    )


def write_items(library: Library, path: Path) -> None:
    """Write the pages as items, in JSON Lines."""
    lines = []
    for page in library.pages:
        item = library.item(page) | {"image": f"{library.folder.name}/{page}"}
        lines.append(json.dumps({k: v for k, v in item.items() if v}, ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))


def name_of(options: argparse.Namespace) -> str:
    """The source's name in metrics and logs."""
    return options.name or options.out.resolve().name


def build(options: argparse.Namespace) -> None:
    """Write pages, shards and the retrieval set."""
    if not 64 <= options.side <= 8192:
        raise UserError(f"--side must be 64 to 8192 pixels, not {options.side}")
    library, settings = read_library(options)
    kinds = Counter(query.kind for query in library.queries.values())
    print(f"queries: {kinds['title']:,} titles, {kinds['term']:,} terms")
    write_items(library, options.out / "items.jsonl")
    source = f"{len(library.documents)} PDFs of {options.where.resolve().name}"
    make_and_print(
        Product(
            name=name_of(options),
            folder=options.out,
            drafts=partial(drafts, library, options.num_negatives),
            source=source,
            held_out=options.held_out,
            settings={
                **settings,
                "held_out": options.held_out,
                "num_negatives": options.num_negatives,
                "words": options.words,
            },
            note="Queries are outline titles and index terms; pages are those they name.",
        ),
        options,
    )
    if options.held_out:
        make_benchmark(benchmark(library, options, settings, source), options)


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    add = parser.add_argument
    add("--from", dest="where", type=Path, required=True, help="folder of PDFs")
    add("--out", type=Path, required=True, help="folder to write to")
    add(
        "--side",
        type=int,
        default=1024,
        metavar="PIXELS",
        help="longer side of a page in pixels (default: 1024)",
    )
    add(
        "--words",
        type=int,
        default=0,
        metavar="N",
        help="words per page shown to the model (default: 0)",
    )
    add(
        "--num-negatives",
        type=int,
        default=2,
        metavar="N",
        help="hard negatives per pair (default: 2)",
    )
    declare_split(parser, "queries")


main = partial(main_of, "pdf", __doc__, build, declare)

if __name__ == "__main__":
    sys.exit(main())
