"""`search --store`: at a budget, in a cascade, or with the measured plan; also in Qdrant."""

import argparse
from collections.abc import Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NamedTuple

from metaembed_pl.cli.index import measured
from metaembed_pl.cli.model import load_model, report_truncation
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.qdrant.address import is_qdrant

if TYPE_CHECKING:
    from metaembed_pl.item import Item
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.retrieval.calibration import Choice
    from metaembed_pl.retrieval.store import Store

TOP = 10


class SearchResult(NamedTuple):
    """A result.

    Args:
        id: of the item; begins with sha256: if it has none of its own.
        score: higher is better.
        text: of the item.
        image: path of its picture, if it has one.
        asked_as: the texts of the queries that it answers, if known.
        metadata: of an item in a store; None: it is in no store.
    """

    id: str
    score: float
    text: str | None
    image: str | None
    asked_as: str = ""
    metadata: dict[str, Any] | None = None


class Answer(NamedTuple):
    """The results of a query, best first, and the cost of the search for machines and people."""

    results: Sequence[SearchResult]
    cost: dict[str, Any]
    note: str = ""


def search_store(args: argparse.Namespace, query: "Item") -> Answer:
    """Search a store, in a folder or in Qdrant.

    Raises:
        UserError: the store is damaged or another model's, or a flag does not fit it.
    """
    from metaembed_pl.retrieval.store import Store

    in_qdrant = is_qdrant(args.store)
    is_automatic = args.budget in (None, "auto") and not (in_qdrant or args.cascade or args.exact)
    with ExitStack() as stack:
        store: Any = stack.enter_context(_collection(args)) if in_qdrant else Store.open(args.store)
        if not is_automatic:
            # Before the model, which takes seconds.
            store.stages(args.budget, args.cascade, args.top)
        model = load_model(args, store)
        budget, cascade, note = args.budget, args.cascade, ""
        if is_automatic:
            budget, (cascade, note) = None, _choice(store, model, args)
        queries = model.encode_query([query], args.batch_size).to(model.device)
        report_truncation(model)
        hits = store.search(
            queries,
            budget,
            cascade=cascade,
            top=None if args.cascade else args.top or TOP,
            where=args.where or (),
            normalised=args.normalised,
        )
        plan = ",".join(map(str, hits.stages))
        cost = {"plan": plan, "milliseconds": hits.milliseconds, "items": len(store)}
        notes = [f"{plan}: {hits.milliseconds:.1f} ms"]
        if in_qdrant:
            metadata = hits.metadata[0]
        else:
            metadata = store.metadata(hits.rows[0])
            cost |= {"bytes_read": hits.bytes_read, "note": note}
            notes = [f"{notes[0]}, {hits.bytes_read:,} bytes read", *filter(None, [note])]
    results = list(map(_result, hits.ids[0], hits.scores[0], metadata))[: args.top or TOP]
    return Answer(results, cost, "; ".join(notes))


def _collection(args: argparse.Namespace) -> Any:
    if args.budget == "auto":
        raise UserError(
            "--budget auto only works on a store in a folder: search there without an index, and "
            "pass the plan that it chooses as --cascade"
        )
    from metaembed_pl.retrieval.qdrant.store import QdrantStore

    return QdrantStore.open(args.store, args.exact)


def _choice(store: "Store", model: "MetaEmbedder", args: argparse.Namespace) -> "Choice":
    """The plan of a search without a budget; plans are measured now if that takes seconds."""
    from metaembed_pl.retrieval.calibration import TARGET, Calibration, choose, needs_measuring

    calibration = Calibration.load(store)
    if calibration is None and needs_measuring(store):
        calibration = measured(store, model, args.batch_size)
    target = TARGET if args.target_recall is None else args.target_recall
    return choose(store, calibration, target, args.top or TOP)


def _result(id: str, score: float, metadata: dict[str, Any]) -> SearchResult:
    image = metadata.get("image") or metadata.get("file")
    if image is not None and "page" in metadata:
        image = f"{image}, page {metadata['page']}"
    asked = metadata.get("asked_as")
    return SearchResult(
        id, score, metadata.get("text"), image, f'"{asked}"' if asked else "", metadata
    )
