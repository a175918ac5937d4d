"""Pairs of one's own: what is held out stays out, what is bad is said."""

import base64
import csv
import json
from pathlib import Path

import pytest

import hub
import tiny
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.data_prep import pairs as script


def write_pairs(folder: Path, count: int = 60, bad: int = 0, num_candidates: int = 30) -> Path:
    """`count` pairs over `num_candidates` pictures, each with two hard negatives."""
    (folder / "pictures").mkdir(parents=True)
    for i in range(num_candidates):
        tiny.picture(i).save(folder / "pictures" / f"{i}.png")
    for i in range(bad):
        (folder / "pictures" / f"bad{i}.png").write_bytes(b"no picture")
    lines = []
    for i in range(count):
        own = i % num_candidates
        name = f"bad{i}" if i < bad else own
        others = [(own + 1) % num_candidates, (own + 2) % num_candidates]
        lines.append(
            {
                "query": tiny.text(i),
                "positive": {"image": f"pictures/{name}.png", "id": f"thing {own}"},
                "negatives": [{"image": f"pictures/{j}.png", "id": f"thing {j}"} for j in others],
            }
        )
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def run(file: Path, out: Path, *options: str) -> int:
    options = ("--pairs", str(file), "--out", str(out), "--num-workers", "0", *options)
    return script.main(list(options))


def candidates(folder: Path) -> set[str]:
    return {pair.positive.uid for pair in ShardedPairs(folder)}


def negatives(folder: Path) -> set[str]:
    return {item.uid for pair in ShardedPairs(folder) for item in pair.negatives}


def test_held_out_candidates_are_in_no_training_pair_on_any_side(tmp_path):
    file = write_pairs(tmp_path / "mine")
    assert run(file, tmp_path / "out", "--held-out", "0.3") == 0
    train, test = tmp_path / "out" / "train", tmp_path / "out" / "test"
    assert len(ShardedPairs(train)) + len(ShardedPairs(test)) == 60
    assert candidates(train) | candidates(test) == {f"thing {i}" for i in range(30)}
    assert not (candidates(train) | negatives(train)) & candidates(test)
    assert negatives(test) & candidates(train)  # a test may show what training has seen


def test_more_pairs_move_no_candidate_to_the_other_side(tmp_path):
    for count in (40, 60):
        file = write_pairs(tmp_path / f"mine{count}", count)
        assert run(file, tmp_path / f"out{count}", "--held-out", "0.3") == 0
    assert candidates(tmp_path / "out40" / "test") == candidates(tmp_path / "out60" / "test")


def test_nothing_held_out_makes_no_test(tmp_path, capsys):
    assert run(write_pairs(tmp_path / "mine"), tmp_path / "out", "--held-out", "0") == 0
    assert len(ShardedPairs(tmp_path / "out" / "train")) == 60
    assert not (tmp_path / "out" / "test").exists()
    assert "60 pairs" in capsys.readouterr().out


def test_a_bad_picture_is_left_out_named_and_counted(tmp_path, capsys):
    file = write_pairs(tmp_path / "mine", bad=2)
    assert run(file, tmp_path / "out", "--max-dropped", "0.1") == 0
    printed = capsys.readouterr()
    assert "dropped mine/pairs.jsonl:1: " in printed.err
    assert "dropped: 2" in printed.out
    kept = [len(ShardedPairs(tmp_path / "out" / split)) for split in ("train", "test")]
    assert sum(kept) == 58


@pytest.mark.parametrize(
    ("options", "bad", "message"),
    [
        (("--max-dropped", "0.01"), 3, "3 of 60 pairs cannot be used, more than --max-dropped"),
        (("--held-out", "1.5"), 0, "--held-out is a share, 0 to below 1, not 1.5"),
        (("--held-out", "0.001"), 0, "no pair fell to test with --held-out 0.001"),
    ],
)
def test_what_cannot_be_is_one_line_and_nothing_is_written(tmp_path, capsys, options, bad, message):
    file = write_pairs(tmp_path / "mine", bad=bad)
    assert run(file, tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("metaembed-pl prepare pairs: ") == 1
    assert not list(tmp_path.glob("out/*"))


def test_a_broken_line_is_named(tmp_path, capsys):
    file = write_pairs(tmp_path / "mine")
    file.write_text(file.read_text().replace('"query"', '"qwery"', 1))
    assert run(file, tmp_path / "out") == 2
    assert "pairs.jsonl:1: a pair has unknown key 'qwery'" in capsys.readouterr().err


def test_shards_that_are_there_stay_unless_forced(tmp_path, capsys):
    file = write_pairs(tmp_path / "mine")
    assert run(file, tmp_path / "out") == 0
    assert run(file, tmp_path / "out") == 0
    assert capsys.readouterr().out.count("kept") == 2
    file.write_text(file.read_text().replace("thing 1", "thing one"))
    assert run(file, tmp_path / "out") == 2
    assert "is not empty" in capsys.readouterr().err
    assert run(file, tmp_path / "out", "--force") == 0
    assert "thing one" in candidates(tmp_path / "out" / "train")


FORMS = ("nested", "csv", "parquet", "base64", "nested parquet")


def write_form(folder, form):
    """Two pairs in one of the forms: a text and a picture, each with a hard negative."""
    folder.mkdir()
    pictures = [hub.png(i) for i in range(3)]
    for i, content in enumerate(pictures):
        (folder / f"{i}.png").write_bytes(content)
    names = [f"{i}.png" for i in range(3)]
    if form in ("base64", "nested parquet"):
        data = [base64.b64encode(content).decode() for content in pictures]
        names = [f"data:image/png;base64,{text}" for text in data]
    rows = [
        {
            "id": "a",
            "query": "first",
            "query_image": None,
            "positive_image": names[0],
            "positive_id": "zero",
            "negatives": ["no"],
            "negative_images": [],
        },
        {
            "id": "b",
            "query": "second",
            "query_image": names[2],
            "positive_image": names[1],
            "positive_id": "one",
            "negatives": [],
            "negative_images": [names[2]],
        },
    ]
    nested = [
        {"id": "a", "query": "first", "positive": {"image": names[0], "id": "zero"}}
        | {"negatives": ["no"]},
        {"id": "b", "query": {"text": "second", "image": names[2]}}
        | {"positive": {"image": names[1], "id": "one"}, "negatives": [{"image": names[2]}]},
    ]
    if form in ("nested", "base64"):
        file = folder / "pairs.jsonl"
        # As an editor on Windows saves it.
        file.write_bytes(("\ufeff" + "\r\n".join(map(json.dumps, nested)) + "\r\n").encode())
    elif form == "csv":
        file = folder / "pairs.csv"
        with file.open("w", encoding="utf-8-sig", newline="") as opened:
            writer = csv.DictWriter(opened, rows[0])
            writer.writeheader()
            for row in rows:
                lists = {name: json.dumps(row[name]) for name in ("negatives", "negative_images")}
                writer.writerow(row | lists)
    else:
        file = folder / "pairs.parquet"
        bytes_of = dict(zip(names, pictures, strict=True)) if form == "parquet" else {}
        for row in rows:
            for name in ("query_image", "positive_image"):
                row[name] = bytes_of.get(row[name], row[name])
            row["negative_images"] = [bytes_of.get(n, n) for n in row["negative_images"]]
        images = ("query_image", "positive_image") if form == "parquet" else ()
        hub.write_parquet(file, rows, images)
    return file


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_pairs(tmp_path, form):
    file = write_form(tmp_path / "mine", form)
    assert run(file, tmp_path / "out", "--held-out", "0") == 0
    first, second = ShardedPairs(tmp_path / "out" / "train")
    assert (first.id, first.query.text, first.positive.id) == ("a", "first", "zero")
    assert first.positive.image == hub.png(0)
    assert [(item.text, item.image) for item in first.negatives] == [("no", None)]
    assert (second.query.text, second.query.image) == ("second", hub.png(2))
    assert (second.positive.id, second.positive.image) == ("one", hub.png(1))
    assert [(item.text, item.image) for item in second.negatives] == [(None, hub.png(2))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "p.csv",
            "query,positiv\na,b\n",
            "p.csv has unknown column 'positiv'; known are id, query",
        ),
        ("p.csv", "query,id\na,b\n", "p.csv needs a column 'positive' or 'positive_image'"),
        ("p.csv", "query,positive\na,b,c\n", "p.csv:2: number of fields differs from the header"),
        ("p.csv", "query,positive,negatives\na,b,no\n", "p.csv:2: negatives: expected a JSON list"),
        ("p.csv", "query,positive\n,b\n", "p.csv:2: no query"),
        ("p.csv", b"query,positive\n\xff,b\n", "p.csv is not CSV in UTF-8"),
        ("p.jsonl", '{"query": "a", "positive": "b"}\n[1]\n', "p.jsonl:2: a pair must be a JSON"),
        ("p.jsonl", '{"query": "a"', "p.jsonl:1: not a line of JSON"),
        ("p.jsonl", '{"query": "a", "positive": {"image": "../x.png"}}', "p.jsonl:1: image '../x"),
        (
            "p.jsonl",
            '{"query": "a", "positive": {"image": "data:image/png;base64,?"}}',
            "p.jsonl:1: a picture is not base64",
        ),
        ("p.jsonl", '{"id": "x", "query": "a", "positive": "b"}\n' * 2, "p.jsonl:2: id 'x' was"),
        ("p.txt", "a", "expected one of .jsonl, .json, .csv, .parquet, .tar, not '.txt'"),
        ("p.parquet", b"PAR1", "p.parquet"),
        (
            "p.jsonl",
            '{"query": "a", "query": "b", "positive": "c"}',
            "1: not a line of JSON: the key",
        ),
        ("p.csv", "query,positive,query\na,b,c\n", "p.csv has two columns 'query'"),
    ],
)
def test_what_is_no_pair_is_named_by_file_and_line(tmp_path, capsys, name, content, message):
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(file, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("out/*"))
