"""Published benchmarks -> retrieval sets in BEIR's layout with images (metaembed_pl.data.beir)."""

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from metaembed_pl.data.beir import RetrievalSetWriter
from metaembed_pl.data.parallel import in_order
from metaembed_pl.data.product import SHOWN, check_picture, kind_of, listed, loaded
from metaembed_pl.data.shard_index import sha256_of
from metaembed_pl.data_prep._source import main_of
from metaembed_pl.errors import UserError
from metaembed_pl.files import write_text
from metaembed_pl.item import Item
from metaembed_pl.progress import with_progress

Record = dict[str, Any]


@dataclass(frozen=True)
class RetrievalDraft:
    """A retrieval set that a script can write.

    Args:
        name: how metrics call it.
        folder: where it goes.
        candidates, queries: make records of an `id`, a `text` and an `image`; all else in them is
            metadata. Pictures may be paths, bytes or `Named`.
        judgements: makes query ids, candidate ids and scores.
        lists: makes query ids and the ids of their own candidates; None where all queries search
            all candidates.
        source: where the data are from.
        settings: all that decides the set.
        licence, note: for manifest and card.
    """

    name: str
    folder: Path
    candidates: Callable[[], Iterable[Record]]
    queries: Callable[[], Iterable[Record]]
    judgements: Callable[[], Iterable[tuple[str, str, float]]]
    lists: Callable[[], Iterable[tuple[str, list[str]]]] | None
    source: str
    settings: dict[str, Any] = field(default_factory=dict)
    licence: str = ""
    note: str = ""


def run(
    script: str,
    about: str | None,
    benchmarks: Callable[[argparse.Namespace], Iterable[RetrievalDraft]],
    declare: Callable[[argparse.ArgumentParser], None],
    argv: list[str] | None = None,
) -> int:
    """Parse the command line and make the sets; return the exit status. As `_source.run`.

    Nothing may be dropped unless --max-dropped says so: a set without some of its candidates gives
    scores that compare with nobody's.
    """

    def declared(parser: argparse.ArgumentParser) -> None:
        declare(parser)
        parser.set_defaults(max_dropped=0.0)

    def build(options: argparse.Namespace) -> None:
        for benchmark in benchmarks(options):
            make(benchmark, options)

    return main_of(script, about, build, declared, argv)


def make(benchmark: RetrievalDraft, options: argparse.Namespace) -> None:
    """Write a set that is not there yet, and its card; say what there is.

    Raises:
        UserError: a folder that must not be overwritten, or too much that had to be dropped.
    """
    settings = {**benchmark.settings, "limit": options.limit}
    card, state = benchmark.folder / "README.md", "kept"
    if options.force or not (card.exists() and _is_made(benchmark.folder, settings)):
        dropped = _write(benchmark, settings, options)
        write_text(card, _card(benchmark, dropped, options.command))
        state = "written"
    manifest = read_manifest(benchmark.folder)
    print(
        f"{benchmark.folder}: {manifest['num_queries']:,} queries, "
        f"{manifest['num_candidates']:,} candidates, {state}"
    )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What the writer said of a set."""
    return json.loads((folder / "manifest.json").read_bytes())


def _is_made(folder: Path, settings: dict[str, Any]) -> bool:
    try:
        return read_manifest(folder)["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(
    benchmark: RetrievalDraft, settings: dict[str, Any], options: argparse.Namespace
) -> Counter[str]:
    """Write the set; returns what was dropped, by reason."""
    is_ours = options.force or _is_made(benchmark.folder, settings)  # a kill before the card
    if benchmark.folder.exists() and any(benchmark.folder.iterdir()) and not is_ours:
        raise UserError(f"{benchmark.folder} is not empty: choose another --out, or use --force")
    dropped: Counter[str] = Counter()
    writer = RetrievalSetWriter(
        benchmark.folder,
        benchmark.name,
        licence=benchmark.licence if options.licence is None else options.licence,
        source=benchmark.source,
        note=benchmark.note,
        settings=settings,
        overwrite=benchmark.folder.exists(),
    )
    with writer:
        checked = partial(_checked, benchmark, options, dropped)
        for item, metadata in checked(benchmark.candidates(), "candidates"):
            writer.add_candidate(item, **metadata)
        judged = {query for query, candidate, score in benchmark.judgements() if score > 0}
        wanted = (record for record in benchmark.queries() if record["id"] in judged)
        for item, metadata in checked(wanted, "queries"):
            writer.add_query(item, **metadata)
        for query, candidate, score in benchmark.judgements():
            if query in writer.query_ids and candidate in writer.candidate_ids:
                writer.judge(query, candidate, score)
        for query, ids in benchmark.lists() if benchmark.lists else ():
            if query in writer.query_ids:
                writer.list_candidates(query, [id for id in ids if id in writer.candidate_ids])
        total = len(writer.candidate_ids) + len(writer.query_ids) + dropped.total()
        if dropped.total() > options.max_dropped * total:
            raise UserError(
                f"{benchmark.name}: {dropped.total()} of {total} queries and candidates cannot be "
                f"used, more than --max-dropped {options.max_dropped}{listed(dropped)}"
            )
    return dropped


def _checked(
    benchmark: RetrievalDraft,
    options: argparse.Namespace,
    dropped: Counter[str],
    records: Iterable[Record],
    what: str,
) -> Iterator[tuple[Item, Record]]:
    """The items that can be used, with their metadata; the others are counted."""
    checked = in_order(check, records, options.num_workers)
    for result in with_progress(checked, f"{benchmark.name} {what}"):
        if not isinstance(result, str):
            yield result
            continue
        if dropped.total() < SHOWN:
            print(f"dropped from {benchmark.name}: {result}", file=sys.stderr)
        dropped[kind_of(result)] += 1


def check(record: Record) -> tuple[Item, Record] | str:
    """Read and decode a record: its item and its metadata, or what is wrong."""
    record = dict(record)
    fields = {key: record.pop(key, None) for key in ("id", "text", "image")}
    try:
        item = loaded(fields, "item")
        check_picture(item)
    except UserError as error:
        return f"{error} ({fields['id']})"
    return item, {key: value for key, value in record.items() if value is not None}


def _card(benchmark: RetrievalDraft, dropped: Counter[str], command: str) -> str:
    manifest = read_manifest(benchmark.folder)
    about = {
        "Source": manifest["source"],
        "Licence": manifest["licence"] or "unknown: look it up before you share the set",
        "Note": manifest["note"],
        "Settings": ", ".join(
            f"{key} {value}" for key, value in manifest["settings"].items() if value is not None
        ),
        "Dropped": f"{dropped.total():,}" + listed(dropped),
        "SHA-256 of corpus.jsonl": sha256_of(benchmark.folder / "corpus.jsonl"),
        "SHA-256 of queries.jsonl": sha256_of(benchmark.folder / "queries.jsonl"),
        "SHA-256 of qrels/test.tsv": sha256_of(benchmark.folder / "qrels" / "test.tsv"),
    }
    lines = "".join(f"- **{key}**: {value}\n" for key, value in about.items() if value)
    return f"""# {benchmark.name}

{manifest["num_queries"]:,} queries over {manifest["num_candidates"]:,} candidates, \
{manifest["num_right"]:,} of them right for a query.

{lines}- **Made by**: `{command}`

Pictures are named by the SHA-256 of their content.
"""
