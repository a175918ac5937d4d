"""Export of stores to tables for other programs, and import: Parquet or Lance.

Columns: `id`; `vectors`, the first r_c meta embeddings of an item, as a fixed-size list of
fixed-size lists of float32; `first`, the first of them; `metadata`, JSON; and optionally `preview`,
a small JPEG. The schema's metadata identify the model under `metaembed`.

N: items    R: their vectors    W: width
"""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from pyarrow import parquet
from torch import Tensor

from metaembed_pl.budget import Budget, parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.files import new_file, new_folder
from metaembed_pl.retrieval.manifest import Manifest
from metaembed_pl.retrieval.rows import metadata_text
from metaembed_pl.retrieval.store import Store
from metaembed_pl.retrieval.writing import append_items, begin_store

PARQUET, LANCE = ".parquet", ".lance"
ABOUT = b"metaembed"
FORMAT = 1
ROWS_AT_A_TIME = 1024


def export_store(
    store: Store, to: str | Path, r_c: int | None = None, previews: bool = False
) -> int:
    """Write a store as a table.

    Args:
        store: to export.
        to: a new file that ends in .parquet, or a new folder that ends in .lance.
        r_c: vectors of an item; None: all.
        previews: export the small pictures as well.

    Returns:
        The number of items.

    Raises:
        UserError: the model was not trained at `r_c`, the store is empty, `to` exists or has
            another suffix, or Lance is missing.
    """
    to = Path(to)
    r_q, every, _ = store.groups[-1]
    r_c = store.check_budget(Budget(r_q, every if r_c is None else r_c)).r_c
    if to.suffix not in (PARQUET, LANCE):
        raise UserError(f"{to}: expected a name that ends in {PARQUET} or {LANCE}")
    if to.exists():
        raise UserError(f"{to} exists already: choose another name")
    if not len(store):
        raise UserError(f"{store.folder} is empty: nothing to export")
    schema = _schema(store, r_c, previews)
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == LANCE:
        reader = pa.RecordBatchReader.from_batches(schema, _batches(store, schema, r_c))
        _lance().write_dataset(reader, str(to))
    else:
        with new_file(to) as temporary, parquet.ParquetWriter(temporary, schema) as writer:
            for batch in _batches(store, schema, r_c):
                writer.write_batch(batch)
    return len(store)


def _schema(store: Store, r_c: int, previews: bool) -> pa.Schema:
    vector = pa.list_(pa.float32(), store.width)
    fields = [("id", pa.string()), ("vectors", pa.list_(vector, r_c)), ("first", vector)]
    fields += [("metadata", pa.string())] + [("preview", pa.binary())] * previews
    about = {
        "format": FORMAT,
        "identity": store.identity,
        "groups": [str(group) for group in store.groups if group.r_c <= r_c],
        "width": store.width,
        "widths": list(store.widths),
        "dtype": store.dtype,
    }
    if store.projection is not None:
        about["projection"] = base64.b64encode(store.projection.to_bytes()).decode()
    return pa.schema(fields, metadata={ABOUT: json.dumps(about).encode()})


def _batches(store: Store, schema: pa.Schema, r_c: int) -> Iterator[pa.RecordBatch]:
    ids, every = store.ids, range(len(store))
    for start in every[::ROWS_AT_A_TIME]:
        rows = every[start : start + ROWS_AT_A_TIME]
        vectors = store.vectors(rows, r_c)
        columns = [
            pa.array(ids[start : rows.stop]),
            _lists(vectors.flatten(0, 1), r_c),
            _lists(vectors[:, 0]),
            pa.array([json.dumps(value, ensure_ascii=False) for value in store.metadata(rows)]),
        ]
        if "preview" in schema.names:
            columns.append(pa.array(store.previews(rows), pa.binary()))
        yield pa.RecordBatch.from_arrays(columns, schema=schema)


def _lists(vectors: Float[Tensor, "_ W"], size: int | None = None) -> pa.Array:
    """Vectors as lists; with `size`, as lists of `size` vectors."""
    flat = pa.array(vectors.contiguous().numpy().reshape(-1))
    found = pa.FixedSizeListArray.from_arrays(flat, vectors.shape[1])
    return found if size is None else pa.FixedSizeListArray.from_arrays(found, size)


def import_store(source: str | Path, out: str | Path) -> Store:
    """Create a store from a table that `export_store` wrote, or one with the same columns.

    Args:
        source: a .parquet file or .lance folder.
        out: folder of the store; must not exist.

    Raises:
        UserError: the table was not exported from a store or is damaged, or `out` exists.
    """
    source, out = Path(source), Path(out)
    schema, batches = _read(source)
    about = _about(source, schema)
    manifest, projection = _manifest(source, about)
    with new_folder(out) as temporary:
        data, manifest = begin_store(temporary, manifest, projection)
        seen: set[str] = set()
        for batch in batches:
            ids, vectors = _items(source, batch, manifest, seen)
            metadata = _metadata(source, batch)
            has_previews = "preview" in batch.schema.names
            previews = batch.column("preview").to_pylist() if has_previews else [None] * len(ids)
            manifest = append_items(data, manifest, ids, vectors, metadata, previews)
        manifest.write(temporary)
    return Store.open(out)


def _read(source: Path) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    if source.suffix == LANCE and source.exists():
        dataset = _lance().dataset(str(source))
        return dataset.schema, dataset.to_batches(batch_size=ROWS_AT_A_TIME)
    try:
        file = parquet.ParquetFile(source)
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{source} is not a complete Parquet file: {error}") from error
    return file.schema_arrow, file.iter_batches(ROWS_AT_A_TIME)


def _about(source: Path, schema: pa.Schema) -> dict[str, Any]:
    try:
        found = json.loads((schema.metadata or {})[ABOUT])
        if found["format"] == FORMAT and {"id", "vectors", "metadata"} <= set(schema.names):
            return found
    except (KeyError, ValueError, TypeError):
        pass
    raise UserError(
        f"{source} was not exported from a store by this version: it does not say which model its "
        "vectors are of, or lacks id, vectors or metadata"
    )


def _manifest(source: Path, about: dict[str, Any]) -> tuple[Manifest, bytes | None]:
    try:
        projection = about.get("projection")
        content = None if projection is None else base64.b64decode(projection, validate=True)
        manifest = Manifest(
            about["identity"],
            parse_groups(about["groups"]),
            about["width"],
            about["dtype"],
            widths=tuple(about.get("widths") or ()),
        )
        return manifest, content
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{source}: its metadata are damaged: {error}") from error


def _items(
    source: Path, batch: pa.RecordBatch, manifest: Manifest, seen: set[str]
) -> tuple[list[str], Float[Tensor, "N R W"]]:
    ids = batch.column("id").to_pylist()
    for id in ids:
        if not isinstance(id, str) or not id or id in seen:
            raise UserError(f"{source}: id {id!r} is empty or occurs twice")
        seen.add(id)
    shape = len(ids), manifest.num_slots, manifest.width
    values = batch.column("vectors")
    while pa.types.is_nested(values.type):
        values = values.flatten()
    flat = np.array(values.to_numpy(zero_copy_only=False), dtype=np.float32)
    if flat.size != np.prod(shape) or not np.isfinite(flat).all():
        raise UserError(
            f"{source}: expected {shape[1]} finite vectors of width {shape[2]} for each item"
        )
    return ids, torch.from_numpy(flat.reshape(shape))


def _metadata(source: Path, batch: pa.RecordBatch) -> list[dict[str, Any]]:
    try:
        found = [json.loads(text or "{}") for text in batch.column("metadata").to_pylist()]
    except (ValueError, TypeError) as error:
        raise UserError(f"{source}: its column metadata is not JSON: {error}") from error
    for value in found:
        metadata_text(value)
    return found


def _lance() -> Any:
    try:
        import lance  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(".lance needs the package pylance: pip install pylance") from error
    return lance
