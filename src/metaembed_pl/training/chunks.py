"""Split the rows of a batch into chunks of similar length: less padding, the same meta embeddings.

N: rows of one side    R: meta embeddings of a row    D: their width
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.data.collate import Chunk, Inputs, Side
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.training.gather import maximum_over_ranks


def encode(embedder: MetaEmbedder, inputs: Inputs, side: Side) -> Float[Tensor, "N R D"]:
    """Meta embeddings of all rows of one side, in their order; one graph for all chunks."""
    if isinstance(inputs, dict):
        return embedder(inputs, side)
    parts: list[Tensor] = []
    nothing: Tensor | float = 0.0
    for number, (chunk, weight) in enumerate(in_step(embedder, inputs, side)):
        found = embedder(chunk.inputs_on(embedder.device), side, is_first=number == 0)
        if weight:
            parts.append(found)
        else:
            nothing = nothing + 0 * found.sum()
    return in_order(inputs, parts) + nothing


def in_step(
    embedder: MetaEmbedder, chunks: Sequence[Chunk], side: Side
) -> Iterator[tuple[Chunk, float]]:
    """The chunks with the weight 1, and the passes that only keep step with weight 0.

    Where weights are shared out every rank must make equally many passes, or the others wait for
    ever: one with fewer chunks encodes a row that shows nothing.
    """
    missing = 0
    if embedder.shared == "weights":
        missing = maximum_over_ranks(len(chunks), embedder.device) - len(chunks)
    yield from ((chunk, 1.0) for chunk in chunks)
    if missing:
        nothing = Chunk(torch.arange(0), embedder.processor().smallest_row(side))
        yield from ((nothing, 0.0) for _ in range(missing))


def in_order(chunks: Sequence[Chunk], parts: Sequence[Tensor]) -> Float[Tensor, "N R D"]:
    """What was found of each chunk as rows of the batch."""
    found = torch.cat(list(parts))
    return found[torch.cat([chunk.rows for chunk in chunks]).argsort().to(found.device)]
