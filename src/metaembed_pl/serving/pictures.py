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
"""Of metadata: where `embed` found a picture, or a PDF, whose page is `page`."""


class Encoded(NamedTuple):
    """A picture as it is sent."""

    content: bytes
    media_type: str


def media_type(preview: bytes) -> str | None:
    """Of a picture in a store; None if it is none."""
    try:
        kind, _, _ = picture_size(preview)
    except UserError:
        return None
    return Image.MIME[kind]


def original(metadata: dict[str, Any], roots: Sequence[Path]) -> Image.Image | None:
    """The picture an item was made of, if it is there and in one of the folders.

    Args:
        metadata: of the item.
        roots: resolved folders whose pictures may be shown.
    """
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
    """A picture of at most `SHOWN_PIXELS` a side, encoded."""
    return Encoded(small_jpeg(picture, SHOWN_PIXELS, 88), Image.MIME["JPEG"])


def without_paths(metadata: dict[str, Any]) -> dict[str, Any]:
    """Metadata as clients see them: of a file its name, not where it lies on this machine.

    >>> without_paths({"image": "/home/me/cat.png", "page": 3})
    {'image': 'cat.png', 'page': 3}
    """
    return {
        key: Path(value).name if key in FILE_KEYS and isinstance(value, str) else value
        for key, value in metadata.items()
    }
