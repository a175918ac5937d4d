"""Folders of pictures: where their texts come from, and what the shards then say."""

import json

import pytest

import hub
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.data_prep import folder as script


def run(where, out, *options):
    arguments = ["--from", str(where), "--out", str(out), "--num-workers", "0", *options]
    return script.main(arguments)


def write(root, *names):
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hub.png(number))


def texts(folder):
    return [(pair.query.text, pair.positive.id) for pair in ShardedPairs(folder)]


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    write(root, "a/red_apple-03.png", "b/IMG_1.png", "b/IMG_2.png", "c.png")
    (root / "b" / "IMG_1.txt").write_text("a cat\na black cat\n\n")
    (root / "metadata.csv").write_text("file_name,text\nb/IMG_1.png,not this\nb/IMG_2.png,a dog\n")
    (root / "c.png.txt").write_text("the letter c")
    return root


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (
            "auto",
            [
                ("red apple", "a/red_apple-03.png"),
                ("a cat", "b/IMG_1.png"),
                ("a black cat", "b/IMG_1.png"),
                ("a dog", "b/IMG_2.png"),
                ("the letter c", "c.png"),
            ],
        ),
        ("metadata", [("not this", "b/IMG_1.png"), ("a dog", "b/IMG_2.png")]),
        (
            "sidecar",
            [("a cat", "b/IMG_1.png"), ("a black cat", "b/IMG_1.png"), ("the letter c", "c.png")],
        ),
        (
            "folder",
            [("a", "a/red_apple-03.png"), ("b", "b/IMG_1.png"), ("b", "b/IMG_2.png")],
        ),
    ],
)
def test_texts_come_from_where_they_are_asked_to(tmp_path, pictures, how, expected):
    options = ("--text", how, "--held-out", "0", "--max-dropped", "1")
    assert run(pictures, tmp_path / "out", *options) == 0
    assert texts(tmp_path / "out" / "train") == expected


def test_pictures_with_the_same_text_are_all_right_answers(tmp_path, pictures):
    options = ("--text", "folder", "--held-out", "0", "--max-dropped", "1")
    assert run(pictures, tmp_path / "out", *options) == 0
    found = RetrievalSet.from_pairs("x", ShardedPairs(tmp_path / "out" / "train"))
    assert found.relevant == [[0], [1, 2]]  # the text they share is one query


def test_the_hubs_image_folder_with_json_lines(tmp_path):
    root = tmp_path / "pictures"
    write(root, "train/0.png", "train/1.png")
    lines = [{"file_name": f"{n}.png", "text": f"number {n}"} for n in range(2)]
    (root / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert run(root, tmp_path / "out", "--held-out", "0") == 0
    assert texts(tmp_path / "out" / "train") == [
        ("number 0", "train/0.png"),
        ("number 1", "train/1.png"),
    ]


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda root: None, (), "no folder"),
        (lambda root: root.mkdir(), (), "contains no pictures (."),
        (lambda root: write(root, "a.png"), ("--text", "sidecar"), "none of 1 pictures has a text"),
        (
            lambda root: (write(root, "a.png"), (root / "a.txt").write_bytes(b"\xff")),
            (),
            "a.txt is not text in UTF-8",
        ),
        (
            lambda root: (write(root, "a.png"), (root / "metadata.jsonl").write_text("[1]")),
            (),
            "metadata.jsonl:1: needs a file_name and a text",
        ),
        (
            lambda root: (
                write(root, "a.png"),
                (root / "metadata.csv").write_text("file,text\na,b"),
            ),
            (),
            "metadata.csv:2: needs a file_name and a text",
        ),
    ],
)
def test_a_folder_that_will_not_do_is_one_line(tmp_path, capsys, prepare, options, message):
    root = tmp_path / "pictures"
    prepare(root)
    assert run(root, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
