"""Qdrant's client, imported in one place; if it is missing, the error names the extra.

It takes seconds to import, so the verbs import it only when it is used.
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
