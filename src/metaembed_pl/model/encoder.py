"""The model interface that stores and evaluations use: ours, or a model of another library."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from metaembed_pl.budget import Budget
from metaembed_pl.data.collate import Side
from metaembed_pl.item import Item
from metaembed_pl.model.encoding import Prepared

T = TypeVar("T")


@runtime_checkable
class MultiVector(Protocol):
    """The size of a model's vectors."""

    @property
    def groups(self) -> Sequence[Budget]:
        """Budgets it can be searched at, smallest first; the last one is its number of vectors."""
        ...

    @property
    def widths(self) -> Sequence[int]:
        """Smaller widths at which its first components were trained."""
        ...

    @property
    def width(self) -> int:
        """The width of a vector."""
        ...


@runtime_checkable
class Encoder(MultiVector, Protocol):
    """Turns items into vectors: a `MetaEmbedder`, or a `Baseline` of evaluation/baselines.py."""

    @property
    def device(self) -> torch.device:
        """The device on which vectors are compared."""
        ...

    def encode_query(self, items: Sequence[Any], batch_size: int = 32) -> Tensor:
        """(N, R_q, D), on the CPU."""
        ...

    def encode_candidate(self, items: Sequence[Any], batch_size: int = 32) -> Tensor:
        """(N, R_c, D), on the CPU."""
        ...

    def settings(self) -> dict[str, Any]:
        """Its settings, for reports."""
        ...


@runtime_checkable
class Preparer(Protocol):
    """Prepares items for an `Engine`, in this process or in a worker."""

    def prepared(
        self, items: Sequence[Item], side: Side, chunk_tokens: int, about: Any = None
    ) -> Prepared:
        """A window."""
        ...


@runtime_checkable
class Engine(MultiVector, Protocol):
    """Embeds many items: a `MetaEmbedder`, or vLLM (serving/vllm_engine.py)."""

    def processor(self) -> Preparer:
        """Prepares windows of items."""
        ...

    def encoded(
        self,
        windows: Iterable[T],
        prepare: Callable[[T], Prepared],
        side: Side,
        num_workers: int | None = 0,
        num_ranks: int = 1,
    ) -> Iterator[tuple[Prepared, Tensor]]:
        """The results of `prepare`, with fp32 unit vectors (N, R, D) on the CPU."""
        ...
