"""Gradient caching: the gradient of a large batch, in the memory of a few rows.

The loss needs the meta embeddings of the whole batch, but nothing forces their backward pass to go
through the backbone at once:

1. encode the batch chunk by chunk, keeping only the meta embeddings;
2. compute the loss and its gradient at the meta embeddings;
3. encode each chunk again, with the same dropout, and go backwards from that gradient.

What comes out is the gradient of the whole batch, not an estimate; what it costs is one forward
pass more. A frozen vision tower runs only in the first pass.

N: rows of one side    b: rows of a chunk    R: meta embeddings of a row    D: their width

Source: Gao et al., "Scaling deep contrastive learning batch size under memory limited setup", 2021,
arXiv 2101.06983.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from metaembed_pl.data.collate import Chunk, Side
from metaembed_pl.errors import UserError
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.training.gather import maximum_over_ranks


@dataclass
class GradientCacheConfig:
    """The gradient of a large batch, in the memory of a few rows.

    Args:
        max_tokens: of a chunk, padding and meta tokens included. More is faster and takes more
            memory; the gradient is the same.
    """

    max_tokens: int = 16384

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UserError(f"gradient_cache.max_tokens must be at least 1, got {self.max_tokens}")


@dataclass
class _Pass:
    """What encoding a chunk again needs to give the same.

    Args:
        side: of its rows.
        chunk: the rows.
        weight: 0 for a chunk that only keeps step with other ranks.
        random_state: before it was encoded.
        seen: what the frozen vision tower gave.
    """

    side: Side
    chunk: Chunk
    weight: float
    random_state: list[Tensor]
    seen: list[Any] = field(default_factory=list)


class GradientCache:
    """One batch on its way through an embedder.

    Args:
        embedder: in training.
    """

    def __init__(self, embedder: MetaEmbedder):
        self._embedder = embedder
        self._passes: list[_Pass] = []
        family = embedder.processing.family
        tower = embedder.backbone.get_submodule(family.vision_module)
        is_frozen = not any(parameter.requires_grad for parameter in tower.parameters())
        self._frozen_tower = tower if is_frozen else None

    def encode(self, chunks: Sequence[Chunk], side: Side) -> Float[Tensor, "N R D"]:
        """Meta embeddings of all rows of one side: leaves that want a gradient.

        Every rank makes equally many passes, so that none waits in a collective: one with fewer
        chunks encodes its last one, the smallest, again.
        """
        device = self._embedder.device
        missing = maximum_over_ranks(len(chunks), device) - len(chunks)
        parts = []
        for number, chunk in enumerate([*chunks, *[chunks[-1]] * missing]):
            weight = 1.0 if number < len(chunks) else 0.0
            done = _Pass(side, chunk, weight, _random_state(device))
            with torch.no_grad(), _recorded(self._frozen_tower, done.seen):
                parts.append(self._embed(done))
            self._passes.append(done)
        embeddings = torch.cat(parts[: len(chunks)])
        found = torch.empty_like(embeddings)
        found[torch.cat([chunk.rows for chunk in chunks]).to(device)] = embeddings
        return found.requires_grad_()

    def surrogates(self, gradients: Mapping[Side, Float[Tensor, "N R D"]]) -> Iterator[Tensor]:
        """One number a chunk; the gradients of them all add up to that of the loss.

        Go backwards from each before taking the next: its graph is all that is held.

        Args:
            gradients: of the loss at what `encode` returned, by side.
        """
        device = self._embedder.device
        for done in self._passes:
            with (
                _as_then(done.random_state, device),
                _replayed(self._frozen_tower, done.seen),
            ):
                again = self._embed(done)
            of_chunk = gradients[done.side][done.chunk.rows.to(device)]
            yield done.weight * (again * of_chunk).sum()

    def _embed(self, done: _Pass) -> Float[Tensor, "b R D"]:
        # Autocast keeps weights it has cast; those cast without gradient must not serve again.
        torch.clear_autocast_cache()
        device = self._embedder.device
        inputs = {k: v.to(device, non_blocking=True) for k, v in done.chunk.inputs.items()}
        return self._embedder(inputs, done.side)


def _random_state(device: torch.device) -> list[Tensor]:
    state = [torch.get_rng_state()]
    return [*state, torch.cuda.get_rng_state(device)] if device.type == "cuda" else state


@contextmanager
def _as_then(random_state: list[Tensor], device: torch.device) -> Iterator[None]:
    """While open, random numbers come as they came after `random_state` was taken."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.set_rng_state(random_state[0])
        for state in random_state[1:]:
            torch.cuda.set_rng_state(state, device)
        yield


@contextmanager
def _recorded(module: nn.Module | None, outputs: list[Any]) -> Iterator[None]:
    """While open, what the module computes is kept in `outputs`."""
    if module is None:
        yield
        return
    # A copy: transformers writes into the output (not into its tensors) once it has it.
    handle = module.register_forward_hook(
        lambda _module, _args, output: outputs.append(copy.copy(output))
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _replayed(module: nn.Module | None, outputs: list[Any]) -> Iterator[None]:
    """While open, the module gives what it gave before, in the same order, without computing."""
    if module is None:
        yield
        return
    waiting = iter(outputs)
    module.forward = lambda *_args, **_kwargs: next(waiting)
    try:
        yield
    finally:
        del module.forward
