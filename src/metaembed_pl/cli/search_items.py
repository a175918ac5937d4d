"""`search --items`: items without a store, encoded for this one search."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from metaembed_pl.cli.model import load_model, report_truncation
from metaembed_pl.cli.search_store import Answer, SearchResult
from metaembed_pl.errors import UserError

if TYPE_CHECKING:
    from metaembed_pl.item import Item


def search_items(args: argparse.Namespace, query: "Item") -> Answer:
    """Encode all items and rank them.

    Raises:
        UserError: the items or the model are not valid.
    """
    items, asked_as = _read_pool(args.items)

    from metaembed_pl.budget import check_budget
    from metaembed_pl.retrieval.search import rank

    model = load_model(args)
    budget = check_budget(args.budget or model.groups[-1], model.groups, model.widths)
    shows_progress = sys.stderr.isatty()
    (hits,) = rank(model, [query], items, budget, args.top, args.batch_size, shows_progress)
    report_truncation(model)
    results = []
    for item, score in ((items[hit.candidate], hit.score) for hit in hits):
        # A picture inside a shard has no path of its own.
        image = str(item.image) if isinstance(item.image, Path) else None
        asked = ", ".join(f'"{text}"' for text in asked_as.get(item.uid, []))
        results.append(SearchResult(item.uid, score, item.text, image, asked))
    return Answer(results, {"budget": str(budget)})


def _read_pool(path: Path) -> "tuple[list[Item], dict[str, list[str]]]":
    """The items to search and, for items of shards, the texts of the queries that they answer."""
    from metaembed_pl.item import read_items

    if not path.is_dir() or not any(path.glob("*.tar")):
        if (path / "manifest.json").exists():
            raise UserError(f"{path} is a store: use --store {path}")
        if path.suffix.lower() in (".parquet", ".pdf"):
            raise UserError(f"{path} cannot be searched directly: `embed` it into a store first")
        try:
            return read_items(path), {}
        except UserError as error:
            deeper = next(path.rglob("*.tar"), None)
            hint = f"; choose one folder of shards, such as {deeper.parent}" if deeper else ""
            raise UserError(f"{error}{hint}") from error
    from metaembed_pl.data.shards import ShardedPairs

    items: dict[str, Item] = {}
    asked_as: dict[str, list[str]] = {}
    for pair in ShardedPairs(path):
        items.setdefault(pair.positive.uid, pair.positive)
        if pair.query.text is not None:
            asked_as.setdefault(pair.positive.uid, []).append(pair.query.text)
    return list(items.values()), asked_as
