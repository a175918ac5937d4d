"""`search --items`: items without a store, encoded for this one search."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from metaembed_pl.cli.model import load_model, report_truncation
from metaembed_pl.cli.search_store import TOP, Answer, SearchResult
from metaembed_pl.errors import UserError

if TYPE_CHECKING:
    from metaembed_pl.item import Item


def search_items(args: argparse.Namespace, query: "Item") -> Answer:
    """Encode all items and rank them.

    Raises:
        UserError: the items or the model are not valid.
    """
    items, asked_as = _read_pool(args.items, args.columns)

    from metaembed_pl.budget import check_budget
    from metaembed_pl.retrieval.search import rank

    model = load_model(args)
    budget = check_budget(args.budget or model.groups[-1], model.groups, model.widths)
    shows_progress = sys.stderr.isatty()
    (hits,) = rank(model, [query], items, budget, args.top or TOP, args.batch_size, shows_progress)
    report_truncation(model)
    results = []
    for item, score in ((items[hit.candidate], hit.score) for hit in hits):
        # A picture inside a shard has no path of its own.
        image = str(item.image) if isinstance(item.image, Path) else None
        asked = ", ".join(f'"{text}"' for text in asked_as.get(item.uid, []))
        results.append(SearchResult(item.uid, score, item.text, image, asked))
    return Answer(results, {"budget": str(budget)})


def _read_pool(where: str, columns: str | None) -> "tuple[list[Item], dict[str, list[str]]]":
    """The items to search and, for items of shards, the texts of the queries that they answer."""
    from metaembed_pl.data.tables import parse_columns
    from metaembed_pl.retrieval.sources import open_source

    folder = Path(where)
    if (folder / "manifest.json").exists() and not any(folder.glob("*.tar")):
        raise UserError(f"{where} is a store: use --store {where}")
    items: dict[str, Item] = {}
    asked_as: dict[str, list[str]] = {}
    for entry in open_source(where, parse_columns(columns)):
        if entry.id not in items:
            try:
                items[entry.id] = replace(entry.load(), id=entry.id)
            except UserError as error:
                raise UserError(f"{entry.id}: {error}") from error
        if "asked_as" in entry.metadata:
            asked_as.setdefault(entry.id, []).append(entry.metadata["asked_as"])
    return list(items.values()), asked_as
