"""Lightning recipes that make a vision-language model a MetaEmbed retriever, and its retrieval."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metaembed_pl.budget import Budget
    from metaembed_pl.item import Item, Pair
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.retrieval.qdrant.store import QdrantStore
    from metaembed_pl.retrieval.store import Store

__version__ = "0.2.0"
__all__ = ["Budget", "Item", "MetaEmbedder", "Pair", "QdrantStore", "Store", "__version__"]

_HOMES = {
    "Budget": "metaembed_pl.budget",
    "Item": "metaembed_pl.item",
    "MetaEmbedder": "metaembed_pl.model.embedder",
    "Pair": "metaembed_pl.item",
    "QdrantStore": "metaembed_pl.retrieval.qdrant.store",
    "Store": "metaembed_pl.retrieval.store",
}


def __getattr__(name: str) -> Any:
    # Imported when first asked for: torch and transformers take seconds, `--help` should not.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
