"""What makes an item and a pair valid, and what a picture becomes."""

import io
import json
import os
import struct
import subprocess
import sys
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair, read_items, read_pairs, several, stable_hash
from metaembed_pl.picture import MAX_ASPECT, MAX_PIXELS
from unchecked import shapes_unchecked


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def test_a_bare_string_is_a_text():
    assert Item.parse("a red apple") == Item(text="a red apple")


def test_a_json_item_survives_parsing_and_writing():
    value = {"text": "a", "image": "b.png", "id": "1", "answers": ["1", "2"], "instruction": "c"}
    value["score"] = 0.0
    assert Item.parse(value).to_json() == value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({}, "neither"),
        ({"text": None}, "neither"),
        ({"text": "  "}, "an item's text is empty"),
        ({"text": 3}, "must be a string, not int"),
        ({"text": "a\ud800"}, "lone surrogate"),
        ({"text": "a", "caption": "b"}, "unknown key 'caption'"),
        ({"image": 3}, "not int"),
        ({"text": "a", "answers": "1F34E"}, "must be a list of ids"),
        ({"text": "a", "answers": [3.5]}, "must be a string, not float"),
        ({"text": "a", "answers": [None]}, "is empty"),
        ({"text": "a", "answers": [["b"]]}, "must be a string, not list"),
        ({"text": "a", "id": True}, "must be a string, not bool"),
        ({"text": "a", "image": ""}, "an empty path"),
        ({"text": "a", "instruction": " "}, "an item's instruction is empty"),
        ({"text": "a", "score": "high"}, "must be a finite number, not 'high'"),
        ({"text": "a", "score": float("nan")}, "must be a finite number, not nan"),
        ({"text": "a", "score": True}, "must be a finite number, not True"),
        (["a"], "must be a JSON object, not list"),
    ],
)
def test_refuses_an_item_that_says_nothing_or_something_unknown(value, message):
    with pytest.raises(UserError, match=message):
        Item.parse(value)


@pytest.mark.parametrize("image", ["/etc/passwd", "../b.png", "a/../../b.png", "a\0.png"])
def test_refuses_an_image_path_out_of_the_folder(tmp_path, image):
    with pytest.raises(UserError, match="leaves the data folder"):
        Item.parse({"image": image}, folder=tmp_path)


def test_refuses_an_address_as_an_image(tmp_path):
    with pytest.raises(UserError, match="is not fetched"):
        Item.parse({"image": "https://example.org/a.png"}, folder=tmp_path)


def test_refuses_a_link_out_of_the_folder(tmp_path):
    (tmp_path / "secret").mkdir()
    (tmp_path / "data").mkdir()
    os.symlink(tmp_path / "secret", tmp_path / "data" / "inside")
    with pytest.raises(UserError, match="through a link"):
        Item.parse({"image": "inside/a.png"}, folder=tmp_path / "data")


def test_an_image_path_starts_at_the_folder(tmp_path):
    assert Item.parse({"image": "sub/a.png"}, folder=tmp_path).image == tmp_path / "sub" / "a.png"


def test_transparent_is_white():
    image = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    assert Item(image=image).load_image().getpixel((0, 0)) == (255, 255, 255)


def test_a_palette_with_a_transparent_colour_is_white():
    image = Image.new("P", (2, 2), 0)
    image.putpalette([255, 0, 0] * 256)
    content = encoded(image, transparency=0)
    assert Item(image=content).load_image().getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = encoded(Image.new("RGB", (4, 2)), "JPEG", exif=exif)
    upright = Item(image=content).load_image()
    assert upright.size == (2, 4)
    assert Item(image=upright).load_image().size == (2, 4), "turned once more"


def test_sixteen_bit_grey_keeps_its_brightness():
    content = encoded(Image.new("I;16", (2, 2), 32896))
    assert Item(image=content).load_image().getpixel((0, 0)) == (128, 128, 128)


def test_cmyk_becomes_rgb():
    content = encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG")
    assert Item(image=content).load_image().getpixel((0, 0)) == (255, 255, 255)


def test_an_animation_is_its_first_frame():
    frames = [Image.new("RGB", (2, 2), colour) for colour in ("red", "blue")]
    content = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Item(image=content).load_image().getpixel((0, 0)) == (255, 0, 0)


def test_refuses_a_decompression_bomb_before_unpacking_it():
    with pytest.raises(UserError, match=f"10001 x 10000 pixels; the limit is {MAX_PIXELS:,}"):
        Item(image=png_header(10_001, 10_000)).load_image()
    # So large that Pillow itself refuses.
    with pytest.raises(UserError, match=r"is refused: 400000000 pixels; the limit is 100,000,000"):
        Item(image=png_header(20_000, 20_000)).load_image()


@pytest.mark.filterwarnings("error")
def test_a_picture_just_below_the_limit_is_not_refused_for_its_size():
    with pytest.raises(UserError, match="does not decode"):
        Item(image=png_header(9_900, 10_000)).load_image()


@pytest.mark.parametrize("size", [(1, 1), (1, MAX_ASPECT), (MAX_ASPECT, 1)])
def test_a_small_or_long_picture_is_read(size):
    assert Item(image=encoded(Image.new("RGB", size))).load_image().size == size


@pytest.mark.parametrize("size", [(1, 5000), (MAX_ASPECT + 1, 1)])
def test_refuses_a_picture_longer_than_any_model_can_take(size):
    with pytest.raises(UserError, match=f"refused: {size[0]} x {size[1]} pixels: one side is more"):
        Item(image=encoded(Image.new("RGB", size))).load_image()


def test_refuses_a_picture_that_needs_a_program_to_decode():
    with pytest.raises(UserError, match="does not decode"):
        Item(image=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").load_image()


def test_names_the_image_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.png does not exist"):
        Item(image=tmp_path / "nowhere.png").load_image()


@given(cut=st.integers(0, 300), flip=st.integers(0, 300))
def test_corrupt_pictures_decode_or_are_user_errors(cut, flip):
    content = bytearray(encoded(Image.effect_noise((16, 16), 50), "JPEG"))
    content[flip % len(content)] ^= 0xFF
    message = ""
    try:
        assert Item(image=bytes(content[: len(content) - cut])).load_image().mode == "RGB"
    except UserError as error:
        message = str(error)
    assert "\n" not in message


def test_a_text_has_no_image():
    assert Item("a").load_image() is None


def test_the_uid_is_the_id_or_tells_contents_apart(tmp_path):
    (tmp_path / "a").write_bytes(b"bc")
    assert Item("a", id="x").uid == "x"
    assert Item("a", image=b"bc").uid == Item("a", image=tmp_path / "a").uid
    assert Item("ab", image=b"c").uid != Item("a", image=b"bc").uid
    assert Item(image=Image.new("L", (2, 3))).uid != Item(image=Image.new("L", (3, 2))).uid
    assert Item("a", id="x").content == Item("a", id="y", instruction="z").content == Item("a").uid


def test_a_pair_asks_for_its_positive_unless_it_says_otherwise():
    positive = {"text": "fruit", "answers": ["1", "2"]}
    assert Pair.parse({"id": "p", "query": "q", "positive": positive}).target_id == "1"
    assert Pair.parse({"id": "p", "query": "q", "positive": positive, "asks": "2"}).target_id == "2"
    assert (
        Pair.parse({"id": "p", "query": "q", "positive": {"text": "a", "id": "3"}}).target_id == "3"
    )


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"id": "1", "query": "a"}, 'needs a "positive"; it has id, query'),
        ({"id": "1", "positive": "a"}, 'needs a "query"'),
        ({"query": "a", "positive": "b"}, 'needs an "id"'),
        ({"id": 1.5, "query": "a", "positive": "b"}, "must be a string, not float"),
        ({"id": "1", "query": "a", "positive": "b", "neg": []}, "unknown key 'neg'"),
        ({"id": "1", "query": "a", "positive": "b", "negatives": "c"}, "must be a list of items"),
        ({"id": "1", "query": "a", "positive": "b", "negatives": [{}]}, "neither"),
        ("a", "must be a JSON object"),
    ],
)
def test_refuses_a_pair_that_is_not_whole(value, message):
    with pytest.raises(UserError, match=message):
        Pair.parse(value)


def test_reads_pairs_whose_images_lie_beside_the_file(tmp_path):
    value = {"query": "a", "positive": {"image": "a.png"}, "negatives": ["b"]}
    (tmp_path / "pets.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps(value).encode() + b"\n\n")
    [pair] = read_pairs(tmp_path / "pets.jsonl")
    assert pair.id == "pets:1"
    assert pair.positive.image == tmp_path / "a.png"
    assert pair.negatives == (Item("b"),)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"pets\.jsonl:2: not a line of JSON"),
        ("[" * 100_000, r"pets\.jsonl:2: not a line of JSON"),
        ('{"id": "x", "query": "a"}', r'pets\.jsonl:2: a pair needs a "positive"'),
        ('{"id": "1", "query": "a", "positive": "b"}', r"pets\.jsonl:2: id '1' .* in line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = tmp_path / "pets.jsonl"
    path.write_text('{"id": "1", "query": "a", "positive": "b"}\n' + line)
    with pytest.raises(UserError, match=message):
        list(read_pairs(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*pets\.jsonl: No such file"):
        list(read_pairs(tmp_path / "pets.jsonl"))


def test_a_folder_of_pictures_is_its_items_in_order(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("b.PNG", "a.jpg", "notes.txt", "sub/c.webp"):
        (tmp_path / name).touch()
    assert [item.id for item in read_items(tmp_path)] == ["a.jpg", "b.PNG", "sub/c.webp"]


def test_refuses_a_folder_without_pictures(tmp_path):
    with pytest.raises(UserError, match="contains no pictures"):
        read_items(tmp_path)


def test_reads_items_from_json_lines(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text('"a red circle"\n{"text": "b", "id": "2", "metadata": {"for": "stores"}}\n')
    assert read_items(path) == [Item("a red circle"), Item("b", id="2")]


def test_refuses_no_items_and_repeated_ids(tmp_path):
    path = tmp_path / "items.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="contains no items"):
        read_items(path)
    path.write_text('{"text": "a", "id": "1"}\n' * 2)
    with pytest.raises(UserError, match=r"items\.jsonl:2: id '1' was used before, in line 1"):
        read_items(path)


def test_the_stable_hash_is_the_same_in_another_process():
    code = "from metaembed_pl.item import stable_hash; print(stable_hash('1F34E'))"
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, check=True
    )
    assert int(run.stdout) == stable_hash("1F34E")


@given(st.text(st.characters(codec="utf-8")))
def test_the_stable_hash_fits_a_signed_integer(id):
    assert 0 <= stable_hash(id) < 2**63


@pytest.mark.parametrize("one", ["abc", b"abc", {"text": "abc"}, Item("abc"), 5, None])
def test_one_where_several_are_due_is_refused(one):
    with shapes_unchecked(), pytest.raises(UserError, match="must be a list"):
        several(one, "items")
