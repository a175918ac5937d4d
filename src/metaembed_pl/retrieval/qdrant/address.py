"""Where a collection is: a URL of a server, or a folder of Qdrant Edge. Imports nothing heavy."""

from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from metaembed_pl.errors import UserError

DESCRIPTION_FILE = "qdrant.json"
"""In a folder of Qdrant Edge: what it holds. A server keeps the same with the collection."""


class ServerAddress(NamedTuple):
    """A collection on a server.

    Args:
        server: its URL.
        collection: the name there.
    """

    server: str
    collection: str


def is_qdrant(address: str | Path) -> bool:
    """Whether this is a collection rather than the folder of a store."""
    return _is_url(address) or (Path(address) / DESCRIPTION_FILE).is_file()


def parse_address(address: str | Path) -> ServerAddress | Path:
    """Read `http://HOST:6333/NAME`, or the name of a folder.

    Raises:
        UserError: the URL names no collection, or says more than it should.

    >>> parse_address("http://localhost:6333/things")
    ServerAddress(server='http://localhost:6333', collection='things')
    """
    if not _is_url(address):
        return Path(address)
    parts = urlsplit(str(address))
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"no key in an address ({parts.scheme}://...@{parts.hostname}): others can read it "
            "there; set the environment variable QDRANT_API_KEY"
        )
    prefix, _, name = parts.path.rstrip("/").rpartition("/")
    if not parts.hostname or not name or parts.query or parts.fragment:
        raise UserError(
            f"a collection on a server is http://HOST:6333/NAME or https://..., got {address!r}"
        )
    return ServerAddress(f"{parts.scheme}://{parts.netloc}{prefix}", name)


def _is_url(address: str | Path) -> bool:
    return str(address).startswith(("http://", "https://"))
