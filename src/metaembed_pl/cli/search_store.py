"""`search --store`: at a budget, in a cascade, or with the measured plan."""

import argparse
from typing import TYPE_CHECKING, Any

from metaembed_pl.cli.index import measured
from metaembed_pl.cli.model import load_model, tell_cut
from metaembed_pl.cli.search_result import Answer, SearchResult

if TYPE_CHECKING:
    from metaembed_pl.item import Item
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.retrieval.calibration import Choice
    from metaembed_pl.retrieval.store import Store


def search(args: argparse.Namespace, query: "Item") -> Answer:
    """Search a store.

    Raises:
        UserError: the store is damaged or another model's, or a flag does not fit it.
    """
    from metaembed_pl.retrieval.store import Store

    store = Store.open(args.store)
    automatic = not args.exact and args.cascade is None and args.budget in (None, "auto")
    if not automatic:
        store.stages(args.budget, args.cascade)  # before the model, which takes seconds
    model = load_model(args, store)
    budget, cascade, note = args.budget, args.cascade, ""
    if automatic:
        stages, note = _choice(store, model, args)
        budget, cascade = None, stages
    queries = model.encode_query([query], args.batch_size).to(model.device)
    tell_cut(model)
    hits = store.search(
        queries,
        budget,
        cascade=cascade,
        top=None if args.cascade else args.top,
        where=args.where or (),
        normalised=args.normalised,
    )
    rows = hits.rows[0][: args.top]
    found = list(map(found_of, hits.ids[0], hits.scores[0], store.metadata(rows)))
    plan = ",".join(map(str, hits.stages))
    cost: dict[str, Any] = {"plan": plan, "milliseconds": hits.milliseconds}
    cost |= {"bytes_read": hits.bytes_read, "items": len(store), "note": note}
    notes = [f"{plan}: {hits.milliseconds:.1f} ms, {hits.bytes_read:,} bytes read"]
    return Answer(found, cost, "; ".join([*notes, note] if note else notes))


def _choice(store: "Store", model: "MetaEmbedder", args: argparse.Namespace) -> "Choice":
    """What a search without a budget does; measured now where that takes seconds."""
    from metaembed_pl.retrieval.calibration import TARGET, Calibration, choose, needs_measuring

    calibration = Calibration.load(store)
    if calibration is None and needs_measuring(store):
        calibration = measured(store, model, args.batch_size)
    target = TARGET if args.target_recall is None else args.target_recall
    return choose(store, calibration, target, args.top)


def found_of(id: str, score: float, metadata: dict[str, Any]) -> SearchResult:
    """A result, by what its store keeps of it."""
    where = metadata.get("image") or metadata.get("file")
    if where is not None and "page" in metadata:
        where = f"{where}, page {metadata['page']}"
    asked = metadata.get("asked_as")
    text = metadata.get("text")
    return SearchResult(id, score, text, where, f'"{asked}"' if asked else "", metadata)
