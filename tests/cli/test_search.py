import json
import os
import pty
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.data.shards import ShardWriter
from metaembed_pl.item import Item, Pair
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.retrieval.search import rank


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.embedder().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(4):
        tiny.picture(i).save(folder / f"{i}.png")
    return folder


@pytest.fixture
def things(tmp_path):
    tiny.picture(0).save(tmp_path / "noise.png")
    lines = [
        {"id": "fruit", "text": "red apple"},
        {"image": "noise.png"},
        "a bare\tstring \u001b[2J[bold]",
    ]
    file = tmp_path / "things.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def search(*arguments, device="cpu"):
    return main(["search", "--device", device, *map(str, arguments)])


def test_json_holds_what_rank_finds(model, pictures, capsys):
    assert (
        search("--model", model, "--items", pictures, "--query", "cat", "--top", 3, "--json") == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["query"] == {"text": "cat", "image": None}
    assert found["budget"] == "4x8"
    items = [Item(image=path) for path in sorted(pictures.iterdir())]
    hits = rank(MetaEmbedder.from_pretrained(model), [Item("cat")], items, top=3)[0]
    expected = [
        {
            "rank": place,
            "score": pytest.approx(hit.score, abs=1e-5),
            "id": f"{hit.candidate}.png",
            "text": None,
            "image": str(pictures / f"{hit.candidate}.png"),
        }
        for place, hit in enumerate(hits, start=1)
    ]
    assert found["results"] == expected


def test_a_picture_finds_itself_and_the_budget_is_what_was_asked(model, pictures, capsys):
    picture = pictures / "2.png"
    arguments = ["--model", model, "--items", pictures, "--image", picture, "--budget", "1x4"]
    assert search(*arguments, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["query"] == {"text": None, "image": str(picture)}
    assert found["budget"] == "1x4"
    assert len(found["results"]) == 4


def test_a_pipe_gets_aligned_text_without_control_characters(model, things, capsys):
    assert search("--model", model, "--items", things, "--query", "apple") == 0
    out, err = capsys.readouterr()
    head, *rows = out.splitlines()
    assert err == ""
    assert head.split() == ["rank", "score", "id", "text"]
    column = head.index("text")
    texts = {row[column:] for row in rows}
    assert texts == {"red apple", str(things.parent / "noise.png"), "a bare string [2J[bold]"}
    assert [row.split()[0] for row in rows] == ["1", "2", "3"]


def test_shards_are_searched_by_their_positives_each_once(model, tmp_path, capsys):
    folder = tmp_path / "shards"
    with ShardWriter(folder, "pets") as writer:
        for i in range(4):
            positive = Item(image=tiny.picture(i // 2), id=f"pet-{i // 2}")
            writer.write(Pair(f"{i}", Item(f"name {i}"), positive))
    assert search("--model", model, "--items", folder, "--query", "cat") == 0
    rows = sorted(row.split(maxsplit=3)[2:] for row in capsys.readouterr().out.splitlines()[1:])
    assert rows == [
        ["pet-0", 'answers "name 0", "name 1"'],
        ["pet-1", 'answers "name 2", "name 3"'],
    ]


def test_what_embed_takes_is_searched_without_a_store(model, tmp_path, capsys):
    lines = [{"id": "a", "text": "red apple", "metadata": {"price": 3}}, {"id": "b", "text": "sky"}]
    (tmp_path / "things.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pq.write_table(
        pa.table({"id": ["a", "b"], "text": ["red apple", "sky"], "price": [3, 4]}),
        tmp_path / "things.parquet",
    )
    pq.write_table(
        pa.table({"id": ["a", "b"], "caption": ["red apple", "sky"]}), tmp_path / "named.parquet"
    )
    found = []
    address = f"file://{tmp_path}/things.parquet"
    named = [tmp_path / "named.parquet", "--columns", "text=caption"]
    for where in ([tmp_path / "things.jsonl"], [tmp_path / "things.parquet"], [address], named):
        assert search("--model", model, "--query", "apple", "--items", *where) == 0
        found.append(capsys.readouterr().out)
    assert all(out == found[0] for out in found)
    assert sorted(line.split()[2] for line in found[0].splitlines()[1:]) == ["a", "b"]


def test_a_store_is_no_folder_of_items(tmp_path, capsys):
    (tmp_path / "manifest.json").touch()
    assert search("--model", tmp_path, "--items", tmp_path, "--query", "cat") == 2
    assert f"is a store: use --store {tmp_path}" in capsys.readouterr().err


def test_a_folder_of_folders_of_shards_is_told_to_choose_one(tmp_path, capsys):
    folder = tiny.shards(tmp_path / "data" / "pets", 2)
    assert search("--model", tmp_path, "--items", tmp_path / "data", "--query", "cat") == 2
    assert f"choose one folder of shards, such as {folder}" in capsys.readouterr().err


def test_progress_never_reaches_standard_output(model, pictures, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert search("--model", model, "--items", pictures, "--query", "cat", "--json") == 0
    json.loads(capsys.readouterr().out)


def test_a_terminal_gets_a_table_with_names_as_they_are(model, things):
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "metaembed_pl", "search", "--device", "cpu"]
    command += ["--model", model, "--items", things, "--query", "apple"]
    environment = {**os.environ, "COLUMNS": "200", "TERM": "xterm"}
    subprocess.run(command, stdout=theirs, stderr=subprocess.DEVNULL, env=environment, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    assert "red apple" in shown
    assert "a bare string [2J[bold]" in shown
    assert "\x1b[2J" not in shown


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--query": None}, "no query: give --query"),
        ({"--budget": "3x4"}, "not trained at 3 query vectors; choose one of 1, 2, 4"),
        ({"--budget": "lots"}, "got 'lots'"),
        ({"--top": "0"}, "--top must be at least 1, got 0"),
        ({"--batch-size": "-1"}, "--batch-size must be at least 1, got -1"),
        ({"--items": "nowhere"}, "nowhere"),
        ({"--columns": "text=caption"}, "is not Parquet"),
        (
            {"--items": None, "--store": "s", "--columns": "text=caption"},
            "--columns is for --items",
        ),
        ({"--items": "x", "--normalised": ""}, "--normalised needs a --store"),
        ({"--items": "x", "--exact": ""}, "--exact needs a --store: --items are always searched"),
        ({"--revision": "main"}, "is a folder: only a model on the hub has revisions"),
        ({"--items": "pages.parquet"}, "cannot read pages.parquet: No such file"),
        ({"--image": "nowhere.png"}, "nowhere.png does not exist"),
        ({"--model": "nowhere"}, "nowhere does not exist: train or download it first"),
        ({"--device": "abacus"}, "device abacus"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(model, pictures, capsys, changes, message):
    flags = {"--model": model, "--items": pictures, "--query": "cat", "--device": "cpu", **changes}
    arguments = [
        str(part) for flag in flags.items() if flag[1] is not None for part in flag if part
    ]
    assert main(["search", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_help_is_light():
    program = "import sys; from metaembed_pl.cli.main import main; main(['search', '--help'])"
    check = "; print({'torch', 'transformers', 'PIL', 'rich', 'numpy'} & set(sys.modules))"
    wrapped = f"import sys\ntry:\n {program}\nexcept SystemExit:\n pass\n{check[2:]}"
    done = subprocess.run(
        [sys.executable, "-c", wrapped], capture_output=True, text=True, check=True
    )
    assert "--budget RQxRC" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"
