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
from metaembed_pl.data.product import SHOWN, about_lines, check_picture, kind_of, listed, loaded
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
        name: of the set, in metrics.
        folder: the output folder.
        candidates, queries: iterate over records with an `id`, a `text` and an `image`; all other
            keys are metadata. Pictures may be paths, bytes or `Named`.
        judgements: iterates over query ids, candidate ids and scores.
        lists: iterates over query ids with the ids of their own candidates; None if all queries
            search all candidates.
        source: origin of the data.
        settings: everything that determines the set.
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
    """Parse the command line and make the sets; return the exit status. See `_source.run`.

    By default nothing may be dropped: scores on a set without some of its candidates cannot be
    compared with others.
    """

    def declared(parser: argparse.ArgumentParser) -> None:
        declare(parser)
        parser.set_defaults(max_dropped=0.0)

    def build(options: argparse.Namespace) -> None:
        for benchmark in benchmarks(options):
            make(benchmark, options)

    return main_of(script, about, build, declared, argv)


def make(benchmark: RetrievalDraft, options: argparse.Namespace) -> None:
    """Write a set unless it is there already, and its card; print a summary.

    Raises:
        UserError: the folder must not be overwritten, or too much was dropped.
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
    """The manifest of a set."""
    return json.loads((folder / "manifest.json").read_bytes())


def _is_made(folder: Path, settings: dict[str, Any]) -> bool:
    try:
        return read_manifest(folder)["settings"] == settings
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(
    benchmark: RetrievalDraft, settings: dict[str, Any], options: argparse.Namespace
) -> Counter[str]:
    """Write the set; returns counts of what was dropped, by reason."""
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
    """The usable items, with their metadata; the others are counted."""
    checked = in_order(check, records, options.num_workers)
    for result in with_progress(checked, f"{benchmark.name} {what}"):
        if not isinstance(result, str):
            yield result
            continue
        if dropped.total() < SHOWN:
            print(f"dropped from {benchmark.name}: {result}", file=sys.stderr)
        dropped[kind_of(result)] += 1


def check(record: Record) -> tuple[Item, Record] | str:
    """Read and decode a record: its item and its metadata, or what is wrong with it."""
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
    about = about_lines(
        manifest,
        command,
        {
            "Dropped": f"{dropped.total():,}{listed(dropped)}",
            **{
                f"SHA-256 of {file}": sha256_of(benchmark.folder / file)
                for file in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv")
            },
        },
    )
    return f"""# {benchmark.name}

{manifest["num_queries"]:,} queries over {manifest["num_candidates"]:,} candidates, \
{manifest["num_right"]:,} of them right for a query.

{about}
Pictures are named by the SHA-256 of their content.
"""
