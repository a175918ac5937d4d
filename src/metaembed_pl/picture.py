"""Decoding one picture, whatever a user brings, to upright 8-bit RGB over white."""

import io
import warnings
from pathlib import Path

from PIL import ExifTags, Image, ImageOps

from metaembed_pl.errors import UserError

MAX_PIXELS = 100_000_000
"""Larger pictures are refused: a few kB of PNG can unpack to gigabytes."""

MAX_ASPECT = 200
"""Longer ones are refused, as Qwen's image processors do; here for all families alike."""

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

# Only these decoders are tried: some of Pillow's others start programs (EPS runs Ghostscript).
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


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
    if isinstance(source, Image.Image):
        return _upright_rgb(source)
    name = f"the image {source}" if isinstance(source, Path) else "the image"
    if isinstance(source, Path):
        refuse_special_file(source)
    try:
        with warnings.catch_warnings():
            # Pillow warns at a limit of its own, where ours is checked before a pixel is decoded,
            # and of oddities in tags that nobody reads here.
            warnings.simplefilter("ignore")
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=_FORMATS) as image:
                return _upright_rgb(image)
    except FileNotFoundError as error:
        raise UserError(f"{name} does not exist") from error
    except (UserError, Image.DecompressionBombError) as error:
        raise UserError(f"{name} is refused: {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on corrupt data
        reason = str(error).split(" <_io")[0] or type(error).__name__
        raise UserError(
            f"{name} does not decode ({reason}): expected a whole {', '.join(_FORMATS)} file"
        ) from error


def refuse_special_file(path: Path) -> None:
    """Refuses pipes, devices and folders: reading some of them would wait for ever.

    Raises:
        UserError: it is there and no plain file.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"the image {path} is not a plain file")


def _upright_rgb(image: Image.Image) -> Image.Image:
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are read")
    if max(image.size) > MAX_ASPECT * min(image.size):
        raise UserError(
            f"{image.width} x {image.height} pixels: one side is more than {MAX_ASPECT} times the "
            "other"
        )
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # else it would copy for nothing
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise UserError("floating-point pixels have no agreed white: save it with 8 bits a channel")
    if image.mode.startswith("I"):
        # 16-bit grey: convert("RGB") would clip at 255 and turn nearly all of it white.
        return image.convert("I").point(lambda value: value / 257).convert("L").convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


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
