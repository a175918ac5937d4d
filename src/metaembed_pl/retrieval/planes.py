"""The vectors of a store on disk: one memory-mapped file for each nested group of slots.

A search with r_c vectors per candidate reads only the files of the first r_c slots:

    >>> spans([Budget(1, 1), Budget(2, 4), Budget(4, 8), Budget(8, 16), Budget(16, 64)])
    [(0, 1), (1, 4), (4, 8), (8, 16), (16, 64)]

N: items    n: items read at a time    S: slots of a file    R: slots in all    D: width
"""

import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer, Shaped
from torch import Tensor

from metaembed_pl.budget import Budget
from metaembed_pl.retrieval.manifest import Manifest
from metaembed_pl.retrieval.mapped import MappedFiles

TORCH_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "int8": torch.int8,
}


class Plane(NamedTuple):
    """The vectors of some slots: of every item, from `first` on."""

    first: int
    vectors: Shaped[Tensor, "N S D"]
    scales: Float[Tensor, "N S 1"] | None

    def read_into(
        self, block: Float[Tensor, "n S _"], rows: slice | Integer[Tensor, " n"]
    ) -> Float[Tensor, "n S _"]:
        """Fill a block, in its dtype and on its device, with vectors of items.

        A block of fewer components is filled with the first components, as unit vectors.
        """
        width, stored = block.shape[2], self.vectors
        is_narrow = width < stored.shape[2]
        block.copy_(_some(stored[:, :, :width] if is_narrow else stored, rows))
        if self.scales is not None:
            block.mul_(_some(self.scales, rows).to(block.device))
        if is_narrow:
            norms = torch.linalg.vector_norm(block, dim=2, keepdim=True, dtype=torch.float32)
            block.div_(norms.clamp_(min=1e-12))
        return block


def read(
    planes: Sequence[Plane], r_c: int, rows: Integer[Tensor, " n"], width: int | None = None
) -> Float[Tensor, "n r_c _"]:
    """The first vectors of some items, or their first `width` components, in float32."""
    vectors = torch.empty(len(rows), r_c, width or planes[0].vectors.shape[2])
    for plane in planes:
        if plane.first < r_c:
            end = plane.first + plane.vectors.shape[1]
            plane.read_into(vectors[:, plane.first : end], rows)
    return vectors


def _some(values: Shaped[Tensor, "N S _"], rows: slice | Integer[Tensor, " n"]) -> Tensor:
    # A tensor in brackets takes four times as long for fifty rows.
    return values[rows] if isinstance(rows, slice) else values.index_select(0, rows)


def spans(groups: Sequence[Budget]) -> list[tuple[int, int]]:
    """First slot and end of each file."""
    counts = sorted({group.r_c for group in groups})
    return list(itertools.pairwise([0, *counts]))


def vector_bytes(manifest: Manifest, width: int | None = None) -> int:
    """Bytes of a stored vector, or of its first components, including its scale."""
    size = TORCH_DTYPES[manifest.dtype].itemsize * (width or manifest.width)
    return size + 4 if manifest.dtype == "int8" else size


def append_plane(
    folder: Path,
    manifest: Manifest,
    span: tuple[int, int],
    vectors: Shaped[Tensor, "N S D"],
    scales: Float[Tensor, "N S 1"] | None,
) -> None:
    """Write stored vectors of some slots after those that the manifest counts."""
    for suffix, values in ((manifest.dtype, vectors), ("scale", scales)):
        if values is not None:
            content = values.contiguous().view(torch.uint8).numpy().tobytes()
            row_bytes = values.itemsize * values.shape[1] * values.shape[2]
            append_bytes(folder / _name(*span, suffix), content, manifest.num_rows * row_bytes)


def append_bytes(file: Path, content: bytes, start: int) -> None:
    """Write bytes at `start`, where the file is truncated; they are on disk when this returns."""
    with file.open("r+b" if file.exists() else "w+b") as opened:
        opened.truncate(start)
        opened.seek(start)
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())


def quantized(
    vectors: Float[Tensor, "N S D"], dtype: str
) -> tuple[Shaped[Tensor, "N S D"], Float[Tensor, "N S 1"] | None]:
    """Vectors as they are stored, and for int8 the scale of each."""
    if dtype != "int8":
        return vectors.to(TORCH_DTYPES[dtype]), None
    vectors = vectors.float()
    scales = vectors.abs().amax(dim=2, keepdim=True).clamp(min=1e-12) / 127
    return (vectors / scales).round().to(torch.int8), scales


def map_planes(files: MappedFiles, manifest: Manifest) -> list[Plane]:
    """The vectors of a store.

    Raises:
        UserError: a file is shorter than the manifest says.
    """
    planes = []
    for first, end in spans(manifest.groups):
        shape = manifest.num_rows, end - first
        name = _name(first, end, manifest.dtype)
        vectors = files.tensor(name, (*shape, manifest.width), TORCH_DTYPES[manifest.dtype])
        scales = None
        if manifest.dtype == "int8":
            scales = files.tensor(_name(first, end, "scale"), (*shape, 1), torch.float32)
        planes.append(Plane(first, vectors, scales))
    return planes


def _name(first: int, end: int, suffix: str) -> str:
    return f"slots-{first:03d}-{end - 1:03d}.{suffix}"
