"""Pictures of a store's items: the stored preview, or the original.

Clients never send paths: the path of an item's picture comes from the store, and only folders that
the operator has allowed are read.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from metaembed_pl.errors import UserError
from metaembed_pl.picture import open_picture, picture_size, small_jpeg
from metaembed_pl.retrieval.sources import PDF_SUFFIX, draw_page

SHOWN_PIXELS = 1280
FILE_KEYS = ("image", "file")
"""Metadata with the path of a picture, or of a PDF, whose page is `page`."""


class Encoded(NamedTuple):
    """An encoded picture."""

    content: bytes
    media_type: str


def media_type(preview: bytes) -> str | None:
    """The media type of a preview; None: it is not a picture."""
    try:
        kind, _, _ = picture_size(preview)
    except UserError:
        return None
    return Image.MIME[kind]


def original(metadata: dict[str, Any], roots: Sequence[Path]) -> Image.Image | None:
    """The picture an item was made from, if it is in one of the (resolved) folders `roots`."""
    where = next((metadata[key] for key in FILE_KEYS if key in metadata), None)
    if not isinstance(where, str):
        return None
    try:
        path = Path(where).resolve()
        if not Path(where).is_absolute() or not any(path.is_relative_to(root) for root in roots):
            return None
        if path.suffix.lower() == PDF_SUFFIX:
            return draw_page(path, int(metadata["page"])).load_image()
        return open_picture(path)
    except (UserError, OSError, ValueError, TypeError, KeyError):
        return None


def as_jpeg(picture: Image.Image) -> Encoded:
    """Encode a picture, reduced to at most `SHOWN_PIXELS` a side."""
    return Encoded(small_jpeg(picture, SHOWN_PIXELS, 88), Image.MIME["JPEG"])


def without_paths(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as clients see them: with the names of files, not their paths.

    >>> without_paths({"image": "/home/me/cat.png", "page": 3})
    {'image': 'cat.png', 'page': 3}
    """
    return {
        key: Path(value).name if key in FILE_KEYS and isinstance(value, str) else value
        for key, value in metadata.items()
    }
