"""Find pictures, and decode them from any format to upright 8-bit RGB over white."""

import io
import logging
import os
import warnings
from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, features

from metaembed_pl.errors import UserError
from metaembed_pl.files import refuse_special_file

log = logging.getLogger(__name__)

MAX_PIXELS = 100_000_000
"""Larger pictures are refused: a few kB of PNG can unpack to gigabytes."""

MAX_ASPECT = 200
"""Longer ones are refused, as Qwen's image processors do; here for all families alike."""

_HAS_AVIF = bool(features.check("avif"))
PICTURE_SUFFIXES = frozenset(
    ".png .apng .jpg .jpeg .jpe .jfif .webp .gif .bmp .dib .tif .tiff".split()
    + [".avif"] * _HAS_AVIF
)

# Only these decoders are tried: some of Pillow's others start programs (EPS runs Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", *["AVIF"] * _HAS_AVIF)
_SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")


def files_below(
    root: Path,
    is_wanted: Callable[[Path], bool] = lambda path: is_picture(path),
    beside: Collection[str] | None = (),
) -> list[Path]:
    """The pictures of a folder and the folders in it, sorted; a warning counts skipped files.

    Linked folders are followed, each once. Hidden files are left out: a Mac puts a `._a.png`
    beside each `a.png`.

    Args:
        root: a folder.
        is_wanted: which of the other files are taken.
        beside: suffixes of files that belong to pictures, and are not counted; None: all.
    """
    found: list[Path] = []
    left_out: Counter[str] = Counter()
    seen: set[str] = set()
    for folder, folders, names in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(folder, root)
        for name in names:
            path = Path(folder, name)
            if name.startswith("."):
                left_out["hidden"] += 1
            elif not _is_utf8(below + name):
                named = os.fsencode(os.path.normpath(os.path.join(below, name)))
                left_out[f"with a name that is not UTF-8, such as {named!r}"] += 1
            elif not path.is_file():
                left_out["broken link, pipe or device"] += 1
            elif is_wanted(path):
                found.append(path)
            elif path.suffix.lower() not in (beside or ()):
                left_out[path.suffix.lower() or "without an extension"] += 1
    if left_out and beside is not None:
        counts = ", ".join(f"{count:,} {kind}" for kind, count in left_out.most_common())
        log.warning("%s: skipped files: %s", root, counts)
    return sorted(found)


def is_picture(path: Path) -> bool:
    """Whether a file's suffix or its first bytes are those of a picture."""
    if path.suffix.lower() in PICTURE_SUFFIXES:
        return True
    try:
        with path.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    return (
        head.startswith(_SIGNATURES)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[:2] == b"BM" and head[6:10] == bytes(4))
        or (_HAS_AVIF and head[4:12] in (b"ftypavif", b"ftypavis"))
    )


def _is_utf8(name: str) -> bool:
    try:
        return bool(name.encode())
    except UnicodeEncodeError:
        return False


def open_picture(source: Path | bytes | Image.Image) -> Image.Image:
    """Decode a picture: first frame, upright by its EXIF tag, RGB, transparency over white.

    Args:
        source: a file, the encoded content of one, or an image already decoded.

    Returns:
        A fully loaded RGB image, independent of the source.

    Raises:
        UserError: missing, larger than `MAX_PIXELS`, longer than `MAX_ASPECT` times its other side,
            or not a picture that decodes.
    """
    name = f"the image {source}" if isinstance(source, Path) else "the image"
    if isinstance(source, Path):
        refuse_special_file(source, "image")
    try:
        with warnings.catch_warnings():
            # Pillow warns at a limit of its own, where ours is checked before a pixel is decoded,
            # and of oddities in tags that nobody reads here.
            warnings.simplefilter("ignore")
            if isinstance(source, Image.Image):
                return _upright_rgb(source)
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=_FORMATS) as image:
                return _upright_rgb(image)
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist") from error
    except Image.DecompressionBombError as error:  # at twice a limit that is lower than ours
        size = str(error).partition(")")[0].partition("(")[2] or "too many pixels"
        raise UserError(
            f"{name} is refused: {size}; the limit is {MAX_PIXELS:,}: shrink it"
        ) from error
    except UserError as error:
        raise UserError(f"{name} is refused: {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on corrupt data
        reason = str(error).split(" <_io")[0] or type(error).__name__
        raise UserError(
            f"{name} does not decode ({reason}): expected a complete {', '.join(_FORMATS)} file"
        ) from error


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise UserError(
            f"{image.width} x {image.height} pixels; the limit is {MAX_PIXELS:,}: shrink it"
        )
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UserError(
            f"{image.width} x {image.height} pixels: one side is more than {MAX_ASPECT} times the "
            "other"
        )
    turn = _turn(image)
    if image.mode.startswith(("I", "F")):
        image = _in_8_bits(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    image.info = {}  # with its tags, it would be turned again when it is opened again
    return image


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What brings a picture upright, by its EXIF tag; nothing where the tags are noise."""
    turns = (None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_270")
    try:
        orientation = int(image.getexif().get(ExifTags.Base.Orientation, 1))
        name = (*turns, "TRANSVERSE", "ROTATE_90")[orientation - 1 if 0 < orientation < 9 else 0]
    except Exception:  # whatever reading noise leads to
        return None
    return name and Image.Transpose[name]


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 12, 16 or 32 bits or of floating-point numbers, in 8: as a viewer shows it.

    convert("L") would clip at 255 and turn nearly all of it white.
    """
    tags = getattr(image, "tag_v2", {})  # of TIFF
    bits, zero, white = (np.ravel(tags.get(tag, ())).tolist()[:1] for tag in (258, 262, 281))
    white = white[0] if white else None
    if white is None and image.mode.startswith("I;16"):
        white = 2 ** min(16, *bits, 16) - 1
    pixels = np.nan_to_num(np.asarray(image, np.float32), posinf=0, neginf=0)
    low, high = float(pixels.min()), float(pixels.max())
    if white is None:  # the smallest of the usual ones that nothing is brighter than
        whites = (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0)
        white = next((white for white in whites if low >= 0 and high <= white), None)
    if white is not None:
        low, high = 0.0, float(white)
    pixels = ((pixels - low) * (255 / max(high - low, 1e-30))).clip(0, 255)
    if zero == [0]:  # white is zero
        pixels = 255 - pixels
    return Image.fromarray(pixels.round().astype(np.uint8))


def picture_size(content: bytes) -> tuple[str, int, int]:
    """Format, width and height of an encoded picture, from its header: nothing is decoded.

    Raises:
        UserError: not the header of a picture that is read here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                return str(image.format), image.width, image.height
    except Exception as error:  # as above
        reason = str(error).split(" <_io")[0] or type(error).__name__
        raise UserError(f"the image does not decode ({reason})") from error


def small_jpeg(picture: Image.Image, pixels: int, quality: int) -> bytes:
    """A copy of at most `pixels` a side, as JPEG."""
    small = picture.copy()
    small.thumbnail((pixels, pixels))
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()
