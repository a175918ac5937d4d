"""A collection in a folder: Qdrant Edge, Qdrant's own engine inside this process, for tests.

Requests are those that a server gets, put into Edge's classes word by word. One process at a time
has a folder open, for reading too.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import qdrant_edge as edge

from metaembed_pl.errors import UserError
from metaembed_pl.files import new_folder, write_text
from metaembed_pl.retrieval.qdrant.collection import Collection, open_collection
from metaembed_pl.retrieval.qdrant.layout import Layout
from metaembed_pl.retrieval.qdrant.packages import models
from metaembed_pl.retrieval.qdrant.store import QdrantStore

DESCRIPTION_FILE = "qdrant.json"
SHARD_FOLDER = "shard"
IDS_AT_A_TIME = 10_000


def collection_at(address):
    """What is at an address: a server's collection, or for a path one in a folder."""
    return EdgeCollection(address) if isinstance(address, Path) else open_collection(address)


def open_at(address, exact=False):
    """`QdrantStore.open`, of folders too."""
    if not isinstance(address, Path):
        return QdrantStore.open(address, exact)
    collection = EdgeCollection(address)
    return QdrantStore(collection, collection.layout(), exact)


class EdgeCollection(Collection):
    """A folder of Qdrant Edge, which need not be there yet.

    Args:
        folder: its own.
    """

    def __init__(self, folder: Path):
        self.folder, self.address = folder, str(folder)

    def layout(self) -> Layout | None:
        if not self.folder.exists():
            return None
        return Layout.from_json(json.loads((self.folder / DESCRIPTION_FILE).read_bytes()))

    def create(self, layout: Layout, shards: int | None, replicas: int | None) -> None:
        assert shards is None, "a folder is one shard"
        assert replicas is None, "without replicas"
        with new_folder(self.folder) as temporary:
            (temporary / SHARD_FOLDER).mkdir()
            made = edge.EdgeShard.create(
                str(temporary / SHARD_FOLDER), edge.EdgeConfig(vectors=edge_vectors(layout))
            )
            made.close()
            write_text(temporary / DESCRIPTION_FILE, json.dumps(layout.to_json(), indent=1) + "\n")

    @cached_property
    def _shard(self) -> edge.EdgeShard:
        return edge.EdgeShard.load(str(self.folder / SHARD_FOLDER))

    def index(self, key: str, kind: models.PayloadSchemaType) -> None:
        kinds = edge.PayloadSchemaType
        schema = getattr(kinds, kind.value.capitalize())
        self._shard.update(edge.UpdateOperation.create_field_index(key, schema))

    def revisions(self, ids: Sequence[str]) -> dict[str, str]:
        records = self._shard.retrieve(list(ids), ["revision"], False)
        return {str(record.id): (record.payload or {}).get("revision", "") for record in records}

    def upsert(self, points: Sequence[models.PointStruct]) -> None:
        values = [edge.Point(str(p.id), p.vector, p.payload) for p in points]  # pyright: ignore
        self._shard.update(edge.UpdateOperation.upsert_points(values))

    def delete(self, ids: Sequence[str]) -> None:
        self._shard.update(edge.UpdateOperation.delete_points(list(ids)))

    def ids(self) -> Iterator[list[str]]:
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
        return self._shard.count(edge.CountRequest(exact=True))

    def query(self, requests: Sequence[models.QueryRequest]) -> list[list[Any]]:
        batch = edge.QueryBatchRequest([_query_request(request) for request in requests])
        return self._shard.query_batch(batch)

    def finish(self) -> None:
        """Makes the indexes, which a server does by itself."""
        self._shard.optimize()
        self._shard.flush()

    def close(self) -> None:
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
