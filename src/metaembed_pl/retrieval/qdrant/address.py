"""The address of a collection: the URL of a server and a name. Imports nothing heavy."""

from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

from metaembed_pl.errors import UserError


class ServerAddress(NamedTuple):
    """The URL of a server, and the name of a collection."""

    server: str
    collection: str


def is_qdrant(address: str | Path) -> bool:
    """Whether an address is a collection's, not the folder of a store."""
    return str(address).startswith(("http://", "https://"))


def parse_address(address: str) -> ServerAddress:
    """Read `http://HOST:6333/NAME`.

    Raises:
        UserError: it is not a URL, names no collection, or contains a key, a query or a fragment.

    >>> parse_address("http://localhost:6333/things")
    ServerAddress(server='http://localhost:6333', collection='things')
    """
    parts = urlsplit(address)
    if parts.username is not None or parts.password is not None:
        raise UserError(
            f"no key in an address ({parts.scheme}://...@{parts.hostname}): others can read it "
            "there; set the environment variable QDRANT_API_KEY"
        )
    prefix, _, name = parts.path.rstrip("/").rpartition("/")
    is_named = parts.hostname and name and not parts.query and not parts.fragment
    if not is_qdrant(address) or not is_named:
        raise UserError(
            f"a collection on a server is http://HOST:6333/NAME or https://..., got {address!r}"
            + ("" if is_qdrant(address) else "; folders of Qdrant Edge are no longer supported")
        )
    return ServerAddress(f"{parts.scheme}://{parts.netloc}{prefix}", name)
