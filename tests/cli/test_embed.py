import json
import os
import pty
import re
import signal
import subprocess
import sys
import time

import pypdfium2
import pytest
import torch

import tiny
from metaembed_pl import progress as progress_module
from metaembed_pl.cli.main import main
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.progress import Progress, with_progress
from metaembed_pl.retrieval.sources import open_source
from metaembed_pl.retrieval.store import Store
from ranks import command_line


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.embedder().save_pretrained(folder)
    return folder


@pytest.fixture
def things(tmp_path):
    """Twelve items, of which two are pictures and two say something about themselves."""
    lines = [
        {"id": "fruit", "text": "red apple", "metadata": {"lang": "en", "price": 3}},
        {"id": "obst", "text": "roter Apfel", "metadata": {"lang": "de", "price": 2}},
        {"image": "noise 0.png"},
        {"id": "two", "text": "noise", "image": "noise 1.png"},
        *(tiny.text(i) for i in range(8)),
    ]
    for i in range(2):
        tiny.picture(i).save(tmp_path / f"noise {i}.png")
    return write_lines(tmp_path / "things.jsonl", lines)


def write_lines(file, lines):
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def embed(model, items, store, *arguments):
    command = ["embed", "--model", model, "--items", items, "--store", store, "--device", "cpu"]
    return main([str(part) for part in (*command, *arguments)])


def search(model, store, *arguments):
    command = ["search", "--model", model, "--store", store, "--device", "cpu", "--json"]
    return main([str(part) for part in (*command, *arguments)])


def test_json_lines_keep_their_metadata_and_are_found(model, things, tmp_path, capsys):
    store = tmp_path / "s"
    assert embed(model, things, store, "--batch-size", 5, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["items"], told["embedded"], told["skipped"]) == (12, 12, 0)
    assert told["dtype"] == "bf16"
    assert 0.9 < told["kept"] <= 1
    opened = Store.open(store)
    assert opened.metadata(opened.rows_of(["fruit", "two"])) == [
        {"text": "red apple", "lang": "en", "price": 3},
        {"text": "noise", "image": str(tmp_path / "noise 1.png")},
    ]

    assert search(model, store, "--query", "apple", "--budget", "4x1", "--where", "lang=de") == 0
    found = json.loads(capsys.readouterr().out)
    assert [result["id"] for result in found["results"]] == ["obst"]
    assert found["results"][0]["metadata"] == {"text": "roter Apfel", "lang": "de", "price": 2}
    assert found["plan"] == "4x1:10"
    # Where bf16 is faster, what it chose is read again.
    assert found["bytes_read"] in (1 * 32 * 2, 2 * 32 * 2)

    given = ["search", "--model", model, "--store", store, "--query", "apple", "--where", "lang=xx"]
    assert main([*map(str, given), "--device", "cpu"]) == 0
    assert "no item matches --where lang=xx\n" in capsys.readouterr().err

    assert search(model, store, "--query", "apple", "--cascade", "4x1:9,4x8:3") == 0
    found = json.loads(capsys.readouterr().out)
    query = MetaEmbedder.from_pretrained(model).encode_query(["apple"])
    hits = opened.search(query, cascade="4x1:9,4x8:3")
    assert [result["id"] for result in found["results"]] == hits.ids[0]
    assert [result["score"] for result in found["results"]] == pytest.approx(hits.scores[0])


def test_a_store_of_less_width_is_made_told_and_searched(model, things, tmp_path, capsys):
    assert embed(model, things, tmp_path / "s", "--width", 8, "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["width"], told["model_width"], told["items"]) == (8, 32, 12)
    with things.open("a") as file:
        file.write('"a new thing"\n"and another"\n')
    assert embed(model, things, tmp_path / "s", "--width", 8) == 0
    assert "2 of them new; width 8 in bf16 keeps" in (capsys.readouterr().out)
    assert search(model, tmp_path / "s", "--query", "apple", "--budget", "4x1") == 0
    found = json.loads(capsys.readouterr().out)
    hits = Store.open(tmp_path / "s").search(
        MetaEmbedder.from_pretrained(model).encode_query(["apple"]), "4x1"
    )
    assert [result["id"] for result in found["results"]] == hits.ids[0]
    for width, message in ((9, "of width 8, not 9"), (0, "--width must be at least 1, got 0")):
        assert embed(model, things, tmp_path / "s", "--width", width) == 2
        assert message in capsys.readouterr().err


def test_the_same_command_adds_what_is_new(model, things, tmp_path, capsys):
    assert embed(model, things, tmp_path / "s") == 0
    assert "12 items in" in capsys.readouterr().out
    with things.open("a") as file:
        file.write('"a new thing"\n')
    assert embed(model, things, tmp_path / "s") == 0
    assert "13 items in" in (out := capsys.readouterr().out)
    assert "1 of them new" in out


def test_killed_it_goes_on_at_the_next_item(model, tmp_path, capsys):
    things = write_lines(tmp_path / "many.jsonl", [{"id": f"{i}", "text": "x"} for i in range(400)])
    command = [sys.executable, "-m", "metaembed_pl", "embed", "--model", model, "--items", things]
    command += ["--store", tmp_path / "s", "--device", "cpu", "--batch-size", "1"]
    running = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while not (tmp_path / "s").exists() or len(Store.open(tmp_path / "s")) < 5:
        assert time.monotonic() < deadline
        assert running.poll() is None, "it ended before it was killed"
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = len(Store.open(tmp_path / "s"))
    assert 5 <= done < 400
    assert embed(model, things, tmp_path / "s", "--json") == 0
    assert json.loads(capsys.readouterr().out)["embedded"] == 400 - done
    assert Store.open(tmp_path / "s").ids == [f"{i}" for i in range(400)]


def test_two_processes_write_what_one_would(model, things, tmp_path):
    flags = ["--model", model, "--items", things, "--store", tmp_path / "two", "--device", "cpu"]
    flags += ["--batch-size", "2", "--width", "8", "--json"]
    ranks = command_line(2, tmp_path / "said", "embed", *map(str, flags))
    (first, said), (second, nothing) = ranks.end()
    assert (first, second) == (0, 0), said + nothing
    assert json.loads(said.splitlines()[-1])["embedded"] == 12
    assert "embedded" not in nothing
    assert embed(model, things, tmp_path / "one", "--batch-size", 2, "--width", 8) == 0
    one, two = Store.open(tmp_path / "one"), Store.open(tmp_path / "two")
    assert torch.equal(two.projection.rows, one.projection.rows)
    assert two.ids == one.ids
    assert two.metadata() == one.metadata()
    assert two.previews(range(12)) == one.previews(range(12))
    assert torch.equal(two.vectors(), one.vectors())


def test_shards_are_embedded_by_their_positives_each_once(model, tmp_path, capsys):
    folder = tiny.shards(tmp_path / "shards", 5)
    assert embed(model, folder, tmp_path / "s") == 0
    store = Store.open(tmp_path / "s")
    assert store.ids == [f"picture-{i}" for i in range(5)]
    assert store.metadata([3]) == [{"asked_as": tiny.text(3)}]
    expected = tiny.embedder().encode_candidate([Item(image=tiny.picture(3))])
    assert torch.allclose(store.vectors([3]), expected, atol=2**-8)


def make_pdf(file, num_pages):
    document = pypdfium2.PdfDocument.new()
    for page in range(num_pages):
        document.new_page(100 + 20 * page, 50)
    document.save(file)
    return file


def test_a_folder_is_embedded_by_its_pictures_and_the_pages_of_its_pdfs(model, tmp_path, capsys):
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    tiny.picture(0).save(folder / "a.png")
    make_pdf(folder / "deeper" / "b.pdf", 3)
    (folder / "c.pdf").write_bytes(b"no PDF")
    (folder / "notes.txt").write_text("not looked at")
    assert embed(model, folder, tmp_path / "s") == 2
    err = capsys.readouterr().err
    assert "item 'c.pdf#page=1': page 1 of" in err
    assert err.endswith("; skip it with --skip-bad (skip_bad=True)\n")
    assert embed(model, folder, tmp_path / "s", "--skip-bad") == 0
    out, err = capsys.readouterr()
    assert "4 items in" in out
    assert "1 skipped" in out
    assert "skipped c.pdf#page=1: page 1 of" in err
    store = Store.open(tmp_path / "s")
    assert store.ids == ["a.png", *(f"deeper/b.pdf#page={page}" for page in (1, 2, 3))]
    about = {"file": str(folder / "deeper" / "b.pdf"), "page": 2}
    assert about.items() <= store.metadata([2])[0].items()
    assert all(preview.startswith(b"\xff\xd8") for preview in store.previews(range(4)))


def test_a_pdf_may_be_given_by_itself_and_previews_left_out(model, tmp_path):
    file = make_pdf(tmp_path / "b.pdf", 2)
    assert embed(model, file, tmp_path / "s", "--no-previews", "--store-dtype", "int8") == 0
    store = Store.open(tmp_path / "s")
    assert store.ids == ["b.pdf#page=1", "b.pdf#page=2"]
    assert store.previews([0, 1]) == [None, None]
    assert store.dtype == "int8"


@pytest.fixture
def many(tmp_path):
    lines = [{"id": f"{i}", "text": tiny.text(i)} for i in range(100)]
    return write_lines(tmp_path / "many.jsonl", lines)


def test_without_a_budget_the_recall_that_was_asked_for_is_reached(
    model, many, tmp_path, capsys, monkeypatch
):
    assert embed(model, many, tmp_path / "s") == 0
    capsys.readouterr()
    asked = ["--query", "red apple"]
    assert search(model, tmp_path / "s", *asked) == 0
    out, err = capsys.readouterr()
    assert "measuring" not in err
    assert json.loads(out)["note"] == "exact: the store is small"
    monkeypatch.setattr("metaembed_pl.retrieval.calibration.SMALL", 0)
    assert search(model, tmp_path / "s", *asked, "--target-recall", "1") == 0
    out, err = capsys.readouterr()
    assert "measuring search plans on this store" in err
    exact = json.loads(out)
    assert search(model, tmp_path / "s", *asked, "--budget", "auto", "--target-recall", ".01") == 0
    out, err = capsys.readouterr()
    assert "measuring" not in err, "it was measured once, and kept"
    cheap = json.loads(out)
    assert cheap["bytes_read"] < exact["bytes_read"]
    assert cheap["plan"] == "1x1:10"
    words = "measured with 32 texts of its items, alone and joined by two and by three, on 100"
    assert words in cheap["note"]
    assert search(model, tmp_path / "s", *asked, "--exact") == 0
    assert json.loads(capsys.readouterr().out)["plan"] == "4x8:10"


def test_an_index_is_made_kept_up_and_searched(model, many, tmp_path, capsys, monkeypatch):
    pytest.importorskip("faiss")
    monkeypatch.setattr("metaembed_pl.retrieval.calibration.SMALL", 0)
    monkeypatch.setattr("metaembed_pl.retrieval.index_build.LEFT_OUT_AT_MOST", 4)
    store = tmp_path / "s"
    assert embed(model, many, store, "--index", "--json") == 0
    told = json.loads(capsys.readouterr().out)["index"]
    assert (told["items"], told["indexed_rows"], told["codes"]) == (100, 100, "sq8")
    asked = ["--query", "red apple"]
    assert search(model, store, *asked, "--cascade", "each@.3:50,4x8:10") == 0
    found = json.loads(capsys.readouterr().out)
    assert search(model, store, *asked, "--exact") == 0
    exact = json.loads(capsys.readouterr().out)
    ids = [{result["id"] for result in one["results"]} for one in (found, exact)]
    assert len(ids[0] & ids[1]) >= 8
    new = [{"id": f"new {i}", "text": tiny.text(200 + i)} for i in range(9)]
    assert embed(model, write_lines(tmp_path / "new.jsonl", new), store) == 0
    assert "index: 109 rows" in capsys.readouterr().out
    assert main(["index", "--model", str(model), "--store", str(store), "--codes", "rabitq"]) == 2
    assert "keeps sq8, not rabitq: leave --codes out" in capsys.readouterr().err
    queries = write_lines(tmp_path / "queries.jsonl", [tiny.text(i) for i in range(20)])
    flags = [
        "--model",
        model,
        "--store",
        store,
        "--again",
        "--queries",
        queries,
        "--codes",
        "rabitq",
    ]
    assert main(["index", *map(str, flags)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("109 rows in ")
    assert "measured with 20 queries of queries.jsonl" in out or "no cheaper plan reached" in out
    segment = next(store.glob("data-*/index/segment*"))
    os.truncate(segment, 5)
    assert search(model, store, *asked) == 0
    assert "the index is not used" in json.loads(capsys.readouterr().out)["note"]
    assert main(["index", "--model", str(model), "--store", str(store)]) == 0
    assert "it is rebuilt" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--store": None}, "either --store FOLDER or --items PATH"),
        ({"--items": "x.jsonl"}, "either --store FOLDER or --items PATH"),
        ({"--budget": "3x4"}, "not trained at 3 query vectors; choose one of 1, 2, 4"),
        ({"--budget": "4x64"}, "not trained at 64 candidate vectors; choose one of 1, 4, 8"),
        ({"--budget": "auto", "--target-recall": "2"}, "above 0 and at most 1, got 2.0"),
        (
            {"--budget": "4x8", "--target-recall": "0.9"},
            "leave out --budget, --cascade and --exact",
        ),
        ({"--cascade": "4x1:9,4x8:3", "--top": "5"}, "4x8:3 keeps fewer than the top 5"),
        ({"--cascade": "4x1:9,4x8"}, "or each@.7:50; got '4x8'"),
        ({"--cascade": "pool@.7:9,4x8:9"}, "has no index for pool@0.7:9: build one with `index"),
        ({"--where": "lang"}, "such as lang=de; got 'lang'"),
        ({"--store": "nowhere"}, "nowhere is not a store"),
        ({"--store": None, "--items": "x", "--where": "a=b"}, "--where needs a --store"),
    ],
)
def test_a_search_that_cannot_be_is_one_line_and_exit_2(
    model, things, tmp_path, capsys, changes, message
):
    assert embed(model, things, tmp_path / "s") == 0
    capsys.readouterr()
    flags = {"--model": model, "--store": tmp_path / "s", "--query": "cat", "--device": "cpu"}
    flags |= changes
    arguments = [str(part) for flag in flags.items() if flag[1] is not None for part in flag]
    assert main(["search", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert len([line for line in err.splitlines() if "measuring" not in line]) == 1


def test_refuses_another_models_store_and_leaves_it_as_it_was(model, things, tmp_path, capsys):
    assert embed(model, things, tmp_path / "s") == 0
    tiny.embedder(seed=1).save_pretrained(tmp_path / "other")
    before = Store.open(tmp_path / "s").generation
    assert embed(tmp_path / "other", things, tmp_path / "s", "--again") == 2
    assert "holds the vectors of another model" in capsys.readouterr().err
    assert search(tmp_path / "other", tmp_path / "s", "--query", "cat") == 2
    assert "holds the vectors of another model" in capsys.readouterr().err
    assert Store.open(tmp_path / "s").generation == before


def test_refuses_a_file_in_the_place_of_a_store_and_leaves_it(model, things, tmp_path, capsys):
    (tmp_path / "s").write_text("keep this")
    assert embed(model, things, tmp_path / "s") == 2
    assert "s is not a store" in capsys.readouterr().err
    assert (tmp_path / "s").read_text() == "keep this"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], ":2: id 'a' was used before"),
        (["x", {"text": "y", "metadata": 3}], ":2': an item's metadata must be an object, not int"),
        (["x", {"text": "y", "colour": "red"}], ":2': an item has unknown key 'colour'"),
        ([{"text": "y", "colour": "red"}], "metadata for your own: {'metadata': {'colour': ...}}"),
        ([{"image": "gone.png"}], "gone.png"),
        ([], "contains no items"),
    ],
)
def test_items_that_are_not_valid_are_one_line_and_exit_2(model, tmp_path, capsys, lines, message):
    items = write_lines(tmp_path / "items.jsonl", lines)
    assert embed(model, items, tmp_path / "s") == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


def test_a_pipe_gets_lines_with_rate_and_time_left(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.0)
    with Progress("candidates", 40) as progress:
        for seen in (10, 20):
            time.sleep(0.02)
            progress.update(seen)
        for seen in (30, 60):
            time.sleep(0.02)
            progress.begin("ranking", 120, "queries")
            progress.update(seen)
    lines = capsys.readouterr().err.splitlines()
    form = re.compile(r"(\w+): (\d+) of (\d+) (\w+), [\d.]+ (\w+)/s, 00:0\d left")
    told = [form.fullmatch(line) for line in lines]
    counts = [line.groups() for line in told if line]
    assert counts[-1] == ("ranking", "60", "120", "queries", "queries")
    assert ("candidates", "20", "40", "items", "items") in counts
    assert not any("\r" in line for line in lines)


def test_a_short_job_says_nothing_in_a_pipe(capsys):
    with Progress("embedding", 3) as progress:
        progress.update(3)
    assert capsys.readouterr().err == ""


def test_the_first_of_several_processes_tells(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "LINE_EVERY_S", 0.0)
    for rank, tells in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert list(with_progress(range(3), "mining", 3, lambda step: step + 1)) == [0, 1, 2]
        assert bool(capsys.readouterr().err) == tells


def test_a_terminal_gets_a_bar_with_rate_and_time_left():
    ours, theirs = pty.openpty()
    program = """
import sys, time
from metaembed_pl.progress import Progress
with Progress("embedding", 30) as progress:
    for i in range(1, 31):
        time.sleep(0.01)
        progress.update(i)
"""
    environment = {**os.environ, "COLUMNS": "120", "TERM": "xterm"}
    subprocess.run([sys.executable, "-c", program], stderr=theirs, env=environment, check=True)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    assert "embedding" in shown
    assert "30/30" in shown
    assert "/s" in shown


def test_help_is_light():
    program = "import sys; from metaembed_pl.cli.main import main\n"
    program += "try: main(['embed', '--help'])\nexcept SystemExit: pass\n"
    program += "print({'torch', 'pyarrow', 'PIL', 'rich', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "--skip-bad" in done.stdout
    assert done.stdout.splitlines()[-1] == "set()"


def test_a_folder_of_folders_of_shards_is_told_to_choose_one(tmp_path):
    tiny.shards(tmp_path / "data" / "pets", 2)
    with pytest.raises(UserError, match=r"no pictures and no PDFs; .* such as .*/data/pets"):
        open_source(tmp_path / "data")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--engine vllm takes a folder that this version's `export --format vllm` made"),
        (("--index",), "--index is not for --engine vllm"),
        (("--device", "cpu"), "--device is not for --engine vllm"),
        (("--vllm-args", "[1]"), "--vllm-args takes a JSON object, got '[1]'"),
        (("--engine", "here", "--vllm-args", "{}"), "--vllm-args is for --engine vllm"),
        (("--parts", "8"), "--parts is for --engine ray; --part I/N embeds one part"),
        (("--attention", "eager"), "--attention is not for --engine vllm"),
        (("--chunk-tokens", "64"), "--chunk-tokens is not for --engine vllm"),
        (("--dtype", "fp32", "--vllm-args", '{"dtype": "half"}'), "--dtype is given twice"),
    ],
)
def test_vllm_refuses_what_is_not_for_it_in_one_line(flags, message, tmp_path, capsys):
    (tmp_path / "t.jsonl").write_text('{"text": "a"}')
    where = ["--items", str(tmp_path / "t.jsonl"), "--store", str(tmp_path / "s")]
    assert main(["embed", "--model", str(tmp_path), *where, "--engine", "vllm", *flags]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "s").exists()
