"""The layout of a store's items in a collection: an item is a point.

Qdrant scores complete named vectors, so a point has one for each searchable candidate count:
`first_8` has the first 8 vectors of an item. Prefixes are repeated: 1, 4, 8, 16 and 64 vectors are
93, 45 % more than 64; 1, 8 and 64 are 73, 14 % more.

The smallest count has an index (HNSW) and is in memory; if it is 1, it is a plain vector. Larger
counts have no index and are on disk: they are read for the few items that a cascade rescores.

N: items    R: their vectors    D: width
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any
from uuid import UUID, uuid5

from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.projection import Projection
from metaembed_pl.retrieval.qdrant.packages import models
from metaembed_pl.retrieval.searchable import VectorSpace
from metaembed_pl.retrieval.store import Store

FORMAT = 1
DTYPES = {
    "fp32": models.Datatype.FLOAT32,
    "fp16": models.Datatype.FLOAT16,
    "turbo8": models.Datatype.TURBO8,
}
PROJECTION_CHARACTERS = 2**23
"""Limit, such as for 5120 components to 300. A server accepts requests of 32 MiB, and copies the
metadata of a collection to every machine."""
QUANTIZATIONS = ("int8", "binary")
IDS = UUID("6f0c3f3e-6d0b-5d5c-9a52-3f0a1c0a7f11")
"""Qdrant's points have UUIDs; an item's UUID is made from its id and this namespace."""


@dataclass(frozen=True)
class Layout(VectorSpace):
    """The contents and settings of a collection, saved in its metadata.

    Searches in Qdrant read full vectors, whatever `widths` the model was trained at.

    Args:
        counts: searchable numbers of candidate vectors, ascending.
        dtype: of stored components: fp32, fp16 or turbo8.
        quantization: of a coarser copy of the smallest count, which is searched first; None: none.
        on_disk: keep the smallest count and its index on disk as well.
        projection: the store's, as text, since queries need it; None: there is none.
    """

    counts: tuple[int, ...]
    dtype: str = "fp16"
    quantization: str | None = None
    on_disk: bool = False
    projection: str | None = None

    def __post_init__(self) -> None:
        trained = sorted({group.r_c for group in self.groups})
        unknown = sorted(set(self.counts) - set(trained))
        if unknown or not self.counts:
            raise UserError(
                f"the model was not trained at {', '.join(map(str, unknown)) or 'no'} candidate "
                f"vectors; choose one of {', '.join(map(str, trained))}"
            )
        object.__setattr__(self, "counts", tuple(sorted(set(self.counts))))
        for name, value, known in (
            ("dtype", self.dtype, tuple(DTYPES)),
            ("quantization", self.quantization, (*QUANTIZATIONS, None)),
        ):
            if value not in known:
                raise UserError(f"{name} {value!r}: choose one of {', '.join(map(str, known))}")

    @classmethod
    def of(cls, store: Store, counts: Sequence[int] | None = None, **settings: Any) -> "Layout":
        """The layout of a store; settings that are None have their defaults.

        Raises:
            UserError: a setting is not valid.
        """
        given = {name: value for name, value in settings.items() if value is not None}
        if store.dtype == "fp32":
            given = {"dtype": "fp32", **given}
        every = tuple(sorted({group.r_c for group in store.groups}))
        counts = every if counts is None else tuple(counts)
        if store.projection is not None:
            given["projection"] = _as_text(store.projection)
        given["widths"] = store.widths
        return cls(store.identity, store.groups, store.width, counts, **given)

    def to_json(self) -> dict[str, Any]:
        """The layout as metadata of a collection."""
        value = {"format": FORMAT, **asdict(self), "groups": [str(group) for group in self.groups]}
        for name in ("projection", "widths"):
            if not value[name]:
                del value[name]  # readable by older versions if not used
        return value

    @classmethod
    def from_json(cls, value: Any) -> "Layout":
        """Read the layout from the metadata of a collection.

        Raises:
            UserError: it is not a layout.
        """
        try:
            value = dict(value)
            if value.pop("format") != FORMAT:
                raise UserError("made by another version of this package")
            groups = parse_groups(value.pop("groups"))
            counts, widths = (tuple(value.pop(name, ())) for name in ("counts", "widths"))
            return cls(groups=groups, counts=counts, widths=widths, **value)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"not a collection of a store: {error}") from error

    def read_projection(self) -> Projection | None:
        """The store's projection.

        Raises:
            UserError: the saved text is not a projection.
        """
        if self.projection is None:
            return None
        try:
            content = base64.b64decode(self.projection, validate=True)
            return Projection.from_bytes(content, self.width)
        except ValueError as error:  # UserError is one
            raise UserError(f"not a collection of a store: {error}") from error

    def vectors(self) -> dict[str, models.VectorParams]:
        """The named vectors of a collection."""
        return {name_of(count): self._vector(count) for count in self.counts}

    def _vector(self, count: int) -> models.VectorParams:
        first = count == self.counts[0]
        # With a coarse copy in memory, the vectors are only read to rescore.
        hot = first and not self.on_disk and self.quantization is None
        memory = models.Memory.COLD if self.on_disk else models.Memory.CACHED
        max_sim = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
        return models.VectorParams(
            size=self.width,
            distance=models.Distance.DOT,
            datatype=DTYPES[self.dtype],
            memory=models.Memory.CACHED if hot else models.Memory.COLD,
            hnsw_config=models.HnswConfigDiff(memory=memory)
            if first
            else models.HnswConfigDiff(m=0),
            quantization_config=self._quantized() if first else None,
            multivector_config=max_sim if count > 1 else None,
        )

    def _quantized(self) -> models.ScalarQuantization | models.BinaryQuantization | None:
        memory = models.Memory.COLD if self.on_disk else models.Memory.PINNED
        if self.quantization == "int8":
            return models.ScalarQuantization(
                scalar=models.ScalarQuantizationConfig(type=models.ScalarType.INT8, memory=memory)
            )
        if self.quantization == "binary":
            return models.BinaryQuantization(binary=models.BinaryQuantizationConfig(memory=memory))
        return None

    def points(
        self,
        ids: Sequence[str],
        vectors: Float[Tensor, "N R D"],
        metadata: Sequence[dict[str, Any]],
        revisions: Sequence[str],
    ) -> list[models.PointStruct]:
        """Items as Qdrant's points, with as many vectors of each as the largest count."""
        return [
            models.PointStruct(
                id=point_id(id),
                vector={name_of(count): _rows(of_item[:count]) for count in self.counts},
                payload={"id": id, "revision": now, "metadata": value},
            )
            for id, of_item, value, now in zip(ids, vectors, metadata, revisions, strict=True)
        ]


def _as_text(projection: Projection) -> str:
    text = base64.b64encode(projection.to_bytes()).decode()
    if len(text) > PROJECTION_CHARACTERS:
        raise UserError(
            f"a projection from {projection.model_width} to {projection.width} components is too "
            f"large for what a collection says of itself ({len(text):,} characters, at most "
            f"{PROJECTION_CHARACTERS:,}): embed into a store of less width, or without one"
        )
    return text


def name_of(count: int) -> str:
    """The named vector with the first `count` vectors of an item."""
    return f"first_{count}"


def point_id(id: str) -> str:
    """The UUID of an item's point: the same at each push."""
    return str(uuid5(IDS, id))


def revision(vectors: Float[Tensor, "R D"], metadata: dict[str, Any]) -> str:
    """A digest of an item's vectors and metadata."""
    digest = hashlib.blake2b(vectors.contiguous().numpy().tobytes(), digest_size=8)
    digest.update(json.dumps(metadata, sort_keys=True).encode())
    return digest.hexdigest()


def _rows(vectors: Float[Tensor, "R D"]) -> list[Any]:
    return vectors[0].tolist() if len(vectors) == 1 else vectors.tolist()
