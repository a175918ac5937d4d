"""The snippets of docs/databases.md, each where its package is installed."""

import re
from pathlib import Path

import pytest
from pyarrow import parquet

import tiny
from metaembed_pl.item import Item
from metaembed_pl.retrieval.exchange import export_store
from metaembed_pl.retrieval.store import Store

PAGE = Path(__file__).parents[2] / "docs" / "databases.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the page's snippets have: a model, its store, the table of it, a query."""
    folder, model = tmp_path_factory.mktemp("databases"), tiny.embedder()
    items = [Item(tiny.text(i), id=f"item {i}") for i in range(30)]
    store = Store.build(folder / "shelf", model, items, dtype="fp32")
    export_store(store, folder / "shelf.parquet")
    table = parquet.read_table(folder / "shelf.parquet")
    query = model.encode_query(["a red apple"])[0].numpy()
    return {"model": model, "store": store, "table": table, "query": query, "folder": folder}


def snippet(heading):
    (block,) = re.findall(
        rf"^## {heading}.*?```python\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )[:1]
    return block


def result(heading, names):
    """What the last line of a snippet gives."""
    *lines, last = snippet(heading).rstrip().splitlines()
    scope = dict(names)
    exec("\n".join(lines), scope)
    return eval(last, scope)


def expected(names, top):
    asked = names["model"].encode_query(["a red apple"])
    return names["store"].search(asked, "4x8", top=top)


def test_langchain_finds_what_the_store_does(names):
    pytest.importorskip("langchain_core", exc_type=ImportError)
    found, hits = result("LangChain", names), expected(names, 5)
    assert [document.id for document in found] == hits.ids[0]
    assert [document.metadata["score"] for document in found] == hits.scores[0]
    assert [document.page_content for document in found] == [
        about["text"] for about in names["store"].metadata(hits.rows[0])
    ]


def test_llama_index_finds_what_the_store_does(names):
    pytest.importorskip("llama_index.core", exc_type=ImportError)
    found, hits = result("LlamaIndex", names), expected(names, 5)
    assert [node.node.node_id for node in found] == hits.ids[0]
    assert [node.score for node in found] == hits.scores[0]


def test_lancedb_finds_what_the_store_does(names, monkeypatch):
    pytest.importorskip("lancedb", exc_type=ImportError)
    monkeypatch.chdir(names["folder"])
    found = result("LanceDB", names)
    assert [row["id"] for row in found] == expected(names, 10).ids[0]


def test_snippets_that_are_not_run_are_marked_so():
    heads = re.findall(r"^## (.*)$", PAGE.read_text(), re.MULTILINE)
    assert len(heads) >= 9
    for head in heads[1:]:
        assert "tested" in head or "not yet verified" in head, head
