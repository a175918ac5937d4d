"""Where on its picture the vectors of an item look.

Rc: vectors of a candidate    D: their width
"""

from typing import TYPE_CHECKING, Literal

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from metaembed_pl.item import Item
from metaembed_pl.model.patches import patch_attention
from metaembed_pl.serving.schema import Maps

if TYPE_CHECKING:
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.retrieval.searchable import Searchable


def attention_maps(
    model: "MetaEmbedder",
    item: Item,
    store: "Searchable",
    stored: Float[Tensor, "Rc D"],
    drawn_from: Literal["picture", "preview"],
) -> Maps | None:
    """The attention maps of an item's first vectors; None: the model has no such maps.

    Args:
        model: that made the stored vectors.
        item: with a picture.
        store: that holds them.
        stored: the first vectors of the item in the store.
        drawn_from: what the item's picture is, the original or the store's preview.
    """
    attention = patch_attention(model, item, "candidate")
    if attention is None:
        return None
    attention = attention[: len(stored)]
    attention = attention / attention.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    anew = store.project(model.encode_candidate([item])[0, : len(stored)])
    _, height, width = attention.shape
    return Maps(
        height=height,
        width=width,
        # Three digits are more than an eye can see.
        weights=attention.flatten(1).mul(1000).round().div(1000).tolist(),
        drawn_from=drawn_from,
        agreement=cosine_similarity(anew, stored, dim=1).min().item(),
    )
