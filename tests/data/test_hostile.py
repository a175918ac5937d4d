"""Broken and malicious data: each case works, is a bad sample, or is one clear error.

docs/data.md has the table. Examples are drawn the same way each time.
"""

import ast
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from metaembed_pl.data.shard_index import parse_manifest
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair, read_pairs
from metaembed_pl.picture import open_picture, picture_size

REPOSITORY = Path(__file__).parents[2]
STEADY = settings(
    derandomize=True,
    max_examples=60,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "drop", "insert"]), st.floats(0, 1), st.binary()),
    min_size=1,
    max_size=4,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def edited(content, edits):
    """The content with bytes flipped, dropped, inserted, or its end cut off."""
    for kind, where, new in edits:
        place = int(where * len(content))
        if kind == "flip":
            content = content[:place] + bytes(
                b ^ 0xFF for b in content[place : place + 1 + len(new)]
            )
        elif kind == "cut":
            content = content[:place]
        elif kind == "drop":
            content = content[:place] + content[place + 1 + len(new) :]
        else:
            content = content[:place] + new + content[place:]
    return content


def picture(format="PNG", size=(9, 7), mode="RGB", **options):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(buffer, format=format, **options)
    return buffer.getvalue()


def member(tar, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def as_tar(members):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            member(tar, name, content)
    return buffer.getvalue()


SHARD = as_tar(
    {
        "a.json": b'{"query": "a cat", "positive": {"image": "positive.png"}}',
        "a.positive.png": picture(),
        "b.json": b'{"query": "a dog", "positive": "fur", "negatives": ["x", {"id": "7"}]}',
        "b.negative.1.webp": picture("WEBP"),
    }
)


def attempt(work, *arguments):
    """What it returns and no message, or nothing and the message for the user."""
    try:
        return work(*arguments), None
    except UserError as error:
        return None, str(error)


def read_all(folder):
    """Pairs, and the messages of bad samples, after a look at all pictures."""
    pairs = ShardedPairs(folder)
    found = []
    for i in range(len(pairs)):
        pair, message = attempt(pairs.__getitem__, i)
        found.append(pair or message)
        for item in (pair.query, pair.positive, *pair.negatives) if pair else ():
            attempt(item.decoded)
    return found


@STEADY
@given(edits=EDITS)
def test_a_spoiled_shard_gives_pairs_bad_samples_or_one_clear_error(tmp_path, edits):
    (tmp_path / "x.tar").write_bytes(edited(SHARD, edits))
    before = sorted(tmp_path.rglob("*"))
    found, message = attempt(read_all, tmp_path)
    assert found or str(tmp_path) in message
    assert sorted(tmp_path.rglob("*")) == before


@STEADY
@given(edits=EDITS)
def test_a_spoiled_index_gives_pairs_bad_samples_or_one_clear_error(tmp_path, edits):
    folder = tmp_path / "s"
    with ShardWriter(folder, "s", overwrite=True) as writer:
        for i in range(2):
            writer.write(Pair(str(i), Item("q"), Item(image=picture(size=(3, 3)))))
    index = folder / "index.jsonl"
    index.write_bytes(edited(index.read_bytes(), edits))
    found, message = attempt(read_all, folder)
    assert found or "index.jsonl" in message


@STEADY
@given(
    changes=st.dictionaries(
        st.sampled_from(["format", "name", "num_pairs", "shards", "index"]), JSON, min_size=1
    ),
    shard=st.dictionaries(st.sampled_from(["file", "num_pairs", "bytes"]), JSON),
)
def test_a_spoiled_manifest_is_read_or_one_clear_error(changes, shard):
    whole = {"file": "0.tar", "num_pairs": 1, "bytes": 9} | shard
    manifest = {"format": 1, "name": "s", "num_pairs": 1, "shards": [whole]} | changes
    found, message = attempt(parse_manifest, json.dumps(manifest).encode(), "there")
    if found is None:
        assert message.startswith("there is malformed")
    else:
        assert sum(part["num_pairs"] for part in found["shards"]) == found["num_pairs"]


@STEADY
@given(value=JSON, side=JSON)
def test_any_json_is_a_pair_or_a_bad_sample(tmp_path, value, side):
    contents = [value, {"query": side, "positive": "x"}, {"query": "q", "positive": side}]
    contents.append({"query": "q", "positive": "x", "negatives": [side], "asks": value})
    members = {f"{i}.json": json.dumps(content).encode() for i, content in enumerate(contents)}
    (tmp_path / "x.tar").write_bytes(as_tar(members))
    found = read_all(tmp_path)
    assert len(found) == 4
    assert all(isinstance(result, Pair) or "cannot be used" in result for result in found)


@STEADY
@given(content=st.binary(max_size=200) | st.text().map(str.encode))
def test_any_bytes_are_lines_of_pairs_or_an_error_that_names_the_line(tmp_path, content):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(content)
    found, message = attempt(lambda: list(read_pairs(path)))
    assert found is not None or message.startswith(f"{path}:")


@STEADY
@given(format=st.sampled_from(FORMATS), edits=EDITS)
def test_a_spoiled_picture_decodes_or_is_one_clear_error(format, edits):
    content = edited(picture(format), edits)
    for read in (open_picture, picture_size):
        found, message = attempt(read, content)
        assert found is not None or "\n" not in message
        assert getattr(found, "mode", "RGB") == "RGB"


# What each case of the table in docs/data.md comes to.


def lines(tmp_path, content):
    (tmp_path / "pairs.jsonl").write_bytes(content)
    return list(read_pairs(tmp_path / "pairs.jsonl"))


LINE = b'{"id": "1", "query": "a", "positive": "b"}'


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path):
    content = b"\xef\xbb\xbf" + LINE + b"\r\n" + LINE.replace(b'"1"', b'"2"') + b"\r\n\r\n"
    assert [pair.id for pair in lines(tmp_path, content)] == ["1", "2"]


def test_a_nul_and_a_text_of_100000_characters_survive_the_round_trip(tmp_path):
    text = "a\0b " + "word " * 20_000
    [pair] = lines(tmp_path, json.dumps({"query": text, "positive": "x"}).encode())
    assert pair.query.text == text
    with ShardWriter(tmp_path / "s", "s") as writer:
        writer.write(pair)
    assert ShardedPairs(tmp_path / "s")[0] == pair


def test_a_lone_surrogate_is_refused_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"pairs\.jsonl:1: .* lone surrogate"):
        lines(tmp_path, LINE.replace(b'"a"', rb'"\ud800"'))


@pytest.mark.parametrize(("name", "format"), [("x.png", "JPEG"), ("x.jpg", "WEBP")])
def test_a_wrong_extension_does_not_matter(tmp_path, name, format):
    shard = as_tar({"k.json": b'{"query": "q"}', "k.positive." + name[2:]: picture(format)})
    (tmp_path / "x.tar").write_bytes(shard)
    [pair] = ShardedPairs(tmp_path)
    assert pair.positive.load_image().size == (9, 7)
    (tmp_path / name).write_bytes(picture(format))
    assert Item(image=tmp_path / name).load_image().size == (9, 7)


@pytest.mark.parametrize(
    "content",
    [
        picture("PNG", mode="1"),
        picture("PNG", mode="LA"),
        picture("PNG", mode="I;16"),
        picture("TIFF", mode="CMYK"),
        picture("JPEG", mode="CMYK"),
        picture("TIFF", mode="I"),
        picture("PNG", size=(1, 1)),
        picture("GIF", mode="P"),
        picture("PNG", save_all=True, append_images=[Image.new("RGB", (9, 7))]),
        picture("WEBP", save_all=True, append_images=[Image.new("RGB", (9, 7))]),
        picture("TIFF", compression="tiff_lzw"),
        picture("JPEG", progressive=True),
    ],
)
def test_pictures_of_every_mode_become_rgb(content):
    assert open_picture(content).mode == "RGB"


def test_a_compressed_archive_is_refused_and_not_unpacked(tmp_path):
    import gzip

    (tmp_path / "x.tar").write_bytes(gzip.compress(SHARD))
    with pytest.raises(UserError, match=r"x\.tar is not a complete, uncompressed tar"):
        ShardedPairs(tmp_path)


def test_a_shard_that_is_a_link_or_a_device_is_refused(tmp_path):
    os.mkfifo(tmp_path / "x.tar")
    with pytest.raises(UserError, match=r"x\.tar is not a plain file"):
        ShardedPairs(tmp_path)


def test_a_picture_that_is_a_pipe_or_a_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    for name in ("a.png", "b.png"):
        for use in (Item.load_image, Item.image_content):
            with pytest.raises(UserError, match=rf"{name} is not a plain file"):
                use(Item(image=tmp_path / name))


class Bomb:
    def __reduce__(self):
        return os._exit, (13,)


def test_members_that_webdataset_would_unpickle_are_not_looked_into(tmp_path):
    members = {"a.json": b'{"query": "q", "positive": "p"}', "a.pyd": pickle.dumps(Bomb())}
    members |= {"a.pickle": pickle.dumps(Bomb()), "a.pth": pickle.dumps(Bomb())}
    (tmp_path / "x.tar").write_bytes(as_tar(members))
    assert [pair.query.text for pair in ShardedPairs(tmp_path)] == ["q"]


UNPICKLES = {
    ("pickle", "load"), ("pickle", "loads"), ("pickle", "Unpickler"), ("cloudpickle", "load"),
    ("dill", "load"), ("joblib", "load"), ("marshal", "loads"), ("shelve", "open"),
    ("yaml", "load"), ("yaml", "unsafe_load"), ("pandas", "read_pickle"), ("pd", "read_pickle"),
}  # fmt: skip


def test_no_code_path_unpickles():
    files = [*(REPOSITORY / "src").rglob("*.py"), *(REPOSITORY / "data_prep").rglob("*.py")]
    assert len(files) > 50
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called = ast.unparse(node.func.value), node.func.attr
            where = f"{path.name}:{node.lineno}"
            assert called not in UNPICKLES, f"{where} unpickles: {ast.unparse(node)}"
            settings = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            assert settings.get("allow_pickle", "False") == "False", f"{where} may unpickle"
            if called == ("torch", "load"):
                assert settings.get("weights_only") == "True", f"{where} may unpickle"
