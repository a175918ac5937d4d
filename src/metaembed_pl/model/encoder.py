"""The model interface that stores and evaluations use: ours, or a model of another library."""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from metaembed_pl.budget import Budget


@runtime_checkable
class Encoder(Protocol):
    """Turns items into vectors: a `MetaEmbedder`, or a `Baseline` of evaluation/baselines.py."""

    @property
    def groups(self) -> Sequence[Budget]:
        """Budgets it can be searched at, smallest first; the last one says how many it gives."""
        ...

    @property
    def widths(self) -> Sequence[int]:
        """Smaller ones, that a budget may name."""
        ...

    @property
    def width(self) -> int:
        """Of a vector."""
        ...

    @property
    def device(self) -> torch.device:
        """Where vectors are compared."""
        ...

    def encode_query(self, items: Sequence[Any], batch_size: int = 32) -> Tensor:
        """(N, R_q, D), on the CPU."""
        ...

    def encode_candidate(self, items: Sequence[Any], batch_size: int = 32) -> Tensor:
        """(N, R_c, D), on the CPU."""
        ...

    def settings(self) -> dict[str, Any]:
        """What a report says of it."""
        ...
