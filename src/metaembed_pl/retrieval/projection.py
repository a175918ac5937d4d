"""A projection of a model's vectors from width D to W < D components.

An item then takes W / D of the bytes, and a search W / D of the multiplications. The rows of a
projection are the leading right singular vectors of some items' vectors, not centred: of all
W-dimensional subspaces, this one preserves most of these vectors, and so of their dot products.

Projected vectors of candidates and queries are normalised again. On the emoji model's vectors
(docs/log.md) this preserves as many of the ten nearest neighbours at half the width, and more at a
quarter and below, where it also finds more right answers: items outside the subspace are not at a
disadvantage. Scores are cosines in the subspace, and lie in [-1, 1] as before.

N: items    R: their vectors    D: width of the model's vectors    W: of the projected ones
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn.functional import normalize

from metaembed_pl.errors import UserError

PROJECTION_FILE = "projection.safetensors"
NAME = "rows"


@dataclass(frozen=True)
class Projection:
    """A linear map to fewer components.

    Args:
        rows: orthonormal, float32.
    """

    rows: Float[Tensor, "W D"]

    @classmethod
    def learn(cls, vectors: Iterable[Float[Tensor, "_ R D"]], width: int) -> "Projection":
        """The projection that preserves most of some items' vectors.

        Args:
            vectors: of some hundred items, some at a time: only their D x D products stay in
                memory.
            width: of a projected vector.

        Raises:
            UserError: there are fewer vectors than `width`, or it is not below theirs.
        """
        products, count = None, 0
        for some in vectors:
            flat = some.flatten(0, 1).cpu().double()
            products = flat.T @ flat if products is None else products.addmm_(flat.T, flat)
            count += len(flat)
        if products is None or count < width:
            raise UserError(
                f"a projection to {width} components is learned from at least as many vectors; "
                f"got {count}: begin with more items, or keep the model's width"
            )
        check_width(width, len(products))
        rows = torch.linalg.eigh(products).eigenvectors[:, -width:].flip(1).T
        # A direction and its opposite are equivalent: choose one of them.
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        return cls((rows * largest.sign()).float().contiguous())

    @classmethod
    def first(cls, model_width: int, width: int) -> "Projection":
        """The first components, for a model trained at this width.

        >>> Projection.first(3, 2)(torch.tensor([0.3, 0.4, 0.866]))
        tensor([0.6000, 0.8000])
        """
        check_width(width, model_width)
        return cls(torch.eye(width, model_width))

    @property
    def width(self) -> int:
        """Width of a projected vector."""
        return self.rows.shape[0]

    @property
    def model_width(self) -> int:
        """Width of a vector to project."""
        return self.rows.shape[1]

    def __call__(self, vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N W"]:
        """Unit vectors of `width` components, float32.

        >>> project = Projection(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> project(torch.tensor([0.3, 0.4, 0.866]))
        tensor([0.6000, 0.8000])
        """
        return normalize(vectors.float() @ self.rows.to(vectors.device).T, dim=-1)

    def to_bytes(self) -> bytes:
        """As safetensors; equal projections give equal bytes."""
        return save({NAME: self.rows})

    @classmethod
    def from_bytes(cls, content: bytes, width: int) -> "Projection":
        """Read the result of `to_bytes`, for a projection to this width.

        Raises:
            UserError: it is not such a projection.
        """
        try:
            rows = load(content)[NAME]
        except (SafetensorError, KeyError) as error:
            raise UserError(f"not a projection: {error}") from error
        fits = rows.ndim == 2 and rows.dtype == torch.float32 and len(rows) == width
        if not fits or not rows.isfinite().all():
            shape = " x ".join(map(str, rows.shape))
            raise UserError(
                f"this is no projection to {width} components, but {rows.dtype} of {shape}"
            )
        return cls(rows)

    @classmethod
    def read(cls, file: Path, digest: str, width: int) -> "Projection":
        """Read the projection of a store.

        Raises:
            UserError: it is missing, or not the one that the store's manifest names.
        """
        content = file.read_bytes() if file.exists() else b""
        if digest_of(content) != digest:
            raise UserError(
                f"{file} is missing, damaged or another store's: without it nothing can be "
                "searched or added; restore a copy, or embed the items again"
            )
        return cls.from_bytes(content, width)


def digest_of(content: bytes) -> str:
    """The SHA-256 of a projection's file."""
    return hashlib.sha256(content).hexdigest()


def check_width(width: int, model_width: int) -> None:
    """Refuse a width that vectors cannot be projected to.

    Raises:
        UserError: it is not positive and below the model's.
    """
    if not 1 <= width < model_width:
        raise UserError(
            f"a projection has between 1 and {model_width - 1} components, as the model's vectors "
            f"have {model_width}; got {width}"
        )
