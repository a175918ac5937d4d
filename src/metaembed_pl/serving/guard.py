"""Protection of the service: allowed hosts and origins, request size, browser policies.

Every page in the user's browser can reach a service on loopback. Pages of other sites are refused
by their Origin or Sec-Fetch-Site header; DNS rebinding is detected by the Host header.
"""

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' blob: data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class Guard:
    """Refuses requests before they reach an application, and adds headers to responses.

    Args:
        app: the application.
        hosts: names of this machine that requests may use; None: any.
        max_body_bytes: of a request.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, max_body_bytes: int):
        self.app, self.max_body_bytes = app, max_body_bytes
        self.hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        # A proxy may serve this app under a path, and pass that path on.
        prefix = headers.get("x-forwarded-prefix", "").rstrip("/")
        if prefix and scope["path"].startswith(f"{prefix}/"):
            scope = {**scope, "path": scope["path"].removeprefix(prefix)}
        refused = self._refused(scope["path"], headers)
        if refused is not None:
            await refused(scope, receive, send_with_headers)
        else:
            await self.app(scope, self._limited(receive), send_with_headers)

    def _refused(self, path: str, headers: Headers) -> JSONResponse | None:
        host = headers.get("host", "")
        if self.hosts is not None and _name(host) not in self.hosts:
            return problem(421, f"this service does not answer to the name {_name(host)[:80]!r}")
        origin = headers.get("origin")
        # Other sites may link to the page, but not request anything else.
        foreign = headers.get("sec-fetch-site", "none") not in ("same-origin", "none")
        own = origin is None or _site(origin) == host or self._is_named(_name(_site(origin)))
        if (foreign and path != "/") or not own:
            return problem(403, "requests from other sites are refused")
        length = headers.get("content-length", "0")
        if not length.isdecimal() or int(length) > self.max_body_bytes:
            return problem(413, self._too_large)
        return None

    def _is_named(self, name: str) -> bool:
        """Whether the operator allowed a site: proxies may rewrite the Host header."""
        return self.hosts is not None and name in self.hosts and name not in LOOPBACK

    @property
    def _too_large(self) -> str:
        return f"the request is too large: at most {self.max_body_bytes:,} bytes are taken"

    def _limited(self, receive: Receive) -> Receive:
        """Counts the bytes received: a request may have no Content-Length."""
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.max_body_bytes:
                raise HTTPException(413, self._too_large)
            return message

        return limited


def _name(host: str) -> str:
    """The name in a Host header, without the port.

    >>> _name("localhost:8000"), _name("[::1]:8000"), _name("LOCALHOST")
    ('localhost', '::1', 'localhost')
    """
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _site(origin: str) -> str:
    """The host in an Origin header, with the port; empty if there is none.

    >>> _site("http://localhost:8000"), _site("null"), _site("http://[")
    ('localhost:8000', '', '')
    """
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def problem(status: int, sentence: str) -> JSONResponse:
    """The answer to a request that failed."""
    return JSONResponse({"error": sentence}, status)
