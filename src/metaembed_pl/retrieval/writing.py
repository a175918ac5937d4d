"""Writes the files of a store; nothing counts until its manifest does.

The functions append behind what a manifest counts, and return the manifest that counts more.

N: items    R: their vectors    W: width of a stored vector
"""

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.manifest import Manifest
from metaembed_pl.retrieval.planes import append_bytes, append_plane, quantized, spans
from metaembed_pl.retrieval.projection import PROJECTION_FILE, digest_of
from metaembed_pl.retrieval.rows import append_table, table_of
from metaembed_pl.retrieval.snapshot import DELETED_FILE, Snapshot

COPIED_AT_A_TIME = 4096


def begin_store(
    folder: Path, manifest: Manifest, projection: bytes | None
) -> tuple[Path, Manifest]:
    """Create the folder of data of a new store, and save its projection.

    Returns:
        The folder of data, and the manifest with the projection's digest.
    """
    data = folder / manifest.data
    data.mkdir()
    if projection is not None:
        append_bytes(folder / PROJECTION_FILE, projection, 0)
        manifest = replace(manifest, projection=digest_of(projection))
    return data, manifest


def append_items(
    data: Path,
    manifest: Manifest,
    ids: Sequence[str],
    vectors: Float[Tensor, "N R W"],
    metadata: Sequence[dict[str, Any] | None],
    previews: Sequence[bytes | None],
) -> Manifest:
    """Append new items.

    Raises:
        UserError: metadata that JSON cannot hold.
    """
    for first, end in spans(manifest.groups):
        stored = quantized(vectors[:, first:end].cpu(), manifest.dtype)
        append_plane(data, manifest, (first, end), *stored)
    return append_table(data, manifest, table_of(ids, metadata, previews))


def copy_items(
    data: Path, manifest: Manifest, source: Snapshot, places: Integer[Tensor, " N"]
) -> Manifest:
    """Append items of another store, bit by bit.

    Raises:
        UserError: their ids, metadata or previews are damaged.
    """
    for name in source.table.column_names:
        source.checked(name)
    for some in places.split(COPIED_AT_A_TIME):
        if len(some):
            for plane, span in zip(source.planes, spans(manifest.groups), strict=True):
                scales = None if plane.scales is None else plane.scales[some]
                append_plane(data, manifest, span, plane.vectors[some], scales)
            manifest = append_table(data, manifest, source.table.take(pa.array(some.numpy())))
    return manifest


def append_deleted(data: Path, manifest: Manifest, places: Sequence[int]) -> Manifest:
    """Mark places as deleted."""
    if not places:
        return manifest
    content = np.array(places, dtype=np.int64).tobytes()
    append_bytes(data / DELETED_FILE, content, 8 * manifest.num_deleted)
    return replace(manifest, num_deleted=manifest.num_deleted + len(places))


@contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a store.

    Raises:
        UserError: another process is writing to it.
    """
    with (folder / ".lock").open("a") as lock:
        try:
            # If the process is killed, the system releases the lock.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another process is writing to {folder}: wait for it") from error
        try:
            yield
        finally:
            # Workers forked in the meantime hold the file open as well.
            fcntl.flock(lock, fcntl.LOCK_UN)


def check_items(
    folder: Path,
    ids: Sequence[str],
    embeddings: Tensor,
    metadata: Sequence,
    previews: Sequence,
    shape: tuple[int, int],
) -> None:
    """Refuse items that do not fit each other or the store in `folder`.

    Raises:
        UserError: they do not; `shape` is the number of vectors of an item and their width.
    """
    expected = len(ids), *shape
    if tuple(embeddings.shape) != expected:
        raise UserError(
            f"embeddings must be {' x '.join(map(str, expected))} for {len(ids)} ids in "
            f"{folder}, got {' x '.join(map(str, embeddings.shape))}"
        )
    if not len(ids) == len(metadata) == len(previews):
        raise UserError(
            f"got {len(ids)} ids, metadata of {len(metadata)} and previews of {len(previews)}"
        )
    seen: set[str] = set()
    for id in ids:
        if not isinstance(id, str) or not id:
            raise UserError(f"an id must be a text that is not empty, got {id!r}")
        if id in seen:
            raise UserError(f"id {id!r} is given twice")
        seen.add(id)
    is_finite = embeddings.isfinite().flatten(1).all(dim=1)
    if not is_finite.all():
        first = ids[int(torch.argmin(is_finite.int()))]
        raise UserError(f"the embeddings of {first!r} hold NaN or infinity")
