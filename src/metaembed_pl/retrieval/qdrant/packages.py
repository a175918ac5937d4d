"""Qdrant's two packages, imported in one place: where they are missing, the extra is named.

They take seconds to import: the verbs import what needs them when it is used.
"""

from metaembed_pl.errors import UserError

try:
    import qdrant_edge as edge
    from qdrant_client import QdrantClient, models
    from qdrant_client.http.exceptions import ApiException, UnexpectedResponse
except ImportError as error:
    raise UserError(
        f"Qdrant needs two packages more ({error.name} is missing): "
        "pip install 'metaembed-pl[qdrant]'"
    ) from error

__all__ = ["ApiException", "QdrantClient", "UnexpectedResponse", "edge", "models"]
