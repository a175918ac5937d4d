"""Tables and tars of other people, as they are."""

import io
import json
import tarfile

import pytest

import hub
from metaembed_pl.data.mapping import PRESETS
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.data_prep import pairs as script


def run(out, *options):
    flags = ["--out", str(out), "--num-workers", "0", "--held-out", "0", *map(str, options)]
    return script.main(flags)


def made(out):
    return list(ShardedPairs(out / "train"))


def test_columns_are_told_and_cells_may_be_lists(tmp_path):
    rows = [
        {
            "question": [f"what is {i}", f"name {i}"],
            "page": hub.png(i),
            "n": f"p{i}",
            "bad": hub.png(20 + i),
            "worse": [f"no {i}", f"never {i}"],
        }
        for i in range(4)
    ]
    file = tmp_path / "data" / "train-0.parquet"
    hub.write_parquet(file, rows, ("page", "bad"))
    columns = "query=question,positive_image=page,positive_id=n,negatives=worse,negative_images=bad"
    assert run(tmp_path / "out", "--from", tmp_path, "--columns", columns) == 0
    pairs = made(tmp_path / "out")
    assert [pair.query.text for pair in pairs[:3]] == ["what is 0", "name 0", "what is 1"]
    assert [pair.positive.id for pair in pairs] == [f"p{i // 2}" for i in range(8)]
    assert pairs[3].positive.image == hub.png(1)
    negatives = [(item.text, item.image) for item in pairs[0].negatives]
    assert negatives == [("no 0", hub.png(20)), ("never 0", None)]
    assert len({pair.id for pair in pairs}) == 8
    manifest = ShardedPairs(tmp_path / "out" / "train").manifest
    assert manifest["settings"]["columns"] == columns


def test_several_positives_are_all_right_and_never_negatives_of_each_other(tmp_path):
    rows = [
        {"q": "a pet", "right": ["cat", "dog"], "wrong_1": "tree", "wrong_2": "dog"},
        {"q": "a plant", "right": ["tree"], "wrong_1": "cat", "wrong_2": None},
    ]
    hub.write_parquet(tmp_path / "x.parquet", rows)
    columns = "query=q,positive=right,negatives=wrong_1+wrong_2"
    assert run(tmp_path / "out", "--from", tmp_path / "x.parquet", "--columns", columns) == 0
    pairs = made(tmp_path / "out")
    assert [pair.positive.text for pair in pairs] == ["cat", "dog", "tree"]
    right = {pair.positive.uid for pair in pairs[:2]}
    assert all(right <= set(pair.relevant_ids) for pair in pairs[:2])
    assert [[item.text for item in pair.negatives] for pair in pairs] == [
        ["tree"],
        ["tree"],
        ["cat"],
    ]


def add(tar, name, content):
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize("caption", ["txt", "json", "other"])
def test_tars_of_img2dataset_are_captions_and_their_pictures(tmp_path, caption):
    for number in range(2):
        with tarfile.open(tmp_path / f"0000{number}.tar", "w") as tar:
            for i in range(3):
                key, words = f"{number}{i:05}", f"picture {number} {i}"
                add(tar, f"{key}.jpg", hub.png(10 * number + i))
                if caption == "txt":
                    add(tar, f"{key}.txt", words.encode())
                about = {"caption": words, "alt": words, "url": "https://x", "width": 56}
                add(tar, f"{key}.json", json.dumps(about).encode())
    told = ["--columns", "query=json.alt,positive_image=jpg"] if caption == "other" else []
    assert run(tmp_path / "out", "--from", tmp_path, *told) == 0
    pairs = made(tmp_path / "out")
    assert [pair.query.text for pair in pairs][2:4] == ["picture 0 2", "picture 1 0"]
    assert pairs[4].positive.image == hub.png(11)
    if caption != "other":
        assert pairs[4].positive.id == "100001"


def test_passages_of_ms_marco_are_texts_with_ids(tmp_path):
    passages = [{"docid": f"{i}", "title": f"T{i}", "text": f"words {i}"} for i in range(3)]
    rows = [
        {
            "query_id": "7",
            "query": "which",
            "positive_passages": passages[:1],
            "negative_passages": passages[1:],
        }
    ]
    hub.write_parquet(tmp_path / "set" / "train.parquet", rows)
    command = ("--from", tmp_path / "set", "--preset", "msmarco")
    assert run(tmp_path / "out", *command) == 0
    (pair,) = made(tmp_path / "out")
    assert (pair.id, pair.query.text, pair.positive.text) == ("7", "which", "T0 words 0")
    assert pair.positive.id == "0"
    assert [(item.id, item.text) for item in pair.negatives] == [
        ("1", "T1 words 1"),
        ("2", "T2 words 2"),
    ]


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_preset_reads_a_set_with_its_columns(name, tmp_path):
    preset, folder = PRESETS[name], tmp_path / "set"
    folder.mkdir()
    rows = []
    for i in range(3):
        row = {}
        for key, column in preset.columns.items():
            (folder / f"{key}{i}.png").write_bytes(hub.png(i + 5 * len(key)))
            as_path = name == "megapairs" and key.endswith(("image", "images"))
            picture = f"{key}{i}.png" if as_path else hub.png(i)
            row[column] = picture if "image" in key else f"{key} {i}"
        rows.append(row)
    if name == "megapairs":
        where = folder / "megapairs.jsonl"
        where.write_text("\n".join(map(json.dumps, rows)))
    else:
        where = folder
        images = tuple(c for k, c in preset.columns.items() if "image" in k)
        hub.write_parquet(folder / "train-0.parquet", rows, images)
    assert run(tmp_path / "out", "--preset", name, "--from", where) == 0
    assert len(made(tmp_path / "out")) == 3


def test_json_lines_and_csv_have_their_columns_too(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": "q", "meta": {"b": ["p1", "p2"]}, "c": 5}\n')
    columns = "query=a,positive=meta.b"
    assert run(tmp_path / "1", "--from", tmp_path / "x.jsonl", "--columns", columns) == 0
    assert [pair.positive.text for pair in made(tmp_path / "1")] == ["p1", "p2"]
    (tmp_path / "x.csv").write_text("a,b\nq,p\n")
    assert run(tmp_path / "2", "--from", tmp_path / "x.csv", "--columns", "query=a,positive=b") == 0
    assert [pair.positive.text for pair in made(tmp_path / "2")] == ["p"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--columns", "query=words,positive=b"), "has no column 'words'; it has a, b"),
        (("--columns", "qwery=a"), "columns has unknown key 'qwery'; known are id, query"),
        (("--columns", "query"), "--columns takes KEY=COLUMN,... such as text=caption"),
        ((), "has unknown column 'a'; known are id, query"),
        (("--columns", "query=a"), "needs a column 'positive' or 'positive_image', or say which"),
        (("--pairs", "x.jsonl"), "give exactly one of --pairs, --from and --preset"),
    ],
)
def test_a_mapping_that_cannot_be_is_one_line(tmp_path, capsys, options, message):
    hub.write_parquet(tmp_path / "x.parquet", [{"a": "q", "b": "p"}])
    assert run(tmp_path / "out", "--from", tmp_path / "x.parquet", *options) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


def test_what_is_not_there_or_broken_is_one_line(tmp_path, capsys):
    (tmp_path / "x.tar").write_bytes(b"no tar" * 200)
    for where, message in (
        (tmp_path / "x.tar", "is not a complete, uncompressed tar"),
        ("nowhere", "nowhere is neither a file, a folder nor a hub id ORG/NAME"),
        (tmp_path, "is not a complete, uncompressed tar"),
    ):
        assert run(tmp_path / "out", "--from", where) == 2
        assert message in capsys.readouterr().err
    assert run(tmp_path / "out", "--preset", "megapairs") == 2
    assert "--preset megapairs cannot be read from the hub: Give its JSON Lines" in (
        capsys.readouterr().err
    )
    assert run(tmp_path / "out", "--from", "some/dataset") == 1  # no network in tests
    assert "the hub cannot be reached" in capsys.readouterr().err
