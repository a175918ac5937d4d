"""A store as a table that others read, and back."""

import json

import pyarrow as pa
import pytest
import torch
from pyarrow import parquet

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.retrieval.exchange import ABOUT, export_store, import_store
from metaembed_pl.retrieval.store import Store
from unchecked import shapes_unchecked


@pytest.fixture(scope="module")
def model():
    return tiny.embedder()


@pytest.fixture(scope="module")
def items():
    pictures = [Item(image=tiny.picture(i), id=f"picture {i}") for i in range(2)]
    return [Item(tiny.text(i), id=f"text {i}") for i in range(20)] + pictures


@pytest.fixture(params=["fp32", "bf16", "int8", "projected"])
def store(request, model, items, tmp_path):
    width = 8 if request.param == "projected" else None
    dtype = "bf16" if width else request.param
    store = Store.build(tmp_path / "s", model, items, dtype=dtype, width=width)
    store.delete(["text 3"])
    return store


def test_a_table_holds_what_the_store_does_and_comes_back_as_the_same_store(
    store, model, tmp_path, capsys
):
    file = tmp_path / "out" / "s.parquet"
    assert main(["store", "export", str(store.folder), "--to", str(file), "--previews"]) == 0
    assert capsys.readouterr().out == f"21 items in {file}\n"
    table = parquet.read_table(file)
    width = store.width
    assert table.schema.field("vectors").type == pa.list_(pa.list_(pa.float32(), width), 8)
    assert table.schema.field("first").type == pa.list_(pa.float32(), width)
    assert table["id"].to_pylist() == store.ids
    assert torch.equal(torch.tensor(table["vectors"].to_pylist()), store.vectors())
    assert torch.equal(torch.tensor(table["first"].to_pylist()), store.vectors()[:, 0])
    assert list(map(json.loads, table["metadata"].to_pylist())) == store.metadata()

    assert main(["store", "import", str(file), "--out", str(tmp_path / "back")]) == 0
    back = Store.open(tmp_path / "back")
    assert back.ids == store.ids
    assert (back.dtype, back.identity, back.groups) == (store.dtype, store.identity, store.groups)
    assert torch.equal(back.vectors(), store.vectors())
    assert back.metadata() == store.metadata()
    assert back.previews(range(21)) == store.previews(range(21))
    query = model.encode_query(["red apple"])
    assert back.search(query, "2x4").ids == store.search(query, "2x4").ids
    assert back.search(query, "2x4").scores == store.search(query, "2x4").scores
    assert len(Store.build(back.folder, model, [Item("new", id="new")])) == 22


def test_fewer_vectors_may_be_asked_for_and_serve_the_budgets_that_they_can(model, items, tmp_path):
    store = Store.build(tmp_path / "s", model, items)
    assert export_store(store, tmp_path / "s.parquet", r_c=4) == 22
    back = import_store(tmp_path / "s.parquet", tmp_path / "back")
    assert list(map(str, back.groups)) == ["1x1", "2x4"]
    assert torch.equal(back.vectors(), store.vectors(r_c=4))
    query = model.encode_query(["red apple"])
    for asked in (query, query[:, :2]):
        assert back.search(asked, "2x4").ids == store.search(query, "2x4").ids
    Store.build(back.folder, model, ["a new text"])
    Store.build(store.folder, model, ["a new text"])
    assert torch.equal(Store.open(back.folder).vectors(), Store.open(store.folder).vectors(r_c=4))
    with shapes_unchecked(), pytest.raises(UserError, match=r"must be N x 2 x .*, got 1 x 1 x"):
        back.search(query[:, :1], "1x1")
    with pytest.raises(UserError, match="not trained at 3 candidate vectors"):
        export_store(store, tmp_path / "x.parquet", r_c=3)


def with_metadata(table, text):
    column = pa.array([text] * len(table), pa.string())
    return table.set_column(table.schema.names.index("metadata"), "metadata", column)


def test_metadata_of_other_programs_may_be_null(model, items, tmp_path):
    export_store(Store.build(tmp_path / "s", model, items[:2]), tmp_path / "s.parquet")
    table = parquet.read_table(tmp_path / "s.parquet")
    parquet.write_table(with_metadata(table, None), tmp_path / "null.parquet")
    assert import_store(tmp_path / "null.parquet", tmp_path / "new").metadata() == [{}, {}]


def test_what_cannot_be_written_or_read_is_one_line(model, items, tmp_path):
    store = Store.build(tmp_path / "s", model, items[:2])
    with pytest.raises(UserError, match=r"expected a name that ends in .parquet or .lance"):
        export_store(store, tmp_path / "s.csv")
    export_store(store, tmp_path / "s.parquet")
    with pytest.raises(UserError, match="exists already"):
        export_store(store, tmp_path / "s.parquet")
    with pytest.raises(UserError, match="exists already"):
        import_store(tmp_path / "s.parquet", tmp_path / "s")
    table = parquet.read_table(tmp_path / "s.parquet")
    about = json.loads(table.schema.metadata[ABOUT])
    twice = pa.concat_tables([table, table])
    for name, changed, message in (
        ("plain", table.replace_schema_metadata(None), "was not exported from a store"),
        ("columns", table.drop_columns(["vectors"]), "was not exported from a store"),
        ("twice", twice, "id 'text 0' is empty or occurs twice"),
        (
            "width",
            table.replace_schema_metadata({ABOUT: json.dumps(about | {"width": 7})}),
            "expected 8 finite vectors of width 7",
        ),
        (
            "groups",
            table.replace_schema_metadata({ABOUT: json.dumps(about | {"groups": ["x"]})}),
            "its metadata are damaged",
        ),
        ("metadata", with_metadata(table, "{"), "its column metadata is not JSON"),
        ("list", with_metadata(table, "[1]"), "an item's metadata must be an object, not list"),
    ):
        parquet.write_table(changed, tmp_path / f"{name}.parquet")
        with pytest.raises(UserError, match=message):
            import_store(tmp_path / f"{name}.parquet", tmp_path / "new")
        assert not (tmp_path / "new").exists()
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "s.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cut.parquet is not a complete Parquet file"):
        import_store(tmp_path / "cut.parquet", tmp_path / "new")


def test_lance_is_the_same_where_it_is_installed(model, items, tmp_path):
    store = Store.build(tmp_path / "s", model, items)
    try:
        import lance
    except ImportError:
        with pytest.raises(UserError, match="needs the package pylance"):
            export_store(store, tmp_path / "s.lance")
        return
    export_store(store, tmp_path / "s.lance")
    assert lance.dataset(str(tmp_path / "s.lance")).count_rows() == 22
    back = import_store(tmp_path / "s.lance", tmp_path / "back")
    assert back.ids == store.ids
    assert torch.equal(back.vectors(), store.vectors())
