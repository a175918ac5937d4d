"""The common base of stores and Qdrant collections: searchable vectors of one model.

Q: queries    Rm, Rq: their vectors, all and used    D, W: width of the model's and stored vectors
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget, check_budget
from metaembed_pl.errors import UserError
from metaembed_pl.late_interaction import check_vectors
from metaembed_pl.retrieval.projection import Projection

if TYPE_CHECKING:
    from metaembed_pl.model.encoder import Encoder, Engine


@dataclass(frozen=True)
class VectorSpace:
    """The kind of vectors in a store or collection.

    Args:
        identity: of the model that made them, see `identity_of`.
        groups: the model's nested groups.
        width: of a stored vector.
        widths: smaller widths the model was trained at, for searches that read fewer components.
    """

    identity: str
    groups: tuple[Budget, ...]
    width: int
    widths: tuple[int, ...] = field(default=(), kw_only=True)


class Searchable(ABC):
    """Vectors of one model, searchable with queries of the same model."""

    @property
    @abstractmethod
    def folder(self) -> Path | str:
        """Its folder or address."""

    @property
    @abstractmethod
    def description(self) -> VectorSpace:
        """The kind of its vectors."""

    @property
    @abstractmethod
    def projection(self) -> Projection | None:
        """The projection of its vectors to fewer components; None: they have all of the model's."""

    @property
    def groups(self) -> tuple[Budget, ...]:
        """The nested groups of the model."""
        return self.description.groups

    @property
    def width(self) -> int:
        """Width of a stored vector."""
        return self.description.width

    @property
    def widths(self) -> tuple[int, ...]:
        """Smaller widths that a budget may have."""
        return self.description.widths

    def check_budget(self, budget: Budget | str | None = None) -> Budget:
        """Check a budget; None: all vectors.

        Raises:
            UserError: the model was not trained for it.
        """
        return check_budget(budget or self.groups[-1], self.groups, self.widths)

    @property
    def model_width(self) -> int:
        """Width of the model's vectors: of queries, and of vectors to add."""
        return self.width if self.projection is None else self.projection.model_width

    @property
    def identity(self) -> str:
        """Identity of the model."""
        return self.description.identity

    def project(self, vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N W"]:
        """Project vectors of the model to the stored width; searches do this themselves."""
        return vectors if self.projection is None else self.projection(vectors)

    def check_model(self, model: "Engine | Encoder") -> None:
        """Refuse another model than the one that made the vectors.

        Raises:
            UserError: it is another model.
        """
        from metaembed_pl.model.identity import identity_of

        identity = identity_of(model)
        if identity != self.identity:
            raise UserError(
                f"{self.folder} holds the vectors of another model (identity {self.identity:.12}, "
                f"this model's is {identity:.12}): use the model it was embedded with, or embed "
                "the items again into another store"
            )

    def accept(self, queries: Float[Tensor, "Q Rm D"]) -> Float[Tensor, "Q Rq W"]:
        """Check queries of the model, and project the vectors that the stored groups use.

        Raises:
            UserError: they have another shape, or are not finite.
        """
        expected = self.groups[-1].r_q, self.model_width
        check_vectors(queries, "queries")
        used = queries[:, : expected[0]]
        if tuple(used.shape[1:]) != expected:
            hint = "" if self.projection is None else f" (they are projected to {self.width} here)"
            raise UserError(
                f"queries must be N x {expected[0]} x {expected[1]} for {self.folder}{hint}, "
                f"got {' x '.join(map(str, queries.shape))}: encode them with the store's model"
            )
        if not used.isfinite().all():
            raise UserError("queries contain NaN or infinity")
        return self.project(used)
