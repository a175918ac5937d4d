"""Qdrant's client, imported in one place: where it is missing, the extra is named.

It takes seconds to import: the verbs import what needs it when it is used.
"""

from metaembed_pl.errors import UserError

try:
    from qdrant_client import QdrantClient, models
    from qdrant_client.http.exceptions import ApiException, UnexpectedResponse
except ImportError as error:
    raise UserError(
        f"Qdrant needs a package more ({error.name} is missing): pip install 'metaembed-pl[qdrant]'"
    ) from error

__all__ = ["ApiException", "QdrantClient", "UnexpectedResponse", "models"]
