"""The common base of stores and Qdrant collections: searchable vectors of one model.

Q: queries    Rq: their vectors    D: width of the model's vectors    W: of the stored ones
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget, check_budget
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.projection import Projection

if TYPE_CHECKING:
    from metaembed_pl.model.encoder import Encoder, Engine


@dataclass(frozen=True)
class VectorSpace:
    """Which vectors are held.

    Args:
        identity: of the model whose meta embeddings these are, as `identity_of` tells it.
        groups: the model's nested groups.
        width: of a stored vector.
        widths: below that, at which the model was trained: a search may read no more components.
    """

    identity: str
    groups: tuple[Budget, ...]
    width: int
    widths: tuple[int, ...] = field(default=(), kw_only=True)


class Searchable(ABC):
    """Holds the vectors of one model, and takes queries of that model alone."""

    @property
    @abstractmethod
    def folder(self) -> Path | str:
        """Where it is."""

    @property
    @abstractmethod
    def description(self) -> VectorSpace:
        """Which vectors these are."""

    @property
    @abstractmethod
    def projection(self) -> Projection | None:
        """To fewer components than the model's vectors have; None: they are kept as they are."""

    @property
    def groups(self) -> tuple[Budget, ...]:
        """The nested groups of the model."""
        return self.description.groups

    @property
    def width(self) -> int:
        """Of a stored vector."""
        return self.description.width

    @property
    def widths(self) -> tuple[int, ...]:
        """Smaller ones, that a budget may name."""
        return self.description.widths

    def check_budget(self, budget: Budget | str | None = None) -> Budget:
        """A budget that can be searched at; None: all vectors.

        Raises:
            UserError: the model was not trained for it.
        """
        return check_budget(budget or self.groups[-1], self.groups, self.widths)

    @property
    def model_width(self) -> int:
        """Of the model's vectors: of queries, and of what is added."""
        return self.width if self.projection is None else self.projection.model_width

    @property
    def identity(self) -> str:
        """Of the model whose vectors these are."""
        return self.description.identity

    def project(self, vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N W"]:
        """Vectors of the model as they are kept, but for rounding; searches do so by themselves."""
        return vectors if self.projection is None else self.projection(vectors)

    def check_model(self, model: "Engine | Encoder") -> None:
        """Refuse a model other than that whose vectors these are.

        Raises:
            UserError: it is another one.
        """
        from metaembed_pl.model.identity import identity_of

        identity = identity_of(model)
        if identity != self.identity:
            raise UserError(
                f"{self.folder} holds the vectors of another model (identity {self.identity:.12}, "
                f"this model's is {identity:.12}): use the model it was embedded with, or embed "
                "the items again into another store"
            )

    def accept(self, queries: Float[Tensor, "Q Rq D"]) -> Float[Tensor, "Q Rq W"]:
        """Queries of the model, to be compared with what is kept.

        Raises:
            UserError: they have another shape, or are not finite.
        """
        expected = self.groups[-1].r_q, self.model_width
        if queries.ndim != 3 or tuple(queries.shape[1:]) != expected:
            kept = "" if self.projection is None else f" (they are projected to {self.width} here)"
            raise UserError(
                f"queries must be N x {expected[0]} x {expected[1]} for {self.folder}{kept}, "
                f"got {' x '.join(map(str, queries.shape))}: encode them with the store's model"
            )
        if not queries.isfinite().all():
            raise UserError("queries contain NaN or infinity")
        return self.project(queries)
