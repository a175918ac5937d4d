"""A collection on a Qdrant server or cluster, by Qdrant's REST interface."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from metaembed_pl.errors import Unreachable, UserError
from metaembed_pl.retrieval.qdrant.address import ServerAddress, parse_address
from metaembed_pl.retrieval.qdrant.layout import Layout
from metaembed_pl.retrieval.qdrant.packages import (
    ApiException,
    QdrantClient,
    UnexpectedResponse,
    models,
)

KEY_VARIABLE = "QDRANT_API_KEY"
DESCRIPTION = "metaembed_pl"
"""Our entry in a collection's metadata."""
TIMEOUT_S = 120
IDS_AT_A_TIME = 10_000


def open_collection(address: str) -> "Collection":
    """The collection at an address, which may not exist yet.

    Raises:
        UserError: the address is not valid.
    """
    parsed = parse_address(address)
    key = os.environ.get(KEY_VARIABLE)
    client = QdrantClient(
        url=parsed.server, api_key=key, timeout=TIMEOUT_S, check_compatibility=False
    )
    return Collection(client, parsed)


class Collection:
    """A collection on a server; ids are those of points: UUIDs."""

    def __init__(self, client: QdrantClient, address: ServerAddress):
        self._client, self._name = client, address.collection
        self.address = f"{address.server}/{address.collection}"

    def layout(self) -> Layout | None:
        """The layout of the collection; None: it does not exist yet.

        Raises:
            UserError: it was not pushed from a store.
        """
        with self._errors():
            if not self._client.collection_exists(self._name):
                return None
            metadata = self._client.get_collection(self._name).config.metadata or {}
        try:
            return Layout.from_json(metadata.get(DESCRIPTION))
        except UserError as error:
            raise UserError(f"{self.address}: {error}; choose another name") from error

    def create(self, layout: Layout, shards: int | None, replicas: int | None) -> None:
        """Create the collection."""
        with self._errors():
            self._client.create_collection(
                self._name,
                vectors_config=layout.vectors(),
                shard_number=shards,
                replication_factor=replicas,
                metadata={DESCRIPTION: layout.to_json()},
            )

    def copies(self) -> tuple[int, int]:
        """The numbers of shards and of replicas of the collection."""
        with self._errors():
            params = self._client.get_collection(self._name).config.params
        return params.shard_number or 1, params.replication_factor or 1

    def index(self, key: str, kind: models.PayloadSchemaType) -> None:
        """Create an index for filters on a key of the payload."""
        with self._errors():
            self._client.create_payload_index(self._name, key, kind, wait=True)

    def revisions(self, ids: Sequence[str]) -> dict[str, str]:
        """The revisions of existing points."""
        with self._errors():
            records = self._client.retrieve(self._name, list(ids), with_payload=["revision"])
        return {str(record.id): (record.payload or {}).get("revision", "") for record in records}

    def upsert(self, points: Sequence[models.PointStruct]) -> None:
        """Add points, or replace them; on disk when this returns."""
        with self._errors():
            self._client.upsert(self._name, list(points), wait=True)

    def delete(self, ids: Sequence[str]) -> None:
        """Remove points."""
        with self._errors():
            self._client.delete(self._name, models.PointIdsList(points=list(ids)), wait=True)

    def ids(self) -> Iterator[list[str]]:
        """The ids of all points, some at a time."""
        offset: Any = None
        while True:
            with self._errors():
                records, offset = self._client.scroll(
                    self._name, limit=IDS_AT_A_TIME, offset=offset, with_payload=False
                )
            yield [str(record.id) for record in records]
            if offset is None:
                return

    def count(self) -> int:
        """The number of points."""
        with self._errors():
            return self._client.count(self._name, exact=True).count

    def query(self, requests: Sequence[models.QueryRequest]) -> list[list[Any]]:
        """The scored points of each request, best first."""
        with self._errors():
            found = self._client.query_batch_points(self._name, list(requests))
        return [response.points for response in found]

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns errors of the server and the network into messages of one line."""
        try:
            yield
        except UnexpectedResponse as error:
            hint = f"; set {KEY_VARIABLE}" if error.status_code in (401, 403) else ""
            raise UserError(
                f"{self.address}: the server says {error.status_code}: {_reason(error)}{hint}"
            ) from error
        except ApiException as error:
            raise Unreachable(f"{self.address} cannot be reached: {error}") from error


def _reason(error: UnexpectedResponse) -> str:
    """The server's own message."""
    try:
        return json.loads(error.content)["status"]["error"]
    except (ValueError, KeyError, TypeError):
        return error.reason_phrase or "no reason given"
