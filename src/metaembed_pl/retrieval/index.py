"""An approximate index over the vectors of a store.

It is a faiss inverted file. The vectors are in lists, each around a centre, with one byte or about
one bit per component; a query reads the lists with the nearest centres. The results are scored
again with the store's own vectors, so the index only selects items.

    data-0000/index/index.json              the manifest, replaced atomically
                    trained-0001.faiss      centres and ranges, without vectors
                    segment-0001-0.faiss    the vectors of some rows; memory-mapped

Deleted items are masked in searches. Items added since the index was built are in no segment: a
search scores all of them, and `index_build.extend` writes them into a new segment. The index is in
the folder of the data it was built from, so it cannot outlive a compaction.

Q: queries    A: questions of a query    D: width    L: lists    K: vectors found for a question
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Integer
from torch import Tensor

from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.manifest import Manifest, checksum_of
from metaembed_pl.retrieval.snapshot import Snapshot

if TYPE_CHECKING:
    import faiss

FORMAT = 1
FOLDER, FILE = "index", "index.json"
CODES = ("sq8", "rabitq")
"""Codes of a vector: a byte per component, or a bit per component and 8 bytes of corrections."""
REBUILD = "rebuild it with `index --store {} --again`"
DRIFTED_BY = 0.05
"""Rebuilding pays if vectors added later are this much farther from their centres, in cosine."""
GROWN_BY = 4


class IndexUnusable(UserError):
    """The index is damaged or another store's, or faiss is missing."""


@dataclass(frozen=True)
class Segment:
    """A file of an index.

    Args:
        file: its name.
        first: the store's row it begins with.
        end: the row after its last.
        size_bytes: size of the file.
        head_bytes: size of the part before the vectors, which faiss trusts when it maps the file.
        head: digest of that part.
        closeness: mean dot product of its vectors with their centres.
    """

    file: str
    first: int
    end: int
    size_bytes: int
    head_bytes: int
    head: str
    closeness: float


@dataclass(frozen=True)
class IndexManifest:
    """The manifest of an index.

    Args:
        number: counts the versions of the index.
        first_row: fingerprint of the store and its first row.
        last_row: fingerprint of the store and the last indexed row.
        codes: one of `CODES`.
        num_lists: number of lists.
        num_slots: vectors of an item.
        trained: file of the centres.
        trained_on: items in the store when the centres were trained.
        segments: ascending by row, without gaps.
    """

    number: int
    first_row: str
    last_row: str
    codes: str
    num_lists: int
    num_slots: int
    trained: str
    trained_on: int
    segments: tuple[Segment, ...]

    @property
    def num_rows(self) -> int:
        """The first rows of the store, which are indexed."""
        return self.segments[-1].end

    def to_text(self) -> str:
        """The content of its file."""
        value = {"format": FORMAT, **asdict(self)}
        return json.dumps(value | {"checksum": checksum_of(value)}, indent=1) + "\n"

    @classmethod
    def read(cls, file: Path, folder: Path) -> "IndexManifest":
        """Read the manifest of the index of the store in `folder`.

        Raises:
            IndexUnusable: the file was damaged, edited or written by another version.
        """
        try:
            value = json.loads(file.read_bytes())
            checksum, version = value.pop("checksum"), value["format"]
            if version != FORMAT or checksum != checksum_of(value):
                raise ValueError(f"its format is {version}, or its checksum does not match")
            del value["format"]
            segments = tuple(Segment(**segment) for segment in value.pop("segments"))
            return cls(**value, segments=segments)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise IndexUnusable(
                f"{file} cannot be read ({error}): {REBUILD.format(folder)}"
            ) from error


def faiss_module() -> Any:
    """faiss, which is optional.

    Raises:
        IndexUnusable: it is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise IndexUnusable("an index needs faiss: pip install 'metaembed-pl[index]'") from error
    return faiss


def index_folder(snapshot: Snapshot) -> Path:
    """The folder of a store's index, which may not exist."""
    return snapshot.files.folder / FOLDER


def index_version(snapshot: Snapshot) -> tuple[int, ...] | None:
    """Changes when a store's index is replaced; None: there is none."""
    try:
        found = os.stat(os.path.join(snapshot.files.folder, FOLDER, FILE))
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def fingerprint(snapshot: Snapshot, row: int) -> str:
    """A digest of a store's model and format, and of the first vectors of a row."""
    manifest = snapshot.manifest
    settings = repr([manifest.identity, manifest.width, manifest.dtype, manifest.groups])
    vectors = snapshot.planes[0].vectors[row].contiguous().view(torch.uint8).numpy()
    return hashlib.sha256(settings.encode() + vectors.tobytes()).hexdigest()


def is_of(manifest: IndexManifest, snapshot: Snapshot, folder: Path) -> bool:
    """Whether an index belongs to a store: to this generation, an older or a newer one."""
    num_rows = snapshot.manifest.num_rows
    if not num_rows or fingerprint(snapshot, 0) != manifest.first_row:
        return False
    if manifest.num_rows <= num_rows:
        return fingerprint(snapshot, manifest.num_rows - 1) == manifest.last_row
    # A reader of an older generation finds the index of a newer one, which has more rows.
    now = Manifest.read(folder)
    return now.data == snapshot.manifest.data and manifest.num_rows <= now.num_rows


class Index:
    """An open index; use `Index.open`. Thread-safe.

    Args:
        manifest: of the index.
        segments: memory-mapped, as faiss's objects.
        files: descriptors of the same files, to check their sizes.
    """

    def __init__(self, manifest: IndexManifest, segments: Sequence[Any], files: Sequence[int]):
        self.manifest, self._segments, self._files = manifest, segments, files

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        for file in self._files:
            close(file)

    @classmethod
    def open(cls, snapshot: Snapshot) -> "Index | None":
        """The index of a store, memory-mapped; None: there is none.

        Raises:
            IndexUnusable: the index cannot be used.
        """
        folder = index_folder(snapshot)
        store = folder.parent.parent
        if not (folder / FILE).exists():
            return None
        manifest = IndexManifest.read(folder / FILE, store)
        if not is_of(manifest, snapshot, store):
            raise IndexUnusable(
                f"{folder} is the index of another store, or of other items than are there now: "
                + REBUILD.format(store)
            )
        faiss = faiss_module()
        segments, files = [], []
        try:
            for segment in manifest.segments:
                files.append(_checked(folder / segment.file, segment))
                segments.append(_mapped(faiss, folder / segment.file))
        except (OSError, ValueError, RuntimeError) as error:
            for file in files:
                os.close(file)
            raise IndexUnusable(f"{error}: {REBUILD.format(store)}") from error
        return cls(manifest, segments, files)

    @property
    def num_rows(self) -> int:
        """The first rows of the store, which are indexed."""
        return self.manifest.num_rows

    @property
    def num_slots(self) -> int:
        """Vectors of an item."""
        return self.manifest.num_slots

    @property
    def num_lists(self) -> int:
        """Number of lists."""
        return self.manifest.num_lists

    @cached_property
    def size_bytes(self) -> int:
        """Size of its segments."""
        return sum(segment.size_bytes for segment in self.manifest.segments)

    def is_whole(self) -> bool:
        """Whether the mapped files are still complete; reading past their end kills the process."""
        pairs = zip(self._files, self.manifest.segments, strict=True)
        return all(os.fstat(file).st_size >= segment.size_bytes for file, segment in pairs)

    def drift(self) -> str | None:
        """The reason to rebuild the index; None: there is none."""
        first, *later = self.manifest.segments
        if self.num_rows > GROWN_BY * self.manifest.trained_on:
            return (
                f"its lists were made for {self.manifest.trained_on:,} items and now hold "
                f"{self.num_rows:,}"
            )
        added = sum(segment.end - segment.first for segment in later)
        if not added:
            return None
        weights = ((segment.end - segment.first) * segment.closeness for segment in later)
        farther = first.closeness - sum(weights) / added
        if farther <= DRIFTED_BY:
            return None
        return (
            f"the {added:,} items added since it was built lie {farther:.2f} farther from the "
            "centres of its lists, in cosine"
        )

    @cached_property
    def centres(self) -> Float[np.ndarray, "L D"]:
        """Centres of the lists, the same in all segments."""
        return self._segments[0].quantizer.reconstruct_n(0, self.num_lists)

    def lists_of(
        self, questions: Float[np.ndarray, "Q A D"], reach: float, widened: float = 1
    ) -> tuple[Integer[np.ndarray, "QA L"], Float[np.ndarray, "QA L"]]:
        """The lists that each question reads, nearest first and padded with -1, and their products.

        A question close to few centres reads few lists, a question between many centres reads many:
        so one `reach` serves queries for one thing and for several.
        """
        flat = questions.reshape(-1, questions.shape[2])
        products = flat @ self.centres.T
        lists = [_near(row, reach, widened) for row in products]
        width = max(map(len, lists))
        padded = np.array(
            [np.pad(some, (0, width - len(some)), constant_values=-1) for some in lists]
        )
        return padded, np.take_along_axis(products, padded, axis=1)

    def search(
        self,
        questions: Float[Tensor, "Q A D"],
        reach: float,
        hits: int,
        allowed: np.ndarray | None = None,
        at_least: int = 1,
        widened: float = 1,
    ) -> tuple[list[Integer[Tensor, " _"]], int]:
        """The items of the vectors nearest to each query's questions, ascending, and bytes read.

        If these are fewer than `at_least`, more lists are read and more vectors taken.

        Args:
            questions: compared by dot product.
            reach: a question reads the lists whose centres score at least this share of the best
                centre's score; in [0, 1].
            hits: vectors to take for each question.
            allowed: a bit for each vector, see `Matching.allowed`; None: all.
            at_least: items for each query; at most the number of allowed items.
            widened: factor on the number of lists to read.
        """
        vectors = questions.float().cpu().numpy()
        found: list[np.ndarray] = [np.empty(0, dtype=np.int64)] * len(vectors)
        left, num_read = np.arange(len(vectors)), 0
        while len(left):
            lists, products = self.lists_of(vectors[left], reach, widened)
            nearest = self.nearest(vectors[left], lists, products, hits, allowed)
            num_read += int((lists >= 0).sum())
            for query, ids in zip(left, nearest, strict=True):
                found[query] = np.unique(ids[ids >= 0] // self.num_slots)
            every = bool((lists >= 0).all()) and lists.shape[1] == self.num_lists
            if every and hits >= at_least * self.num_slots:
                break
            widened *= 4
            hits = min(4 * hits, max(hits, at_least * self.num_slots))
            left = np.array([query for query in left if len(found[query]) < at_least], dtype=int)
        bytes_read = num_read * self.size_bytes // self.num_lists
        return [torch.from_numpy(places) for places in found], bytes_read

    def nearest(
        self,
        questions: Float[np.ndarray, "Q A D"],
        lists: Integer[np.ndarray, "QA L"],
        products: Float[np.ndarray, "QA L"],
        hits: int,
        allowed: np.ndarray | None = None,
    ) -> Integer[np.ndarray, "Q A K"]:
        """The numbers of the vectors nearest to each question, nearest first, padded with -1."""
        faiss = faiss_module()
        flat = np.ascontiguousarray(questions.reshape(-1, questions.shape[2]), np.float32)
        lists = np.ascontiguousarray(lists, np.int64)
        products = np.ascontiguousarray(products, np.float32)
        settings: dict[str, Any] = {"nprobe": lists.shape[1]}
        if allowed is not None:
            settings["sel"] = faiss.IDSelectorBitmap(allowed)
        params = faiss.SearchParametersIVF(**settings)
        found = []
        for segment in self._segments:
            scores = np.empty((len(flat), hits), dtype=np.float32)
            ids = np.empty((len(flat), hits), dtype=np.int64)
            pointers = map(faiss.swig_ptr, (lists, products, scores, ids))
            flat_pointer = faiss.swig_ptr(flat)
            # faiss's own wrapper of this takes no selector.
            segment.search_preassigned_c(len(flat), flat_pointer, hits, *pointers, False, params)
            found.append((scores, ids))
        scores, ids = (np.concatenate(of_all, axis=1) for of_all in zip(*found, strict=True))
        if len(found) > 1:
            scores[ids < 0] = -np.inf
            order = np.argsort(-scores, axis=1, kind="stable")[:, :hits]
            ids = np.take_along_axis(ids, order, axis=1)
        ids[ids >= self.num_rows * self.num_slots] = -1  # of a damaged file
        return ids.reshape(*questions.shape[:2], -1)


def _near(
    products: Float[np.ndarray, " L"], reach: float, widened: float
) -> Integer[np.ndarray, " l"]:
    """The lists whose centres score at least a share of the best score, best first."""
    best = products.max()
    near = np.flatnonzero(products >= best - (1 - reach) * abs(best))
    if widened > 1:
        count = min(math.ceil(len(near) * widened), len(products))
        near = np.argpartition(-products, count - 1)[:count]
    return near[np.argsort(-products[near], kind="stable")]


def _checked(file: Path, segment: Segment) -> int:
    """Open a file; refuse one of another size, or with a changed head."""
    opened = os.open(file, os.O_RDONLY)
    found = os.fstat(opened).st_size
    problem = f"has {found:,} bytes instead of {segment.size_bytes:,}"
    if found == segment.size_bytes:
        problem = "is damaged"
        if digest_of_head(opened, segment.head_bytes) == segment.head:
            return opened
    os.close(opened)
    raise ValueError(f"{file} {problem}")


def digest_of_head(file: int, size: int) -> str:
    """Digest of the first bytes of an open file."""
    return hashlib.sha256(os.pread(file, size, 0)).hexdigest()


def _mapped(faiss: Any, file: Path) -> "faiss.IndexIVF":
    found = faiss.read_index(str(file), faiss.IO_FLAG_MMAP | faiss.IO_FLAG_READ_ONLY)
    # Threads that read ahead cost more than they save where the lists are in memory.
    faiss.downcast_InvertedLists(found.invlists).prefetch_nthread = 0
    return found
