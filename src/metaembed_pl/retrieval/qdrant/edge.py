"""A collection in a folder: Qdrant Edge, the same engine inside this process.

Requests are those that a server gets, put into Edge's classes word by word. One process at a time
has a folder open, for reading too.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from metaembed_pl.errors import UserError
from metaembed_pl.files import new_folder, write_text
from metaembed_pl.retrieval.qdrant.address import DESCRIPTION_FILE
from metaembed_pl.retrieval.qdrant.layout import Layout
from metaembed_pl.retrieval.qdrant.packages import edge, models

SHARD_FOLDER = "shard"
IDS_AT_A_TIME = 10_000


class EdgeCollection:
    """A folder of Qdrant Edge, which need not be there yet.

    Args:
        folder: its own.
    """

    def __init__(self, folder: Path):
        self.folder, self.address = folder, str(folder)

    def layout(self) -> Layout | None:
        """See `Collection`.

        Raises:
            UserError: it is not one of a store.
        """
        file = self.folder / DESCRIPTION_FILE
        if not self.folder.exists():
            return None
        try:
            return Layout.from_json(json.loads(file.read_bytes()))
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: {error}; choose another folder") from error

    def create(self, layout: Layout, shards: int | None, replicas: int | None) -> None:
        """See `Collection`.

        Raises:
            UserError: shards or replicas were asked for.
        """
        if shards is not None or replicas is not None:
            raise UserError(
                f"{self.folder}: a folder is one shard without replicas; they need a server"
            )
        with new_folder(self.folder) as temporary:
            (temporary / SHARD_FOLDER).mkdir()
            made = edge.EdgeShard.create(
                str(temporary / SHARD_FOLDER), edge.EdgeConfig(vectors=edge_vectors(layout))
            )
            made.close()
            write_text(temporary / DESCRIPTION_FILE, json.dumps(layout.to_json(), indent=1) + "\n")

    @cached_property
    def _shard(self) -> edge.EdgeShard:
        try:
            return edge.EdgeShard.load(str(self.folder / SHARD_FOLDER))
        except Exception as error:  # Edge has no class of its own for its errors
            reason = str(error).splitlines()[0]
            if "WouldBlock" in reason:
                reason = "another process has it open, and only one can"
            raise UserError(f"{self.folder} cannot be opened: {reason}") from error

    def index(self, key: str, kind: models.PayloadSchemaType) -> None:
        """See `Collection`."""
        kinds = edge.PayloadSchemaType
        schema = getattr(kinds, kind.value.capitalize())
        self._shard.update(edge.UpdateOperation.create_field_index(key, schema))

    def revisions(self, ids: Sequence[str]) -> dict[str, str]:
        """See `Collection`."""
        records = self._shard.retrieve(list(ids), ["revision"], False)
        return {str(record.id): (record.payload or {}).get("revision", "") for record in records}

    def upsert(self, points: Sequence[models.PointStruct]) -> None:
        """See `Collection`."""
        values = [edge.Point(str(p.id), p.vector, p.payload) for p in points]  # pyright: ignore
        self._shard.update(edge.UpdateOperation.upsert_points(values))

    def delete(self, ids: Sequence[str]) -> None:
        """See `Collection`."""
        self._shard.update(edge.UpdateOperation.delete_points(list(ids)))

    def ids(self) -> Iterator[list[str]]:
        """See `Collection`."""
        offset: Any = None
        while True:
            request = edge.ScrollRequest(
                offset=offset, limit=IDS_AT_A_TIME, with_payload=False, with_vector=False
            )
            records, offset = self._shard.scroll(request)
            yield [str(record.id) for record in records]
            if offset is None:
                return

    def count(self) -> int:
        """See `Collection`."""
        return self._shard.count(edge.CountRequest(exact=True))

    def query(self, requests: Sequence[models.QueryRequest]) -> list[list[Any]]:
        """See `Collection`.

        Raises:
            UserError: a filter that Edge does not know.
        """
        batch = edge.QueryBatchRequest([_query_request(request) for request in requests])
        return self._shard.query_batch(batch)

    def finish(self) -> None:
        """See `Collection`: Edge builds its indexes on request."""
        self._shard.optimize()
        self._shard.flush()

    def close(self) -> None:
        """See `Collection`."""
        shard = self.__dict__.pop("_shard", None)
        if shard is not None:
            shard.close()


def edge_vectors(layout: Layout) -> dict[str, edge.EdgeVectorParams]:
    """The named vectors of a layout in Edge's classes."""
    return {name: _vector_params(value) for name, value in layout.vectors().items()}


def _vector_params(params: models.VectorParams) -> edge.EdgeVectorParams:
    return edge.EdgeVectorParams(
        params.size,
        _same(edge.Distance, params.distance),
        datatype=_same(edge.VectorStorageDatatype, params.datatype),
        memory=_same(edge.Memory, params.memory),
        multivector_config=edge.MultiVectorConfig(edge.MultiVectorComparator.MaxSim)
        if params.multivector_config
        else None,
        hnsw_config=_index(params.hnsw_config),
        quantization_config=_quantization(params.quantization_config),
    )


def _index(config: models.HnswConfigDiff | None) -> edge.HnswIndexConfig | None:
    """Edge asks for numbers that a server knows by itself: these are the server's."""
    if config is None:
        return None
    m = 16 if config.m is None else config.m
    return edge.HnswIndexConfig(
        m=m,
        ef_construct=100,
        full_scan_threshold=10_000,
        memory=_same(edge.Memory, config.memory),
    )


def _quantization(config: Any) -> Any:
    if isinstance(config, models.ScalarQuantization):
        memory = _same(edge.Memory, config.scalar.memory)
        return edge.ScalarQuantizationConfig(edge.ScalarType.Int8, memory=memory)
    if isinstance(config, models.BinaryQuantization):
        memory = _same(edge.Memory, config.binary.memory)
        return edge.BinaryQuantizationConfig(memory=memory)
    assert config is None, config
    return None


def _same(kind: Any, value: Any) -> Any:
    """Edge's member of the name that a server's has."""
    return None if value is None else getattr(kind, value.value.capitalize())


def _query_request(request: models.QueryRequest) -> edge.QueryRequest:
    assert request.limit is not None
    return edge.QueryRequest(
        request.limit,
        query=edge.Query.Nearest(request.query, request.using),  # pyright: ignore
        prefetches=_prefetches(request.prefetch),
        filter=_filter(request.filter),
        params=_params(request.params),
        with_payload=request.with_payload,  # pyright: ignore
    )


def _prefetches(prefetch: Any) -> list[edge.Prefetch] | None:
    if prefetch is None:
        return None
    return [
        edge.Prefetch(
            prefetch.limit,
            query=edge.Query.Nearest(prefetch.query, prefetch.using),
            prefetches=_prefetches(prefetch.prefetch),
            filter=_filter(prefetch.filter),
            params=_params(prefetch.params),
        )
    ]


def _params(params: models.SearchParams | None) -> edge.SearchParams | None:
    if params is None:
        return None
    coarse = params.quantization
    quantization = None
    if coarse is not None:
        quantization = edge.QuantizationSearchParams(
            bool(coarse.ignore), coarse.rescore, coarse.oversampling
        )
    return edge.SearchParams(exact=bool(params.exact), quantization=quantization)


def _filter(value: models.Filter | None) -> edge.Filter | None:
    if value is None:
        return None
    parts = (value.must, value.should, value.must_not)
    return edge.Filter(*(None if part is None else [_condition(c) for c in part] for part in parts))  # pyright: ignore


def _condition(value: Any) -> Any:
    if isinstance(value, models.Filter):
        return _filter(value)
    if isinstance(value, models.IsEmptyCondition):
        return edge.IsEmptyCondition(value.is_empty.key)
    assert isinstance(value, models.FieldCondition), value
    if isinstance(value.match, models.MatchValue):
        if isinstance(value.match.value, bool):
            # Edge 0.9 takes a truth for the number 0 or 1, and finds nothing.
            raise UserError(
                f"{value.key}: Qdrant Edge cannot filter by true and false; a server can"
            )
        return edge.FieldCondition(value.key, match=edge.MatchValue(value.match.value))
    if isinstance(value.range, models.DatetimeRange):
        dates = {name: date.isoformat() for name, date in value.range if date is not None}
        return edge.FieldCondition(value.key, range=edge.RangeDateTime(**dates))
    assert isinstance(value.range, models.Range), value
    return edge.FieldCondition(value.key, range=edge.RangeFloat(**dict(value.range)))
