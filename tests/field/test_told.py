"""What was cut, what cannot be kept, what a proxy sees: told, and nothing lost."""

import errno
import json
import os
import stat

import pytest
from starlette.testclient import TestClient

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.data.batches import TrainingBatches
from metaembed_pl.data.collate import Cut
from metaembed_pl.files import new_file, new_folder
from metaembed_pl.model.identity import identity_of
from metaembed_pl.retrieval.calibration import Calibration
from metaembed_pl.retrieval.store import Store
from metaembed_pl.serving.app import make_app
from metaembed_pl.serving.service import Service

LONG = " ".join(["apple"] * 60)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.embedder(max_text_tokens=32).save_pretrained(folder)
    return folder


@pytest.fixture
def shelf(model, tmp_path):
    items = tmp_path / "items.jsonl"
    lines = [{"id": f"{i}", "text": f"{LONG} {tiny.text(i)}"} for i in range(3)] + ["red apple"]
    items.write_text("\n".join(map(json.dumps, lines)))
    assert run("embed", "--model", model, "--items", items, "--store", tmp_path / "shelf") == 0
    return tmp_path / "shelf"


def run(*command):
    return main([*map(str, command), "--device", "cpu"])


def embed_again(model, shelf):
    items = shelf.parent / "items.jsonl"
    return run("embed", "--model", model, "--items", items, "--store", shelf, "--again")


def test_texts_that_were_cut_are_counted(model, shelf, tmp_path, capsys):
    assert embed_again(model, shelf) == 0
    said = capsys.readouterr().err
    assert "3 of 4 texts are longer than 32 tokens and were cut there" in said
    assert run("search", "--model", model, "--store", shelf, "--query", LONG) == 0
    assert "1 of 1 texts are longer than 32 tokens" in capsys.readouterr().err
    assert run("search", "--model", model, "--items", tmp_path / "items.jsonl", "--query", "a") == 0
    assert "3 of 5 texts are longer than 32 tokens" in capsys.readouterr().err


def test_data_show_counts_what_a_model_would_cut(model, tmp_path, capsys):
    from metaembed_pl.data.shards import ShardWriter
    from metaembed_pl.item import Item, Pair

    with ShardWriter(tmp_path / "s", "s") as writer:
        writer.write(Pair("1", Item(LONG), Item("fruit")))
        writer.write(Pair("2", Item("apple"), Item(LONG)))
    assert main(["data", "show", str(tmp_path / "s"), "--model", str(model)]) == 0
    assert "2 of 4 texts are longer than 32 tokens" in capsys.readouterr().out


def test_how_much_was_cut_is_counted_in_tokens():
    cut = Cut()
    cut.note([10, 40, 50], limit=30)
    assert (cut.num_texts, cut.num_cut, cut.num_tokens, cut.num_lost) == (3, 2, 100, 30)
    cut += cut
    assert repr(cut).startswith("4 of 6 texts are longer than 30 tokens")
    assert "30.0 % of all tokens" in repr(cut)
    assert TrainingBatches  # counts by batch, so that workers' counts are not lost


def test_what_was_measured_of_a_read_only_store_is_used_and_not_kept(
    model, shelf, capsys, monkeypatch
):
    def refused(self, store):
        raise OSError(errno.EROFS, "Read-only file system", "calibration.json")

    monkeypatch.setattr(Calibration, "save", refused)
    from metaembed_pl.cli.index import measured
    from metaembed_pl.model.embedder import MetaEmbedder

    assert measured(Store.open(shelf), MetaEmbedder.from_pretrained(model), 8).measured
    assert "the measurement could not be saved: Read-only file system" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "choose a writable place"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line(model, shelf, capsys, monkeypatch, number, hint):
    def refused(self, *_):
        try:
            raise OSError(number, os.strerror(number), "shelf/rows.arrows")
        except OSError as error:
            raise RuntimeError("a library's own words") from error

    monkeypatch.setattr(Store, "add", refused)
    capsys.readouterr()
    command = ["embed", "--model", model, "--items", shelf.parent / "items.jsonl"]
    assert run(*command, "--store", shelf, "--again") == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said.startswith(f"metaembed-pl: shelf/rows.arrows: {os.strerror(number)}: {hint}")
    assert len(Store.open(shelf)) == 4


@pytest.mark.parametrize(
    ("umask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)]
)
def test_what_is_written_has_the_rights_that_the_umask_gives(tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        tiny.embedder().save_pretrained(tmp_path / "model")
        with new_folder(tmp_path / "a") as made:
            (made / "b").touch(0o600)
        with new_file(tmp_path / "c") as made:
            made.touch(0o600)
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert any(path.suffix == ".safetensors" for path in found)
    assert {mode for path, mode in found.items() if path.is_file()} == {file}
    assert {mode for path, mode in found.items() if path.is_dir()} == {folder}


@pytest.fixture
def client(shelf, model):
    from metaembed_pl.model.embedder import MetaEmbedder

    service = Service(MetaEmbedder.from_pretrained(model), shelf)
    hosts = {"127.0.0.1", "localhost", "::1", "search.example.org"}
    with TestClient(make_app(service, hosts), base_url="http://127.0.0.1:8124") as client:
        yield client


def test_the_page_asks_for_nothing_outside_its_folder(client):
    import re

    page, script = client.get("/").text, client.get("/page.js").text
    for address in re.findall(r'(?:src|href)="([^"]+)"', page) + re.findall(
        r'"(/?api/[^"]*)', script
    ):
        assert not address.startswith("/"), address
    assert 'src="page.js"' in page


def test_a_named_site_may_ask_though_the_proxy_rewrites_host(client):
    ask = {"url": "/api/queries", "data": {"text": "abc"}}
    assert client.post(**ask, headers={"Origin": "https://search.example.org"}).status_code == 200
    assert client.post(**ask, headers={"Origin": "https://evil.example.org"}).status_code == 403
    assert client.post(**ask, headers={"Origin": "http://localhost:3000"}).status_code == 403


def test_a_proxy_that_leaves_its_path_in_says_so(client):
    headers = {"X-Forwarded-Prefix": "/search"}
    for path in ("/search/", "/search/page.css", "/search/api/store", "/api/store"):
        assert client.get(path, headers=headers).status_code == 200, path


@pytest.mark.parametrize("content", [b'{"text": "a"}', b"[1]", b"no JSON", b""])
def test_a_body_that_is_no_form_is_told_what_is(client, content):
    headers = {"Content-Type": "application/json"}
    answer = client.post("/api/queries", content=content, headers=headers)
    assert answer.status_code == 422
    assert "expected a form" in answer.json()["error"]


def test_the_store_knows_its_model(shelf, model):
    from metaembed_pl.model.embedder import MetaEmbedder

    assert Store.open(shelf).identity == identity_of(MetaEmbedder.from_pretrained(model))


def test_a_merged_model_may_search_what_its_adapter_embedded(tmp_path):
    """And the reverse; a model that was trained further may not."""
    from metaembed_pl.model.embedder import MetaEmbedder
    from metaembed_pl.model.export import merge
    from metaembed_pl.model.lora import LoraConfig, set_trainable

    model = tiny.embedder()
    set_trainable(model.backbone, model.processing.family, LoraConfig(r=2, alpha=2), False)
    for name, parameter in model.backbone.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02)
    adapter = identity_of(model.eval())
    merge(model)
    assert identity_of(model) == adapter
    model.save_pretrained(tmp_path / "merged")
    merged = MetaEmbedder.from_pretrained(tmp_path / "merged")
    assert identity_of(merged) == adapter
    merged.meta_tokens.embedding.weight.data.add_(0.1)
    assert identity_of(merged) != adapter


def test_the_scratch_tokenizer_reads_composed_and_decomposed_letters_alike():
    import unicodedata

    process = tiny.processing()
    texts = ("Käse", unicodedata.normalize("NFD", "Käse"))
    one, other = (process.tokenizer(text)["input_ids"] for text in texts)
    assert one == other
