"""Two Qdrants that are not ours answer: Edge, which is the engine, and a server over HTTP."""

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import qdrant_edge as edge
import torch

from metaembed_pl.budget import parse_groups
from metaembed_pl.errors import Unreachable, UserError
from metaembed_pl.retrieval.cascade import parse_cascade
from metaembed_pl.retrieval.qdrant import sizing as sizing_module
from metaembed_pl.retrieval.qdrant.address import parse_address
from metaembed_pl.retrieval.qdrant.layout import Layout, point_id
from metaembed_pl.retrieval.qdrant.push import push
from metaembed_pl.retrieval.qdrant.requests import search_request
from metaembed_pl.retrieval.qdrant.sizing import sizing
from metaembed_pl.retrieval.qdrant.store import QdrantStore
from metaembed_pl.retrieval.store import Store
from metaembed_pl.retrieval.where import parse_where
from qdrant_edge_folder import EdgeCollection, collection_at, edge_vectors, open_at
from qdrant_server import Api, serving

pytestmark = [
    pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant"),
    pytest.mark.filterwarnings("ignore:Local mode performs exact"),
    pytest.mark.filterwarnings("ignore:Api key is used with an insecure connection"),
]
GROUPS = parse_groups(["1x1", "2x4", "4x8"])
WIDTH, COUNT = 16, 60
# Of scores: Edge rounds stored vectors and queries to fp16, the local mode rounds nothing.
TOLERANCE = 1e-3


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


QUERIES = unit(3, 4, WIDTH, seed=1)


def metadata_of(i):
    value = {"n": i, "parity": "even" if i % 2 == 0 else "odd", "odd": i % 2 == 1}
    value |= {"half": i / 2, "day": f"2026-11-{1 + i % 30:02d}", "a.b": i % 3}
    return value if i % 5 else {**value, "colour": None if i % 2 else "7"}


def new_store(folder, dtype="bf16", count=COUNT, identity="model"):
    store = Store.create(folder, GROUPS, WIDTH, identity, dtype)
    rows = range(count)
    store.add([f"item {i}" for i in rows], unit(count, 8, WIDTH), list(map(metadata_of, rows)))
    return store


def pushed(store, address, **settings):
    """Push; how many were sent and deleted."""
    collection = collection_at(address)
    try:
        *_, done = push(store, collection, **settings)
        if isinstance(collection, EdgeCollection):
            collection.finish()
    finally:
        collection.close()
    return done.sent, done.deleted


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """60 items, of which 10 were deleted and one replaced."""
    store = new_store(tmp_path_factory.mktemp("stores") / "s")
    store.delete([f"item {i}" for i in range(15, 25)])
    store.add(["item 3"], unit(1, 8, WIDTH, seed=99), [metadata_of(3)])
    return store


@pytest.fixture(scope="module", params=["edge", "server"])
def collection(request, store, tmp_path_factory):
    """The same store in a folder and on a server."""
    with serving(Api()) as server:
        folder = tmp_path_factory.mktemp("edge") / "things"
        address = folder if request.param == "edge" else f"{server}/things"
        assert pushed(store, address, batch_size=7, filters=["n", "parity"]) == (50, 0)
        with open_at(address) as opened:
            yield opened


def assert_same(hits, expected, tolerance=TOLERANCE):
    """The same items in the same order, but for those whose scores are within the tolerance."""
    for ids, scores, known_ids, known in zip(
        hits.ids, hits.scores, expected.ids, expected.scores, strict=True
    ):
        assert sorted(ids) == sorted(known_ids)
        score_of = dict(zip(known_ids, known, strict=True))
        assert scores == pytest.approx([score_of[id] for id in ids], abs=tolerance)
        assert scores == sorted(scores, reverse=True)
        assert [score_of[id] for id in ids] == pytest.approx(known, abs=2 * tolerance)


@pytest.mark.parametrize("r_q", [1, 2, 4])
@pytest.mark.parametrize("r_c", [1, 4, 8])
def test_finds_what_the_store_finds_at_any_two_counts(store, collection, r_q, r_c):
    budget = f"{r_q}x{r_c}"
    hits = collection.search(QUERIES, budget, top=COUNT)
    assert_same(hits, store.search(QUERIES, budget, top=COUNT))
    rows = store.rows_of(hits.ids[0])
    assert hits.metadata[0] == store.metadata(rows)
    assert hits.milliseconds > 0


@pytest.mark.parametrize(
    "cascade",
    ["4x1:20,2x4:6,4x8:3", "1x1:9,4x8:9", "1x4:12,2x4:7", "poolx8:20,4x8:5", "poolx4:9,4x8:3"],
)
def test_a_cascade_keeps_what_the_stores_keeps(store, collection, cascade):
    hits = collection.search(QUERIES, cascade=cascade)
    assert_same(hits, store.search(QUERIES, cascade=cascade))
    assert hits.stages == store.search(QUERIES, cascade=cascade).stages
    top = collection.search(QUERIES, cascade=cascade, top=2)
    assert top.ids == [ids[:2] for ids in hits.ids]


def test_normalised_scores_are_divided_by_r_q(store, collection):
    hits = collection.search(QUERIES, "4x8", top=3, normalised=True)
    assert_same(hits, store.search(QUERIES, "4x8", top=3, normalised=True))


@pytest.mark.parametrize(
    "where",
    [
        "parity=odd",
        "parity!=odd",
        "n=30",
        "n=30.0",
        "n!=30",
        "n>=40",
        ["n < 50", "n > 30", "parity = even"],
        "half<=3.5",
        "half=3.5",
        "a.b=2",
        "day>=2026-11-20",
        "day<2026-11-02",
        "day=2026-11-09",
        "colour=7",
        "colour!=7",
        "colour!=red",
        "size=1",
        "size!=1",
    ],
)
def test_filters_let_through_what_the_stores_let_through(store, collection, where):
    expected = store.search(QUERIES, top=COUNT, where=where)
    assert_same(collection.search(QUERIES, top=COUNT, where=where), expected)
    if len(expected.ids[0]) > 5:
        cascade = "4x1:5,4x8:5"
        cascaded = collection.search(QUERIES, cascade=cascade, where=where)
        assert_same(cascaded, store.search(QUERIES, cascade=cascade, where=where))


def test_truths_are_filtered_by_a_server_and_refused_by_edge(store, collection):
    if collection.folder.startswith("http"):
        hits = collection.search(QUERIES, top=COUNT, where="odd=true")
        assert_same(hits, store.search(QUERIES, top=COUNT, where="odd=true"))
    else:
        with pytest.raises(UserError, match=r"metadata.odd: Qdrant Edge cannot filter by true"):
            collection.search(QUERIES, where="odd=true")


def test_a_push_sends_what_is_new_or_changed_and_deletes_what_is_gone(tmp_path):
    store = new_store(tmp_path / "s")
    with serving(Api()) as server:
        for address in (tmp_path / "edge", f"{server}/things"):
            assert pushed(store, address) == (COUNT, 0)
            assert pushed(store, address) == (0, 0)
        store.delete(["item 1", "item 2"])
        store.add(["new"], unit(1, 8, WIDTH, seed=7), [{"n": 100}])
        other_metadata = [{"n": 4, "parity": "neither"}]
        store.add(["item 4"], store.vectors(store.rows_of(["item 4"])), other_metadata)
        store.add(["item 5"], unit(1, 8, WIDTH, seed=8), [metadata_of(5)])
        store.compact()
        for address in (tmp_path / "edge", f"{server}/things"):
            assert pushed(store, address) == (3, 2)
            with open_at(address) as opened:
                assert len(opened) == COUNT - 1
                hits = opened.search(QUERIES, top=COUNT)
                assert_same(hits, store.search(QUERIES, top=COUNT))
                assert opened.search(QUERIES, where="parity=neither").ids == [["item 4"]] * 3


def test_a_change_of_the_last_vector_alone_is_sent(tmp_path):
    store = new_store(tmp_path / "s")
    pushed(store, tmp_path / "edge")
    (row,) = store.rows_of(["item 9"])
    changed = store.vectors([row])
    changed[0, -1] = changed[0, -1].roll(1)
    store.add(["item 9"], changed, store.metadata([row]))
    assert pushed(store, tmp_path / "edge") == (1, 0)


def test_killed_pushes_are_finished_by_the_next(tmp_path):
    store = new_store(tmp_path / "s")
    command = [sys.executable, Path(__file__).parents[1] / "push_killed.py", tmp_path / "s"]
    done = subprocess.run([*command, tmp_path / "edge"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    told = sum(int(count) for count in done.stdout.split())
    left, deleted = pushed(store, tmp_path / "edge")
    # Of each that was killed, one more item may have been written than was told.
    assert told <= COUNT - left <= told + 5
    assert (left > 0, deleted) == (True, 0)
    with open_at(tmp_path / "edge") as opened:
        assert len(opened) == COUNT
        assert_same(opened.search(QUERIES, top=COUNT), store.search(QUERIES, top=COUNT))


@pytest.mark.parametrize(
    ("settings", "tolerance"),
    [({"dtype": "fp32"}, 1e-5), ({"dtype": "turbo8"}, 0.05), ({"counts": [8, 1]}, TOLERANCE)],
)
def test_vectors_are_as_fine_as_they_were_asked_for(store, tmp_path, settings, tolerance):
    pushed(store, tmp_path / "edge", **settings)
    with open_at(tmp_path / "edge") as opened:
        expected = store.search(QUERIES, top=COUNT)
        assert_same(opened.search(QUERIES, top=COUNT), expected, tolerance)
        assert_same(
            opened.search(QUERIES, "4x1", top=COUNT),
            store.search(QUERIES, "4x1", top=COUNT),
            tolerance,
        )


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_a_store_of_any_dtype_is_pushed(tmp_path, dtype):
    store = new_store(tmp_path / "s", dtype)
    pushed(store, tmp_path / "edge")
    with open_at(tmp_path / "edge") as opened:
        assert opened.layout.dtype == ("fp32" if dtype == "fp32" else "fp16")
        assert_same(opened.search(QUERIES, top=COUNT), store.search(QUERIES, top=COUNT))


def make_index(folder):
    """Makes Edge build its index, which it does from 10 MB on; how many vectors it is of."""
    config = edge.EdgeConfig(
        vectors=edge_vectors(EdgeCollection(folder).layout()),
        optimizers=edge.EdgeOptimizersConfig(indexing_threshold=1),
    )
    shard = edge.EdgeShard.load(str(folder / "shard"), config)
    shard.optimize()
    count = shard.info().indexed_vectors_count
    shard.close()
    return count


@pytest.mark.parametrize(("quantization", "recall"), [(None, 1), ("int8", 0.97), ("binary", 0.2)])
def test_exact_finds_all_and_a_coarser_copy_as_much_as_it_can(tmp_path, quantization, recall):
    store = new_store(tmp_path / "s", count=3000)
    pushed(store, tmp_path / "edge", quantization=quantization)
    assert make_index(tmp_path / "edge") >= 3000
    files = [file.name for file in (tmp_path / "edge").rglob("quantized*")]
    assert bool(files) == bool(quantization)
    noisy = store.vectors(range(0, 300, 30))[:, :4] + unit(10, 4, WIDTH, seed=2)
    queries = torch.nn.functional.normalize(noisy, dim=-1)
    for plan in ({"budget": "4x1", "top": 10}, {"cascade": "4x1:100,4x8:10"}):
        expected = store.search(queries, **plan)
        with open_at(tmp_path / "edge", exact=True) as opened:
            assert_same(opened.search(queries, **plan), expected)
        with open_at(tmp_path / "edge") as opened:
            found = opened.search(queries, **plan).ids
        shared = [len(set(a) & set(b)) for a, b in zip(found, expected.ids, strict=True)]
        assert sum(shared) / 100 >= recall


def test_a_stage_that_asks_an_index_is_for_stores_in_folders(collection):
    with pytest.raises(UserError, match=r"each@0.7:50 uses the index of a store in a folder"):
        collection.search(QUERIES, cascade="each@.7:50,4x8:10")


def test_a_cascade_is_one_request_of_nested_prefetches(store):
    layout = Layout.of(store, quantization="int8")
    stages = parse_cascade("4x1:20,2x4:6,4x8:3", GROUPS)
    query = QUERIES[0]
    conditions = parse_where(["parity=odd", "n<50"])
    request = search_request(layout, query, stages, conditions)
    assert request.model_dump(mode="json", exclude_none=True) == {
        "prefetch": {
            "prefetch": {
                "query": query.sum(dim=0).tolist(),
                "using": "first_1",
                "limit": 20,
                "params": {
                    "exact": False,
                    "indexed_only": False,
                    "quantization": {"ignore": False, "rescore": True, "oversampling": 2.0},
                },
                "filter": {
                    "must": [
                        {"should": [{"key": "metadata.parity", "match": {"value": "odd"}}]},
                        {"key": "metadata.n", "range": {"lt": 50.0}},
                    ]
                },
            },
            "query": query[:2].tolist(),
            "using": "first_4",
            "limit": 6,
        },
        "query": query.tolist(),
        "using": "first_8",
        "limit": 3,
        "with_payload": ["id", "metadata"],
    }


def test_only_the_smallest_count_has_an_index_and_stays_in_memory(store):
    def told(**settings):
        vectors = Layout.of(store, **settings).vectors()
        return {
            name: params.model_dump(mode="json", exclude_none=True)
            for name, params in vectors.items()
        }

    common = {"size": WIDTH, "distance": "Dot", "datatype": "float16"}
    cold = common | {"memory": "cold"}
    many = cold | {"hnsw_config": {"m": 0}, "multivector_config": {"comparator": "max_sim"}}
    first = common | {"memory": "cached", "hnsw_config": {"memory": "cached"}}
    assert told() == {"first_1": first, "first_4": many, "first_8": many}
    int8 = {"scalar": {"type": "int8", "memory": "pinned"}}
    assert told(quantization="int8", counts=[1])["first_1"] == (
        first | {"memory": "cold", "quantization_config": int8}
    )
    on_disk = cold | {"hnsw_config": {"memory": "cold"}}
    assert told(on_disk=True)["first_1"] == on_disk


def test_a_server_is_asked_for_shards_and_replicas_and_given_the_key(store, monkeypatch):
    api = Api(key="secret")
    with serving(api) as server:
        with pytest.raises(
            UserError, match=r"/things: the server says 401: .*; set QDRANT_API_KEY"
        ):
            pushed(store, f"{server}/things")
        monkeypatch.setenv("QDRANT_API_KEY", "secret")
        assert pushed(store, f"{server}/things", shards=6, replicas=2, filters=["half"]) == (50, 0)
        assert pushed(store, f"{server}/things", shards=6, replicas=2) == (0, 0), "once more"
        assert pushed(store, f"{server}/things", replicas=2) == (0, 0)
        for changed, was in (({"shards": 4}, "6 shards, not 4"), ({"replicas": 3}, "2 replicas")):
            with pytest.raises(UserError, match=f"/things was made with {was}.*: leave --"):
                pushed(store, f"{server}/things", **changed)
    created = next(body for method, path, body in api.requests if body and "vectors" in body)
    assert (created["shard_number"], created["replication_factor"]) == (6, 2)
    assert created["metadata"]["metaembed_pl"]["identity"] == "model"
    indexed = next(body for method, path, body in api.requests if "/index" in path)
    assert indexed == {"field_name": "metadata.half", "field_schema": "float"}


def test_an_item_keeps_its_point_wherever_it_is_pushed_from(store):
    # Changing this would send every item again, beside the old ones.
    assert point_id("item 1") == "6b6846a6-7595-5b33-8550-1151ef490150"


def test_refuses_what_does_not_fit(store, tmp_path):
    folder = tmp_path / "edge"
    pushed(store, folder, counts=[1, 8], quantization="int8")
    assert pushed(store, folder) == (0, 0), "settings that are left out stay as they were"
    refused = [
        ({"counts": [1]}, r"made with counts \(1, 8\), not \(1,\)"),
        ({"dtype": "turbo8"}, "made with dtype fp16, not turbo8"),
        ({"quantization": "binary"}, "made with quantization int8, not binary"),
        ({"counts": [1, 5]}, "not trained at 5 candidate vectors; choose one of 1, 4, 8"),
        ({"filters": ["size"]}, "no item's metadata have .* under 'size'"),
    ]
    for settings, message in refused:
        with pytest.raises(UserError, match=message):
            pushed(store, folder, **settings)
    other = new_store(tmp_path / "s", identity="another model")
    with pytest.raises(
        UserError, match=r"another model .identity model, this store's is another mo"
    ):
        pushed(other, folder)
    with open_at(folder) as opened:
        with pytest.raises(UserError, match="pushed with 1, 8 candidate vectors, not 4"):
            opened.search(QUERIES, "4x4")
        with pytest.raises(UserError, match="not trained at 3 query vectors"):
            opened.search(QUERIES, "3x8")
        with pytest.raises(UserError, match="parity<odd: Qdrant orders numbers and dates"):
            opened.search(QUERIES, where="parity<odd")
        with pytest.raises(UserError, match="'a\"b': it has a quotation mark"):
            opened.search(QUERIES, where='a"b=1')
        with pytest.raises(UserError, match="queries contain NaN"):
            opened.search(torch.full((1, 4, WIDTH), torch.nan))
        assert opened.search(QUERIES).ids


def test_refuses_collections_that_are_not_of_a_store(store):
    api = Api()
    api.local.create_collection("theirs", vectors_config={})
    with serving(api) as server:
        with pytest.raises(
            UserError, match=r"/theirs: not a collection of a store: .*another name"
        ):
            pushed(store, f"{server}/theirs")
        with pytest.raises(UserError, match="/nothing does not exist: create it with `push`"):
            QdrantStore.open(f"{server}/nothing")
    with pytest.raises(Unreachable, match=re.escape(f"{server}/things cannot be reached")):
        QdrantStore.open(f"{server}/things")


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://localhost:6333", "is http://HOST:6333/NAME"),
        ("things.edge", "got 'things.edge'; folders of Qdrant Edge are no longer supported"),
        ("http://localhost:6333/", "is http://HOST:6333/NAME"),
        ("http:///things", "is http://HOST:6333/NAME"),
        ("http://localhost/things?key=secret", "is http://HOST:6333/NAME"),
        ("https://me:secret@host/things", "no key in an address .https://...@host."),
    ],
)
def test_refuses_addresses_that_are_none(address, message):
    with pytest.raises(UserError, match=message) as refused:
        parse_address(address)
    assert "secret@" not in str(refused.value)


def test_addresses_may_have_a_prefix():
    assert parse_address("https://host/a/b/things/") == ("https://host/a/b", "things")


def test_a_missing_package_names_the_extra(monkeypatch):
    name = "metaembed_pl.retrieval.qdrant.packages"
    monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(UserError, match=r"pip install 'metaembed-pl\[qdrant\]'"):
        __import__(name)


@pytest.mark.parametrize("settings", [{}, {"dtype": "turbo8", "quantization": "int8"}])
def test_sizes_on_paper_are_those_of_edges_files(tmp_path, settings):
    count, width = 4000, 64
    store = Store.create(tmp_path / "s", GROUPS, width, "model")
    rng = random.Random(0)  # Edge compresses payloads: these cannot be
    metadata = [{"n": i, "text": f"{rng.getrandbits(600):0150x}"} for i in range(count)]
    store.add([f"item {i}" for i in range(count)], unit(count, 8, width), metadata)
    pushed(store, tmp_path / "edge", **settings)
    make_index(tmp_path / "edge")

    def written(*patterns):
        files = [f for p in patterns for f in (tmp_path / "edge").rglob(p) if f.is_file()]
        return sum(512 * file.stat().st_blocks for file in files)

    size = sizing(count, width, [1, 4, 8], payload_bytes=230, **settings)
    vectors = written("vector_storage*/**/*") - written("vector_storage*/**/quantized.data")
    vectors -= written("vector_storage*/**/*offsets/*")
    assert vectors == pytest.approx(size.vectors + size.repeated, rel=0.1)
    assert written("vector_storage*/**/quantized.data") == pytest.approx(size.coarse, rel=0.1)
    assert written("vector_index-first_1/*") == pytest.approx(size.index, rel=0.2)
    rest = written("*id_tracker*", "payload_storage/*", "vector_storage*/**/*offsets/*")
    assert rest == pytest.approx(size.rest, rel=0.2)


def test_the_tables_in_the_docs_are_what_the_formula_gives():
    docs = (Path(__file__).parents[2] / "docs" / "qdrant.md").read_text()
    rows = sizing_module.sizing_table(sizing_module.ITEMS, 128, [1, 4, 8, 16, 64])
    for counts in ([1], [1, 4], [1, 4, 8], [1, 4, 8, 16], [1, 4, 8, 16, 64], [1, 8, 64]):
        sizes = [sizing(10**8, width, counts, quantization="int8") for width in (128, 2048)]
        amounts = [amount for size in sizes for amount in (size.disk, size.memory)]
        told = map(sizing_module.readable, amounts)
        rows.append((str(counts[-1]), ",".join(map(str, counts)), *told))
    for row in rows:
        assert f"| {' | '.join(row)} |" in docs
