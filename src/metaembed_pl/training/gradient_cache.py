"""Encode a batch in chunks of similar length, with or without gradient caching.

Chunks reduce padding. Gradient caching computes the gradient of a large batch in the memory of one
chunk. The loss needs the meta embeddings of the complete batch, but their backward pass can go
through the backbone in chunks:

1. encode the batch chunk by chunk, keeping only the meta embeddings;
2. compute the loss and its gradient at the meta embeddings;
3. encode each chunk again, with the same dropout, and go backwards from that gradient.

The result is the exact gradient of the complete batch, at the cost of one additional forward pass.
A frozen vision tower and its projector run only in the first pass.

N: rows of one side    b: rows of a chunk    R: meta embeddings of a row    D: their width

Source: Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021,
arXiv 2101.06983.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.data.collate import Chunk, Inputs, Side
from metaembed_pl.errors import UserError
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.vision import Seen
from metaembed_pl.ranks import maximum_over_ranks


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
    """The chunks with weight 1, and with weight 0 additional passes to keep in step.

    If weights are sharded, every rank must run equally many passes, or the others would wait
    forever: a rank with fewer chunks encodes an empty row.
    """
    missing = 0
    if embedder.shared == "weights":
        missing = maximum_over_ranks(len(chunks), embedder.device) - len(chunks)
    yield from ((chunk, 1.0) for chunk in chunks)
    if missing:
        nothing = Chunk(torch.arange(0), embedder.processor().smallest_row(side))
        yield from ((nothing, 0.0) for _ in range(missing))


def in_order(chunks: Sequence[Chunk], parts: Sequence[Tensor]) -> Float[Tensor, "N R D"]:
    """The results of chunks, as rows of the batch."""
    found = torch.cat(list(parts))
    return found[torch.cat([chunk.rows for chunk in chunks]).argsort().to(found.device)]


@dataclass
class GradientCacheConfig:
    """Gradient caching: the gradient of a large batch in the memory of one chunk.

    Args:
        max_tokens: tokens per chunk, padding and meta tokens included. More is faster and takes
            more memory; the gradient is the same.
    """

    max_tokens: int = 16384

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"gradient_cache.max_tokens must be at least 1, got {self.max_tokens}")


@dataclass
class _Pass:
    """What is needed to encode a chunk again with the same result.

    Args:
        side: of its rows.
        chunk: the rows.
        weight: 0 for a pass that only keeps in step with other ranks.
        random_state: before it was encoded.
        seen: outputs of the vision tower, if it is frozen.
    """

    side: Side
    chunk: Chunk
    weight: float
    random_state: list[Tensor]
    seen: list[Seen] = field(default_factory=list)


class GradientCache:
    """Encodes one batch with an embedder in training."""

    def __init__(self, embedder: MetaEmbedder):
        self._embedder = embedder
        self._passes: list[_Pass] = []
        self._sees_once = embedder.vision_is_frozen

    @property
    def num_passes(self) -> int:
        """The number of chunks encoded, the same on every rank."""
        return len(self._passes)

    def encode(self, chunks: Sequence[Chunk], side: Side) -> Float[Tensor, "N R D"]:
        """Meta embeddings of all rows of one side, as leaves that require a gradient."""
        device = self._embedder.device
        parts = []
        for chunk, weight in in_step(self._embedder, chunks, side):
            done = _Pass(side, chunk, weight, _random_state(device))
            with torch.no_grad():
                parts.append(self._embed(done))
            self._passes.append(done)
        return in_order(chunks, parts[: len(chunks)]).requires_grad_()

    def surrogates(self, gradients: Mapping[Side, Float[Tensor, "N R D"]]) -> Iterator[Tensor]:
        """A number for each chunk; their gradients add up to that of the loss.

        Run the backward pass of each before the next: only one graph is in memory.

        Args:
            gradients: of the loss at the results of `encode`, by side.
        """
        device = self._embedder.device
        for done in self._passes:
            with _as_then(done.random_state, device):
                again = self._embed(done)
            done.seen.clear()
            of_chunk = gradients[done.side][done.chunk.rows.to(device)]
            yield done.weight * (again * of_chunk).sum()

    def _embed(self, done: _Pass) -> Float[Tensor, "b R D"]:
        # Autocast caches the weights that it has cast, without gradient in the first pass.
        torch.clear_autocast_cache()
        # Pixels that are not needed again stay on the CPU.
        staying = ("pixel_values",) if done.seen else ()
        inputs = done.chunk.inputs_on(self._embedder.device, but=staying)
        with self._seeing_once(done.seen):
            return self._embedder(inputs, done.side)

    @contextmanager
    def _seeing_once(self, seen: list[Seen]) -> Iterator[None]:
        """While open, outputs of a frozen vision tower are stored in `seen` and reused."""
        if not self._sees_once:
            yield
            return
        embedder: Any = self._embedder
        see, known = embedder.see, iter(tuple(seen))

        def see_once(pictures: dict[str, Tensor]) -> Seen:
            found = next(known, None)
            if found is None:
                found = see(pictures)
                seen.append(found)
            return found

        embedder.see = see_once
        try:
            yield
        finally:
            del embedder.see


def _random_state(device: torch.device) -> list[Tensor]:
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


@contextmanager
def _as_then(random_state: list[Tensor], device: torch.device) -> Iterator[None]:
    """While open, random numbers repeat those after `random_state` was taken."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(random_state[0])
        for state in random_state[1:]:
            torch.cuda.set_rng_state(state, device)
        yield
