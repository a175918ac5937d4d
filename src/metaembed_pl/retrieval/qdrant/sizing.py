"""The estimated size of a collection: bytes on disk, and bytes that have to be in memory.

    an item = its vectors, for each count     count x size of a vector
              + 12 for each count above 1     offsets of its vectors
              + a coarser copy of the smallest count
              + the index of the smallest     2 m links of log2(N) bits
              + its ids                       29
              + its payload                   16, and blocks of 128

    in memory = the coarser copy, or else the smallest count, + the index + the ids

A vector of D components has 4 D bytes in fp32, 2 D in fp16, D + 4 in turbo8; a copy in int8 has
D + 4, in binary D / 8. The constants were read off Qdrant Edge 0.9's files. Qdrant needs more while
it works: room on disk for a second copy of a segment that it rewrites, and its own rule of thumb is
half as much memory again.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

LINKS = 16
"""HNSW's m, Qdrant's default: links per item, twice as many on the lowest level."""
OFFSET_BYTES, ID_BYTES, TRACKED_BYTES, BLOCK_BYTES = 12, 29, 16, 128
PAYLOAD_BYTES = 256
"""Assumed size of a payload: an id, a revision, a line or two of text."""
ITEMS = (10**5, 10**6, 10**7, 10**8, 10**9)
DTYPES, QUANTIZATIONS = ("fp32", "fp16", "turbo8"), (None, "int8", "binary")


@dataclass(frozen=True)
class Size:
    """Bytes of a collection.

    Args:
        vectors: of the largest count.
        repeated: vectors of the smaller counts, which are prefixes of it.
        coarse: the coarser copy of the smallest count.
        index: of the smallest count.
        rest: ids, payloads and offsets.
        memory: the part that has to be in memory.
    """

    vectors: float
    repeated: float
    coarse: float
    index: float
    rest: float
    memory: float

    @property
    def disk(self) -> float:
        """Total bytes on disk."""
        return self.vectors + self.repeated + self.coarse + self.index + self.rest


def sizing(
    num_items: int,
    width: int,
    counts: Sequence[int],
    dtype: str = "fp16",
    quantization: str | None = None,
    on_disk: bool = False,
    payload_bytes: float = PAYLOAD_BYTES,
    replicas: int = 1,
) -> Size:
    """Bytes of a collection, all replicas together.

    Args:
        num_items: in the collection.
        width: of a vector.
        counts: searchable candidate counts.
        dtype: fp32, fp16 or turbo8.
        quantization: int8, binary or None.
        on_disk: the smallest count and its index are on disk as well.
        payload_bytes: of an item's id and metadata as JSON.
        replicas: of each shard.

    >>> size = sizing(10**6, 128, [1, 8, 64], quantization="int8")
    >>> round(size.vectors / 10**9, 1), round(size.repeated / 10**9, 1)
    (16.4, 2.3)
    >>> round(size.memory / 10**9, 2)
    0.24
    """
    of_vector = {"fp32": 4 * width, "fp16": 2 * width, "turbo8": width + 4}[dtype]
    of_copy = {None: 0, "int8": width + 4, "binary": math.ceil(width / 8)}[quantization]
    smallest, largest = min(counts), max(counts)
    all_items = num_items * replicas
    coarse = all_items * smallest * of_copy
    index = all_items * 2 * LINKS * math.ceil(math.log2(max(2, num_items))) / 8
    ids = all_items * ID_BYTES
    payload = TRACKED_BYTES + BLOCK_BYTES * math.ceil(payload_bytes / BLOCK_BYTES)
    offsets = OFFSET_BYTES * sum(count > 1 for count in counts)
    searched = coarse or all_items * smallest * of_vector
    return Size(
        vectors=all_items * largest * of_vector,
        repeated=all_items * (sum(set(counts)) - largest) * of_vector,
        coarse=coarse,
        index=index,
        rest=ids + all_items * (payload + offsets),
        memory=ids + (0 if on_disk else searched + index),
    )


def sizing_table(
    num_items: Sequence[int],
    width: int,
    counts: Sequence[int],
    dtype: str = "fp16",
    payload_bytes: float = PAYLOAD_BYTES,
    replicas: int = 1,
) -> list[tuple[str, ...]]:
    """Sizes of collections by precision: a header, then a row for each number of items.

    Disk is without a coarser copy, memory is shown for each kind of copy.
    """
    disks = [f"disk {name}" for name in DTYPES]
    memories = [f"memory {name or dtype}" for name in QUANTIZATIONS]
    rows: list[tuple[str, ...]] = [("items", *disks, *memories)]
    for count in num_items:
        sizes = [
            sizing(count, width, counts, name, payload_bytes=payload_bytes, replicas=replicas)
            for name in DTYPES
        ]
        coarse = [
            sizing(count, width, counts, dtype, q, payload_bytes=payload_bytes, replicas=replicas)
            for q in QUANTIZATIONS
        ]
        amounts = [size.disk for size in sizes] + [size.memory for size in coarse]
        rows.append((f"{count:,}", *map(readable, amounts)))
    return rows


def readable(num_bytes: float) -> str:
    """Bytes with a unit, in powers of ten.

    >>> readable(999_499), readable(16_384_000_000), readable(2.5e12)
    ('999 kB', '16.4 GB', '2.50 TB')
    """
    units = ("B", "kB", "MB", "GB", "TB", "PB")
    value, unit = num_bytes, 0
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if value >= 99.95 or unit == 0 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {units[unit]}"
