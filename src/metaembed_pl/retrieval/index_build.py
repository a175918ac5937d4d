"""Builds the index of a store, extends it, and carries it over when the store is compacted.

New files take effect when `index.json` is replaced, atomically. A killed process leaves files that
nobody reads, which the next one removes. Readers of an older index keep reading it.

N: items    R: their vectors    D: width
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.index import (
    CODES,
    FILE,
    FOLDER,
    Index,
    IndexManifest,
    IndexUnusable,
    Segment,
    digest_of_head,
    faiss_module,
    fingerprint,
    index_folder,
)
from metaembed_pl.retrieval.manifest import Manifest, sync, write_synced
from metaembed_pl.retrieval.planes import read
from metaembed_pl.retrieval.scoring import fast_dtype
from metaembed_pl.retrieval.snapshot import Snapshot
from metaembed_pl.samples import evenly_spread

if TYPE_CHECKING:
    from metaembed_pl.retrieval.store import Store

TRAINED_WITH = 40
"""Vectors per centre."""
ITERATIONS = 8
ROWS_AT_A_TIME, VECTORS_AT_A_TIME = 2048, 512
SEGMENT_BYTES = 2**30
"""Approximate limit: a segment is built in memory, where its lists take up to twice as much."""
LEFT_OUT_AT_MOST = 4096
"""Items not yet in the index: scoring all of them takes a few milliseconds."""

OnProgress = Callable[[int, int], None]


def build(
    store: "Store", codes: str = "sq8", on_progress: OnProgress = lambda done, of: None
) -> Index:
    """Build the index of a store, or rebuild it.

    Args:
        store: not empty. Other processes cannot write to it meanwhile, but can search it.
        codes: "sq8" is fast, "rabitq" takes a quarter of the bytes.
        on_progress: called with the number of rows done, and of all rows.

    Raises:
        UserError: the store is empty, another process is writing to it, or faiss is missing.
    """
    if codes not in CODES:
        raise UserError(f"codes are one of {', '.join(CODES)}, got {codes!r}")
    faiss = faiss_module()
    with store.writing():
        snapshot = store.snapshot()
        if not len(store):
            raise UserError(f"{store.folder} is empty: nothing to index")
        folder = index_folder(snapshot)
        folder.mkdir(exist_ok=True)
        number = _number(folder) + 1
        num_lists = lists_for(len(store) * snapshot.manifest.num_slots)
        trained = f"trained-{number:04d}.faiss"
        _write(faiss, _train(faiss, snapshot, num_lists, codes), folder / trained)
        segments = _segments(faiss, snapshot, folder, trained, number, 0, on_progress)
        manifest = IndexManifest(
            number=number,
            first_row=fingerprint(snapshot, 0),
            last_row=fingerprint(snapshot, snapshot.manifest.num_rows - 1),
            codes=codes,
            num_lists=num_lists,
            num_slots=snapshot.manifest.num_slots,
            trained=trained,
            trained_on=len(store),
            segments=tuple(segments),
        )
        return _commit(folder, manifest, snapshot)


def extend(store: "Store", on_progress: OnProgress = lambda done, of: None) -> bool:
    """Add new items to the index of a store, if there are many.

    Segments smaller than the addition are rewritten together with it, so that segments stay few.

    Returns:
        Whether anything was added.

    Raises:
        UserError: another process is writing to the store, or the index cannot be used.
    """
    with store.writing():
        snapshot = store.snapshot()
        index = Index.open(snapshot)
        num_rows = snapshot.manifest.num_rows
        if index is None or num_rows - index.num_rows <= LEFT_OUT_AT_MOST:
            return False
        faiss, old = faiss_module(), index.manifest
        segments, first = list(old.segments), index.num_rows
        while len(segments) > 1 and segments[-1].end - segments[-1].first <= num_rows - first:
            first = segments.pop().first
        folder, number = index_folder(snapshot), old.number + 1
        segments += _segments(faiss, snapshot, folder, old.trained, number, first, on_progress)
        last_row = fingerprint(snapshot, num_rows - 1)
        new = replace(old, number=number, last_row=last_row, segments=tuple(segments))
        _commit(folder, new, snapshot)
        return True


def carry(old: Snapshot, data: Path, manifest: Manifest) -> None:
    """Copy the index of a store that is being compacted into its new folder of data.

    An unusable index is left behind: the store is searched without one.

    Args:
        old: the store before compaction.
        data: the new folder; its rows are the items of `old` that were not deleted.
        manifest: of the compacted store.
    """
    try:
        index = Index.open(old)
        if index is None:
            return
        faiss = faiss_module()
    except IndexUnusable:
        return
    new_places = np.full(old.manifest.num_rows, -1, dtype=np.int64)
    new_places[old.places.numpy()] = np.arange(len(old.places))
    folder, source = data / FOLDER, index_folder(old)
    folder.mkdir()
    trained = faiss.read_index(str(source / index.manifest.trained))
    _write(faiss, trained, folder / index.manifest.trained)
    segments = []
    for segment in index.manifest.segments:
        moved = faiss.clone_index(trained)
        mapped = faiss.read_index(str(source / segment.file), faiss.IO_FLAG_MMAP)
        _move(faiss, mapped, moved, new_places, index.num_slots)
        first, end = np.searchsorted(old.places.numpy(), [segment.first, segment.end]).tolist()
        if first < end:
            file = folder / segment.file
            _write(faiss, moved, file)
            segments.append(_described(file, moved, first, end, segment.closeness))
    if not segments:
        return
    snapshot = Snapshot.of(data, manifest)
    first_row, last_row = (fingerprint(snapshot, row) for row in (0, segments[-1].end - 1))
    carried = replace(
        index.manifest, first_row=first_row, last_row=last_row, segments=tuple(segments)
    )
    _commit(folder, carried, snapshot)


def lists_for(num_vectors: int) -> int:
    """A power of two close to twice the square root of the number of vectors.

    >>> lists_for(960_000), lists_for(16_000_000), lists_for(4)
    (2048, 8192, 4)
    """
    return min(num_vectors, 2 ** round(math.log2(2 * math.sqrt(num_vectors))))


def _train(faiss: Any, snapshot: Snapshot, num_lists: int, codes: str) -> Any:
    """An index without vectors, trained on a sample spread over the store."""
    manifest = snapshot.manifest
    wanted = -(-TRAINED_WITH * num_lists // manifest.num_slots)
    places = snapshot.places[evenly_spread(len(snapshot.places), wanted)]
    sample = read(snapshot.planes, manifest.num_slots, places).flatten(0, 1)
    centres = faiss.IndexFlatIP(manifest.width)
    if codes == "sq8":
        kind, product = faiss.ScalarQuantizer.QT_8bit, faiss.METRIC_INNER_PRODUCT
        made = faiss.IndexIVFScalarQuantizer(centres, manifest.width, num_lists, kind, product)
    else:
        product = faiss.METRIC_INNER_PRODUCT
        made = faiss.IndexIVFRaBitQ(centres, manifest.width, num_lists, product)
    made.cp.niter, made.cp.spherical, made.cp.min_points_per_centroid = ITERATIONS, True, 1
    made.train(sample.numpy())
    return made


def _segments(
    faiss: Any,
    snapshot: Snapshot,
    folder: Path,
    trained: str,
    number: int,
    first: int,
    on_progress: OnProgress,
) -> list[Segment]:
    """Write the items from a row on, except deleted ones."""
    empty = faiss.read_index(str(folder / trained))
    num_rows = snapshot.manifest.num_rows
    row_bytes = snapshot.manifest.num_slots * (empty.code_size + 8)
    step = max(1, SEGMENT_BYTES // row_bytes)
    found = []
    for begin in range(first, num_rows, step):
        end = min(begin + step, num_rows)
        segment = faiss.clone_index(empty)
        sums = 0.0
        for places, vectors in _items(snapshot, begin, end):
            sums += _add(faiss, segment, places, vectors)
            on_progress(int(places[-1]) + 1 - first, num_rows - first)
        file = folder / f"segment-{number:04d}-{len(found)}.faiss"
        _write(faiss, segment, file)
        found.append(_described(file, segment, begin, end, sums / max(1, segment.ntotal)))
    return found


def _items(
    snapshot: Snapshot, begin: int, end: int
) -> Iterator[tuple[Integer[Tensor, " n"], Float[np.ndarray, "n R D"]]]:
    places = snapshot.places
    bounds = torch.searchsorted(places, torch.tensor([begin, end]))
    for some in places[bounds[0] : bounds[1]].split(ROWS_AT_A_TIME):
        if len(some):
            yield some, read(snapshot.planes, snapshot.manifest.num_slots, some).numpy()


def _add(
    faiss: Any, segment: Any, places: Integer[Tensor, " n"], vectors: Float[np.ndarray, "n R D"]
) -> float:
    """Add the vectors of some items; return the sum of their products with their centres."""
    num_slots, width = vectors.shape[1:]
    ids = (places.numpy()[:, None] * num_slots + np.arange(num_slots)).reshape(-1)
    flat = np.ascontiguousarray(vectors.reshape(-1, width))
    products, lists = _nearest_centres(segment.quantizer, flat)
    segment.add_core(len(flat), *map(faiss.swig_ptr, (flat, ids, lists)))
    return float(products.sum(dtype=np.float64))


def _nearest_centres(
    centres: Any, vectors: Float[np.ndarray, "n D"]
) -> tuple[Float[np.ndarray, " n"], Integer[np.ndarray, " n"]]:
    """The product of each vector with its nearest centre, and that centre."""
    if fast_dtype(torch.device("cpu")) == torch.float32:
        products, lists = centres.search(vectors, 1)
        return products[:, 0], np.ascontiguousarray(lists[:, 0])
    # Twice as fast; of two centres equally near in bf16 either will do.
    columns = torch.from_numpy(centres.reconstruct_n(0, centres.ntotal)).bfloat16().T
    parts = torch.from_numpy(vectors).bfloat16().split(VECTORS_AT_A_TIME)
    found = [(part @ columns).max(dim=1) for part in parts]
    products, lists = (torch.cat(some) for some in zip(*found, strict=True))
    return products.float().numpy(), lists.numpy()


def _move(faiss: Any, source: Any, target: Any, new_places: np.ndarray, num_slots: int) -> None:
    """Copy the vectors of remaining items, under their new numbers."""
    lists = source.invlists
    for number in range(source.nlist):
        size = lists.list_size(number)
        if not size:
            continue
        ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
        codes = faiss.rev_swig_ptr(lists.get_codes(number), size * source.code_size)
        places = new_places[ids // num_slots]
        remains = places >= 0
        ids = np.ascontiguousarray((places * num_slots + ids % num_slots)[remains])
        codes = np.ascontiguousarray(codes.reshape(size, -1)[remains])
        target.invlists.add_entries(number, len(ids), *map(faiss.swig_ptr, (ids, codes)))
        target.ntotal += len(ids)


def _write(faiss: Any, made: Any, file: Path) -> None:
    faiss.write_index(made, str(file))
    sync(file)


def _described(file: Path, made: Any, first: int, end: int, closeness: float) -> Segment:
    size = file.stat().st_size
    # The lists come last: the code and the number of each vector.
    head_bytes = size - made.ntotal * (made.code_size + 8)
    with file.open("rb") as opened:
        head = digest_of_head(opened.fileno(), head_bytes)
    return Segment(file.name, first, end, size, head_bytes, head, closeness)


def _number(folder: Path) -> int:
    """Number of the existing index, by its files: it may be unreadable."""
    numbers = [int(file.name.split("-")[1][:4]) for file in folder.glob("*-[0-9][0-9][0-9][0-9]*")]
    return max(numbers, default=0)


def _commit(folder: Path, manifest: IndexManifest, snapshot: Snapshot) -> Index:
    """Make this the index, and remove files that it does not need."""
    write_synced(folder / FILE, manifest.to_text())
    needed = {FILE, manifest.trained, *(segment.file for segment in manifest.segments)}
    for other in folder.iterdir():
        if other.name not in needed:
            other.unlink()
    index = Index.open(snapshot)
    assert index is not None, "it was written just now"
    return index
