"""`search --store`: at a budget, in a cascade, or at what the store was found to need."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from metaembed_pl.cli.found import Answer, Found
from metaembed_pl.cli.model import load_model

if TYPE_CHECKING:
    from metaembed_pl.item import Item
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.retrieval.calibration import Calibration
    from metaembed_pl.retrieval.store import Store


def search(args: argparse.Namespace, query: "Item") -> Answer:
    """Search a store.

    Raises:
        UserError: the store is damaged or another model's, or a flag does not fit it.
    """
    from metaembed_pl.retrieval.store import Store

    store = Store.open(args.store)
    if args.budget != "auto":
        store.stages(args.budget, args.cascade)  # before the model, which takes seconds
    model = load_model(args.model, args.device, store)
    budget, cascade, note = args.budget, args.cascade, ""
    if budget == "auto":
        calibration = _calibration(store, model, args.batch_size)
        budget, cascade = None, calibration.choose(args.target_recall or 0.98, args.top)
        note = f"measured with {calibration.used}"
    queries = model.encode_query([query], args.batch_size).to(model.device)
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
    cost |= {"bytes_read": hits.bytes_read, "items": len(store)}
    told = [f"{plan}: {hits.milliseconds:.1f} ms, {hits.bytes_read:,} bytes read"]
    return Answer(found, cost, "; ".join([*told, note] if note else told))


def _calibration(store: "Store", model: "MetaEmbedder", batch_size: int) -> "Calibration":
    """That of this generation of the store; measured where it was not yet."""
    from metaembed_pl.retrieval.calibration import Calibration, measure

    known = Calibration.load(store)
    if known is not None:
        return known
    print("measuring what this store needs ...", file=sys.stderr)
    calibration = measure(
        store, lambda texts: model.encode_query(texts, batch_size).to(model.device)
    )
    calibration.save(store)
    return calibration


def found_of(id: str, score: float, metadata: dict[str, Any]) -> Found:
    """A result, by what its store keeps of it."""
    where = metadata.get("image") or metadata.get("file")
    if where is not None and "page" in metadata:
        where = f"{where}, page {metadata['page']}"
    asked = metadata.get("asked_as")
    text = metadata.get("text")
    return Found(id, score, text, where, f'"{asked}"' if asked else "", metadata)
