"""Pictures of every depth come out as a viewer shows them."""

import io
import struct

import numpy as np
import pytest
from PIL import Image

from metaembed_pl.item import Item

RAMP = np.tile(np.linspace(0, 1, 64), (8, 1))


def saved(image, format="TIFF", **settings):
    buffer = io.BytesIO()
    image.save(buffer, format, **settings)
    return buffer.getvalue()


def tiff_of_12_bits():
    """Two pixels in three bytes, which Pillow reads and does not write."""
    values = (RAMP * 4095).round().astype(int).flatten()
    packed = bytearray()
    for a, b in zip(values[::2], values[1::2], strict=True):
        packed += bytes([a >> 4, (a & 15) << 4 | b >> 8, b & 255])
    tags = {256: 64, 257: 8, 258: 12, 259: 1, 262: 1, 273: 8 + 2 + 9 * 12 + 4}
    tags |= {277: 1, 278: 8, 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHIH", b"II", 42, 8, len(tags)) + entries + bytes(4) + bytes(packed)


def ramps():
    sixteen = (RAMP * 65535).astype(np.uint16)
    yield "16 bits, PNG", saved(Image.fromarray(sixteen), "PNG")
    yield "16 bits, TIFF", saved(Image.fromarray(sixteen))
    yield "12 bits", tiff_of_12_bits()
    yield (
        "12 of 16 bits",
        saved(Image.fromarray((RAMP * 4095).astype(np.uint16)), tiffinfo={281: 4095}),
    )
    yield "int32 to 255", saved(Image.fromarray((RAMP * 255).astype(np.int32)))
    yield "int32 to 65535", saved(Image.fromarray((RAMP * 65535).astype(np.int32)))
    yield "int32 of all", saved(Image.fromarray(((RAMP - 0.5) * 2e9).astype(np.int32)))
    yield "float to 1", saved(Image.fromarray(RAMP.astype(np.float32)))
    yield "float to 255", saved(Image.fromarray((RAMP * 255).astype(np.float32)))
    yield "float below 0", saved(Image.fromarray((RAMP * 6 - 3).astype(np.float32)))


@pytest.mark.parametrize(("kind", "content"), list(ramps()), ids=lambda value: str(value)[:14])
def test_a_ramp_of_any_depth_is_a_ramp(kind, content):
    shown = np.asarray(Item(image=content).load_image())
    assert np.abs(shown[..., 0] - RAMP * 255).max() <= 1.5
    assert (shown[..., 0] == shown[..., 2]).all()


def test_white_that_is_zero_is_turned_round():
    content = saved(Image.fromarray((RAMP * 65535).astype(np.uint16)), tiffinfo={262: 0})
    with Image.open(io.BytesIO(content)) as image:
        assert image.tag_v2[262] == 0, "Pillow has not kept the tag"
    shown = np.asarray(Item(image=content).load_image())[..., 0]
    assert np.abs(shown - (1 - RAMP) * 255).max() <= 1.5


def test_a_palette_with_transparency_lies_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    shown = Item(image=saved(image, "PNG", transparency=0)).load_image()
    assert [shown.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), (0, 0, 255)]


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
@pytest.mark.parametrize(
    "noise", [b"Exif\0\0" + bytes(range(256)), b"Exif\0\0II*\0\xff\xff\xff\x7f"]
)
def test_exif_of_noise_costs_nothing(mode, noise):
    image = Image.new("RGB", (32, 16), "red").convert(mode)
    shown = Item(image=saved(image, "JPEG", exif=noise)).load_image()
    assert (shown.mode, shown.size) == ("RGB", (32, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_deep_picture_is_brought_upright_as_well(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    values = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    plain = Item(image=saved(Image.fromarray(values), "PNG", exif=exif)).load_image()
    deep = Image.fromarray(values.astype(np.uint16) * 257)
    found = Item(image=saved(deep, "PNG", exif=exif)).load_image()
    assert (np.asarray(found) == np.asarray(plain)).all()
    assert found.size == ((3, 2) if orientation < 5 else (2, 3))
