"""Qdrant's REST interface over HTTP, as far as `push` and `search` use it.

There is no server in the package registries. This one checks what it is sent against the client's
own models of the interface, and answers by the client's local mode: neither is ours.
"""

import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from qdrant_client import QdrantClient, models


class Api:
    """What is asked of a server, by method and path; keeps every request."""

    def __init__(self, key: str | None = None):
        self.key, self.requests, self.params = key, [], {}
        self.local = QdrantClient(":memory:")

    def answer(self, method, path, body, key):
        """The status and the result, or what is wrong."""
        self.requests.append((method, path, body))
        if self.key is not None and key != self.key:
            return 401, "Must provide an API key"
        match = re.fullmatch(r"/collections/([^/?]+)(/[^?]*)?(\?.*)?", path)
        name, what = match.group(1), match.group(2) or ""
        if what == "/exists":
            return 200, {"exists": self.local.collection_exists(name)}
        if (method, what) == ("PUT", ""):
            asked = models.CreateCollection.model_validate(body)
            params = asked.shard_number, asked.replication_factor
            self.params[name] = {"shard_number": params[0], "replication_factor": params[1]}
            return 200, self.local.create_collection(
                name, vectors_config=asked.vectors, metadata=asked.metadata
            )
        if not self.local.collection_exists(name):
            return 404, f"Collection `{name}` doesn't exist!"
        return 200, getattr(self, f"{method}{what}".replace("/", "_"))(name, body)

    def GET(self, name, body):
        found = self.local.get_collection(name)  # of one machine, without copies
        params = found.config.params.model_copy(update=self.params.get(name, {}))
        return found.model_copy(
            update={"config": found.config.model_copy(update={"params": params})}
        )

    def PUT_index(self, name, body):
        asked = models.CreateFieldIndex.model_validate(body)
        return self.local.create_payload_index(name, asked.field_name, asked.field_schema)

    def PUT_points(self, name, body):
        return self.local.upsert(name, models.PointsList.model_validate(body).points)

    def POST_points(self, name, body):
        asked = models.PointRequest.model_validate(body)
        return self.local.retrieve(name, asked.ids, with_payload=asked.with_payload)

    def POST_points_delete(self, name, body):
        return self.local.delete(name, models.PointIdsList.model_validate(body))

    def POST_points_scroll(self, name, body):
        asked = models.ScrollRequest.model_validate(body)
        points, offset = self.local.scroll(name, limit=asked.limit, offset=asked.offset)
        return {"points": points, "next_page_offset": offset}

    def POST_points_count(self, name, body):
        return self.local.count(name, exact=models.CountRequest.model_validate(body).exact)

    def POST_points_query_batch(self, name, body):
        asked = models.QueryRequestBatch.model_validate(body)
        return self.local.query_batch_points(name, asked.searches)


@contextmanager
def serving(api: Api) -> Iterator[str]:
    """A server at an address of its own, while the block runs."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_request(self):
            sent = self.rfile.read(int(self.headers.get("content-length", 0)))
            body = json.loads(sent) if sent else None
            status, result = api.answer(self.command, self.path, body, self.headers.get("api-key"))
            said = {"status": "ok", "result": result, "time": 0.0}
            if status != 200:
                said = {"status": {"error": result}, "time": 0.0}
            content = json.dumps(said, default=lambda model: model.model_dump(mode="json"))
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content.encode())))
            self.end_headers()
            self.wfile.write(content.encode())

        do_GET = do_PUT = do_POST = handle_request

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
