"""Explanation of a score: the matching vectors, and their attention maps.

Rq: vectors of a query    Rc: of a candidate    D: their width    H, W: patches down and across
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from metaembed_pl.item import Item
from metaembed_pl.model.patches import patch_attention

if TYPE_CHECKING:
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.retrieval.searchable import Searchable


@dataclass(frozen=True)
class Match:
    """How the vectors of a query met those of a candidate.

    Args:
        products: of every query vector with every candidate vector.
        winners: for each query vector the candidate vector with the largest.
    """

    products: Float[Tensor, "Rq Rc"]
    winners: Integer[Tensor, " Rq"]

    @property
    def score(self) -> float:
        """MaxSim: the sum of what the winners reach."""
        return self.products.gather(1, self.winners[:, None]).sum().item()


def match(query: Float[Tensor, "Rq D"], candidate: Float[Tensor, "Rc D"]) -> Match:
    """Take a score apart.

    >>> found = match(torch.eye(2), torch.tensor([[0.6, 0.8], [0.0, 1.0], [1.0, 0.0]]))
    >>> found.winners.tolist(), found.score
    ([2, 1], 2.0)
    """
    products = query @ candidate.T
    return Match(products, products.argmax(dim=1))


@dataclass(frozen=True)
class Looks:
    """Where candidate vectors look.

    Args:
        maps: attention to each patch of the picture, as a multiple of an even share.
        agreement: least cosine of a vector of the item as it was shown now and as it was stored.
    """

    maps: Float[Tensor, "Rc H W"]
    agreement: float


def looks(
    model: "MetaEmbedder", item: Item, store: "Searchable", stored: Float[Tensor, "Rc D"]
) -> Looks | None:
    """Where the first vectors of an item look; None where the model has no such maps.

    Args:
        model: that made the stored vectors.
        item: with a picture.
        store: that holds them.
        stored: its vectors in the store, as many as are of interest.
    """
    attention = patch_attention(model, item, "candidate")
    if attention is None:
        return None
    attention = attention[: len(stored)]
    even = attention.mean(dim=(1, 2), keepdim=True).clamp(min=1e-12)
    anew = store.project(model.encode_candidate([item])[0, : len(stored)])
    agreement = torch.nn.functional.cosine_similarity(anew, stored, dim=1).min()
    return Looks(attention / even, agreement.item())
