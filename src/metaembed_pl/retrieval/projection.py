"""A projection: vectors of a model's width D kept with W < D components each.

An item then takes W / D of the bytes, and a search W / D of the multiplications. The rows of a
projection are the leading right singular vectors of some items' vectors, as they are, not centred:
of all W-dimensional subspaces this one keeps most of these vectors, and so of their products.

What is left of a vector is normalised again, of candidates and of queries alike. On the emoji
model's vectors (docs/log.md) that keeps as many of the ten nearest at half the width, and more at a
quarter and below, where it also finds more right answers: an item that lies outside of the subspace
is not found the worse for it. Scores are cosines in the subspace, and lie in [-1, 1] as ever.

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
        """The projection that keeps most of some items' vectors.

        Args:
            vectors: of some hundred items, some at a time: only their D x D products are kept.
            width: of what is kept.

        Raises:
            UserError: fewer vectors than `width`, or the width is not below theirs.
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
        # A direction and its opposite serve alike: one of them is chosen.
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        return cls((rows * largest.sign()).float().contiguous())

    @classmethod
    def first(cls, model_width: int, width: int) -> "Projection":
        """The first components alone: of a model that was trained so that these serve.

        >>> Projection.first(3, 2)(torch.tensor([0.3, 0.4, 0.866]))
        tensor([0.6000, 0.8000])
        """
        check_width(width, model_width)
        return cls(torch.eye(width, model_width))

    @property
    def width(self) -> int:
        """Of a projected vector."""
        return self.rows.shape[0]

    @property
    def model_width(self) -> int:
        """Of a vector that can be projected."""
        return self.rows.shape[1]

    def __call__(self, vectors: Float[Tensor, "*N D"]) -> Float[Tensor, "*N W"]:
        """Unit vectors of `width` components, float32.

        >>> project = Projection(torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]))
        >>> project(torch.tensor([0.3, 0.4, 0.866]))
        tensor([0.6000, 0.8000])
        """
        return normalize(vectors.float() @ self.rows.to(vectors.device).T, dim=-1)

    def to_bytes(self) -> bytes:
        """As safetensors; of equal projections equal bytes."""
        return save({NAME: self.rows})

    @classmethod
    def from_bytes(cls, content: bytes, width: int) -> "Projection":
        """What `to_bytes` made, of a projection to this width.

        Raises:
            UserError: it is none.
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
        """That of a store.

        Raises:
            UserError: it is missing, or another than the store's manifest names.
        """
        content = file.read_bytes() if file.exists() else b""
        if digest_of(content) != digest:
            raise UserError(
                f"{file} is missing, damaged or another store's: without it nothing can be "
                "searched or added; restore a copy, or embed the items again"
            )
        return cls.from_bytes(content, width)


def digest_of(content: bytes) -> str:
    """Tells one projection from another."""
    return hashlib.sha256(content).hexdigest()


def check_width(width: int, model_width: int) -> None:
    """Refuse a width that vectors cannot be projected to.

    Raises:
        UserError: it is not below the model's, or not a number of components.
    """
    if not 1 <= width < model_width:
        raise UserError(
            f"a projection has between 1 and {model_width - 1} components, as the model's vectors "
            f"have {model_width}; got {width}"
        )
