"""Items from Parquet, from elsewhere, and pictures that items name by an address."""

import http.server
import io
import json
import threading
import time
from functools import partial

import fsspec
import pyarrow as pa
import pytest
from pyarrow import parquet

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.data.fetch import Fetch
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.embedding import embed
from metaembed_pl.retrieval.sources import open_source
from metaembed_pl.retrieval.store import Store


def png(seed):
    content = io.BytesIO()
    tiny.picture(seed).save(content, "PNG")
    return content.getvalue()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; some addresses are slow, large, gone or elsewhere."""

    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/busy.png" and self.server.asked.count(self.path) == 1:
            self.send_error(503)
        elif self.path == "/file.png":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            self.end_headers()
        elif self.path == "/slow.png":
            self.send_response(200)
            self.end_headers()
            for _ in range(20):
                self.wfile.write(b"x")
                time.sleep(0.1)
        else:
            super().do_GET()

    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        """A client that did not wait for the end is no fault of the server."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    root = tmp_path_factory.mktemp("served")
    (root / "pictures").mkdir()
    for i in range(3):
        (root / "pictures" / f"{i}.png").write_bytes(png(i))
    (root / "busy.png").write_bytes(png(0))
    (root / "large.png").write_bytes(b"x" * 50_000)
    lines = [
        {"id": "apple", "image": "pictures/1.png", "metadata": {"lang": "en"}},
        "a text",
        {"image": "pictures/2.png"},
    ]
    (root / "items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_table(root / "items.parquet")
    with Server(("127.0.0.1", 0), partial(Handler, directory=str(root))) as server:
        server.asked, server.root = [], root
        server.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("METAEMBED_CACHE", str(tmp_path / "cache"))


def write_table(path, **changes):
    columns = {
        "id": ["a", "b", "c"],
        "text": ["a red apple", None, "a pear"],
        "image": [None, {"bytes": png(1), "path": "1.png"}, {"bytes": png(2), "path": None}],
        "price": [3, 4, None],
        "tags": [["x"], [], ["y"]],
    } | changes
    path.parent.mkdir(exist_ok=True)
    parquet.write_table(pa.table({n: c for n, c in columns.items() if c}), path, row_group_size=2)
    return path


def test_a_parquet_file_is_items_with_plain_columns_as_metadata(tmp_path):
    source = open_source(write_table(tmp_path / "items.parquet"))
    entries = list(source)
    assert len(source) == 3
    assert [entry.id for entry in entries] == ["a", "b", "c"]
    assert [entry.metadata for entry in entries] == [
        {"text": "a red apple", "price": 3},
        {"price": 4},
        {"text": "a pear"},
    ]
    assert [entry.is_text for entry in entries] == [True, False, False]
    assert entries[1].load().load_image().tobytes() == tiny.picture(1).tobytes()


def test_columns_of_other_names_are_named_and_files_of_a_folder_follow_each_other(tmp_path):
    for number in range(2):
        write_table(
            tmp_path / "data" / f"train-{number}.parquet",
            caption=[f"{number} {i}" for i in range(3)],
            image=None,
            text=None,
            id=None,
        )
    source = open_source(tmp_path / "data", {"text": "caption"})
    assert [entry.load().text for entry in source] == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]
    write_table(tmp_path / "named.parquet")
    named = list(open_source(tmp_path / "named.parquet", {"image": "image", "text": "text"}))
    assert [entry.id for entry in named] == ["a", "b", "c"]
    assert "id" not in named[0].metadata
    with pytest.raises(UserError, match=r"has the columns price, tags, caption: say which"):
        open_source(tmp_path / "data")
    with pytest.raises(UserError, match="has no column 'words'; it has price, tags, caption"):
        open_source(tmp_path / "data", {"text": "words"})
    with pytest.raises(UserError, match="an item has no 'query' to take from a column"):
        open_source(tmp_path / "data", {"query": "caption"})


def test_a_damaged_parquet_file_and_a_bad_row_are_named(tmp_path):
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"x.parquet is not a complete Parquet file"):
        open_source(tmp_path / "x.parquet")
    file = write_table(tmp_path / "y.parquet", text=["a", "", "c"], image=None)
    bad = list(open_source(file))[1]
    assert bad.id.endswith("y.parquet:2")
    with pytest.raises(UserError, match='an item needs a "text" or an "image"'):
        bad.load()


def test_json_lines_and_parquet_at_an_address_are_what_they_are_here(server):
    entries = list(open_source(f"{server.url}/items.jsonl"))
    assert [entry.id for entry in entries[::2]] == ["apple", f"{server.url}/pictures/2.png"]
    assert entries[0].metadata == {"image": f"{server.url}/pictures/1.png", "lang": "en"}
    assert entries[0].load().load_image().tobytes() == tiny.picture(1).tobytes()
    assert entries[1].load().text == "a text"
    here = list(open_source(server.root / "items.parquet"))
    there = list(open_source(f"{server.url}/items.parquet"))
    assert [entry.id for entry in there] == [entry.id for entry in here]
    assert there[2].load().image == here[2].load().image == png(2)


def test_what_changed_at_an_address_is_read_anew(server):
    file = server.root / "changing.jsonl"
    file.write_text('"one"\n')
    assert len(open_source(f"{server.url}/changing.jsonl")) == 1
    file.write_text('"one"\n"two"\n')
    assert [entry.load().text for entry in open_source(f"{server.url}/changing.jsonl")] == [
        "one",
        "two",
    ]


def test_a_folder_that_can_be_listed_is_its_parquet_files():
    memory = fsspec.filesystem("memory")
    table = pa.table({"text": ["a", "b"]})
    for number in range(2):
        with memory.open(f"/set/data/{number}.parquet", "wb") as file:
            parquet.write_table(table, file)
    assert len(open_source("memory://set")) == 4
    assert len(open_source("memory://set/data/*.parquet")) == 4
    with pytest.raises(UserError, match="holds no Parquet files"):
        open_source("memory://nothing")


def test_an_address_that_cannot_be_read_is_one_line(server):
    with pytest.raises(UserError, match=r"gone.jsonl cannot be read"):
        open_source(f"{server.url}/gone.jsonl")
    file = server.root / "leaves.jsonl"
    for path in ("../secret.png", "/etc/hostname", "file:///etc/hostname"):
        file.write_text(json.dumps({"image": path}) + "\n")
        (entry,) = open_source(f"{server.url}/leaves.jsonl")
        with pytest.raises(UserError, match=r"leaves.*below its folder"):
            entry.load()


def test_pictures_by_address_are_fetched_only_where_that_was_asked_for(server, tmp_path, capsys):
    model = tmp_path / "model"
    tiny.embedder().save_pretrained(model)
    items = tmp_path / "items.jsonl"
    lines = [
        {"id": "one", "image": f"{server.url}/pictures/1.png", "metadata": {"n": 1}},
        {"image": f"{server.url}/large.png"},
        {"image": f"{server.url}/busy.png", "text": "told twice"},
    ]
    items.write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["embed", "--model", str(model), "--items", str(items), "--store", f"{tmp_path}/s"]
    command += ["--device", "cpu", "--skip-bad"]
    assert main(command) == 2
    assert "is an address, which is not fetched" in (err := capsys.readouterr().err)
    assert "or use `embed --fetch-images`" in err
    assert main([*command, "--fetch-images", "--fetch-mb", "0.04"]) == 0
    assert "large.png has more than 40,000 bytes" in capsys.readouterr().err
    store = Store.open(tmp_path / "s")
    assert store.ids == ["one", f"{server.url}/busy.png"]
    assert store.metadata() == [
        {"image": f"{server.url}/pictures/1.png", "n": 1},
        {"text": "told twice", "image": f"{server.url}/busy.png"},
    ]
    assert server.asked.count("/busy.png") == 2, "a busy server is asked again"
    assert main([*command, "--fetch-images", "--fetch-seconds", "0"]) == 2
    assert "--fetch-seconds must be above 0, got 0.0" in capsys.readouterr().err
    assert main([*command, "--fetch-mb", "1"]) == 2
    assert "--fetch-mb limits --fetch-images, which is not given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/gone.png", "the server returned 404"),
        ("/slow.png", "timed out"),
        ("/large.png", "has more than 40,000 bytes"),
        ("/file.png", "redirect.* is not allowed|the server returned 302"),
    ],
)
def test_a_picture_that_is_gone_slow_large_or_no_address_is_told(server, path, message):
    fetch = Fetch(timeout_s=0.3, max_bytes=40_000, attempts=1)
    started = time.monotonic()
    with pytest.raises(UserError, match=message):
        fetch(server.url + path)
    assert time.monotonic() - started < 10
    with pytest.raises(UserError, match="only fetched from http:// and https://"):
        fetch("file:///etc/hostname")
    with pytest.raises(UserError, match="cannot be fetched"):
        fetch("http://127.0.0.1:9/x.png")


@pytest.mark.parametrize("form", ["shards", "pictures"])
def test_items_that_name_no_addresses_cannot_be_fetched(form, tmp_path):
    folder = tmp_path / form
    if form == "shards":
        tiny.shards(folder, 2)
    else:
        folder.mkdir()
        tiny.picture(0).save(folder / "a.png")
    with pytest.raises(UserError, match="has no addresses of pictures to fetch: leave out"):
        open_source(folder, fetch=Fetch())


@pytest.fixture(scope="module")
def model():
    return tiny.embedder()


def embedded(model, source, folder):
    """The store of a source, and what was skipped."""
    store = Store.open_for(model, folder)
    *_, status = embed(store, model, source, skip_bad=True)
    return store, status.skipped


def test_lines_and_rows_that_are_no_items_can_be_skipped(model, tmp_path):
    lines = ['{"text": "a"}', '{"text": ""}', '{"image": "../x.png"}', "[]", '{"text": "b"}']
    lines.append('{"text": "c", "metadata": {"said": "\\ud800"}}')
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    store, skipped = embedded(model, open_source(tmp_path / "a.jsonl"), tmp_path / "lines")
    assert [value["text"] for value in store.metadata()] == ["a", "b"]
    numbers = [reason.partition(".jsonl:")[2].partition(":")[0] for reason in skipped]
    assert numbers == ["2", "3", "4", "6"]
    table = pa.table({"text": ["a", None, "  ", "b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    store, skipped = embedded(model, open_source(tmp_path / "a.parquet"), tmp_path / "rows")
    assert [value["text"] for value in store.metadata()] == ["a", "b"]
    assert len(skipped) == 2


def test_pairs_of_shards_that_cannot_be_read_can_be_skipped(model, tmp_path):
    tiny.shards(tmp_path / "shards", 5, num_negatives=0)
    (shard,) = (tmp_path / "shards").glob("*.tar")
    content = bytearray(shard.read_bytes())
    content[content.index(b'"query"')] = 0
    shard.write_bytes(content)
    store, skipped = embedded(model, open_source(tmp_path / "shards"), tmp_path / "s")
    assert len(store) == 4
    assert len(skipped) == 1


def test_nan_in_a_table_is_no_value(model, tmp_path):
    table = pa.table({"text": ["a", "b", "c"], "price": [1.5, float("nan"), None]})
    parquet.write_table(table, tmp_path / "a.parquet")
    store, skipped = embedded(model, open_source(tmp_path / "a.parquet"), tmp_path / "s")
    assert skipped == []
    assert store.metadata() == [{"text": "a", "price": 1.5}, {"text": "b"}, {"text": "c"}]
