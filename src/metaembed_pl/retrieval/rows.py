"""Ids, metadata and previews of a store: an Arrow stream that grows by one batch per change.

Metadata are JSON texts, since items of a store may have different metadata.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from metaembed_pl.errors import UserError, first_line
from metaembed_pl.retrieval.manifest import Manifest
from metaembed_pl.retrieval.mapped import MappedFiles
from metaembed_pl.retrieval.planes import append_bytes

ROWS_FILE = "rows.arrows"
SCHEMA = pa.schema(
    [
        pa.field("id", pa.large_string(), nullable=False),
        pa.field("metadata", pa.large_string(), nullable=False),
        pa.field("preview", pa.large_binary()),
    ]
)


def table_of(
    ids: Sequence[str],
    metadata: Sequence[dict[str, Any] | None],
    previews: Sequence[bytes | None],
) -> pa.Table:
    """Rows of new items.

    Raises:
        UserError: metadata that JSON cannot hold.
    """
    texts = []
    for id, value in zip(ids, metadata, strict=True):
        try:
            texts.append(metadata_text(value or {}))
        except UserError as error:
            raise UserError(f"item {id!r}: {error}") from error
    return pa.table([list(ids), texts, list(previews)], schema=SCHEMA)


def append_table(folder: Path, manifest: Manifest, table: pa.Table) -> Manifest:
    """Write rows after those that the manifest counts; the manifest that counts them as well."""
    # A stream is its schema and then its batches, one behind the other.
    batches = table.combine_chunks().to_batches()
    content = b"".join(bytes(batch.serialize()) for batch in batches)
    if manifest.rows_bytes == 0:
        content = bytes(SCHEMA.serialize()) + content
    append_bytes(folder / ROWS_FILE, content, manifest.rows_bytes)
    rows_bytes = manifest.rows_bytes + len(content)
    return replace(manifest, num_rows=manifest.num_rows + len(table), rows_bytes=rows_bytes)


def map_rows(files: MappedFiles, manifest: Manifest) -> pa.Table:
    """The rows the manifest counts.

    Raises:
        UserError: the file is truncated, damaged or of another length.
    """
    file = files.folder / ROWS_FILE
    content = files.content(ROWS_FILE, manifest.rows_bytes)
    if not manifest.rows_bytes:
        return SCHEMA.empty_table()
    try:
        with pa.ipc.open_stream(pa.py_buffer(content)) as stream:
            table = stream.read_all()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file} is damaged: {first_line(error)}") from error
    if table.schema != SCHEMA or len(table) != manifest.num_rows:
        raise UserError(
            f"{file} holds {len(table):,} rows of {', '.join(table.schema.names)}; its store's "
            f"manifest counts {manifest.num_rows:,} of {', '.join(SCHEMA.names)}"
        )
    return table


def metadata_text(metadata: Any) -> str:
    """The metadata of an item as JSON.

    Raises:
        UserError: they are not an object, or JSON cannot hold them.
    """
    if not isinstance(metadata, dict):
        raise UserError(f"an item's metadata must be an object, not {type(metadata).__name__}")
    try:
        text = json.dumps(metadata, ensure_ascii=False, allow_nan=False)
        text.encode()  # a lone surrogate is not valid Unicode
    except (TypeError, ValueError) as error:
        raise UserError(f"metadata must be what JSON can hold: {error}") from error
    return text
