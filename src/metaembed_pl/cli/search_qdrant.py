"""`search --store` of a collection in Qdrant: a budget or a cascade, in one request."""

import argparse
from typing import TYPE_CHECKING

from metaembed_pl.cli.model import load_model, tell_cut
from metaembed_pl.cli.search_result import Answer
from metaembed_pl.cli.search_store import found_of
from metaembed_pl.errors import UserError

if TYPE_CHECKING:
    from metaembed_pl.item import Item


def search(args: argparse.Namespace, query: "Item") -> Answer:
    """Search a collection.

    Raises:
        UserError: it is not there or another model's, or a flag does not fit it.
    """
    if args.budget == "auto":
        raise UserError(
            "--budget auto only works on a store in a folder: search there without an index, and "
            "pass the plan that it chooses as --cascade"
        )
    from metaembed_pl.retrieval.qdrant.store import QdrantStore

    with QdrantStore.open(args.store, args.exact) as store:
        store.stages(args.budget, args.cascade)  # before the model, which takes seconds
        model = load_model(args, store)
        hits = store.search(
            model.encode_query([query], args.batch_size),
            args.budget,
            cascade=args.cascade,
            top=None if args.cascade else args.top,
            where=args.where or (),
            normalised=args.normalised,
        )
        tell_cut(model)
        items = len(store)
    found = list(map(found_of, hits.ids[0], hits.scores[0], hits.metadata[0]))[: args.top]
    plan = ",".join(map(str, hits.stages))
    cost = {"plan": plan, "milliseconds": hits.milliseconds, "items": items}
    return Answer(found, cost, f"{plan}: {hits.milliseconds:.1f} ms")
