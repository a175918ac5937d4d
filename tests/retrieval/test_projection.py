"""Stores of less width than their model, against numpy's SVD and MaxSim in one einsum."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save

import tiny
from calibrated import assert_plans_do_what_was_measured
from metaembed_pl.budget import parse_groups
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.retrieval import cascade
from metaembed_pl.retrieval.calibration import calibrate
from metaembed_pl.retrieval.embedding import Entry, embed
from metaembed_pl.retrieval.mining import Corpus, Miner, Rules
from metaembed_pl.retrieval.projection import Projection
from metaembed_pl.retrieval.qdrant import layout as layout_module
from metaembed_pl.retrieval.qdrant.push import push
from metaembed_pl.retrieval.storage_recall import storage_recall
from metaembed_pl.retrieval.store import Store
from qdrant_edge_folder import collection_at, open_at
from qdrant_server import Api, serving
from unchecked import shapes_unchecked

GROUPS = parse_groups(["1x1", "2x4", "4x8"])
WIDTH, NARROW, COUNT = 24, 10, 50
# Of components and of scores of four query vectors.
ROUNDING = {"fp32": 1e-6, "bf16": 2**-8, "int8": 1.2 / 127}


def vectors(count, num_vectors=8, seed=0):
    """Unit vectors, more of them along some axes than along others, and not centred."""
    draw = np.random.default_rng(seed)
    spread = 0.8 ** np.arange(WIDTH)
    some = draw.normal(size=(count, num_vectors, WIDTH)) * spread + spread[::-1]
    return torch.from_numpy(some / np.linalg.norm(some, axis=-1, keepdims=True)).float()


QUERIES = vectors(3, 4, seed=1)


def by_svd(taught, some):
    """Vectors in the subspace that SVD finds, in numpy."""
    flat = taught.double().numpy().reshape(-1, taught.shape[-1])
    rows = np.linalg.svd(flat, full_matrices=False)[2][:NARROW]
    projected = some.double().numpy() @ rows.T
    return projected / np.linalg.norm(projected, axis=-1, keepdims=True)


def einsum_scores(queries, candidates, budget):
    r_q, r_c = map(int, budget.split("x"))
    products = np.einsum("qid,cjd->qcij", queries[:, :r_q], candidates[:, :r_c])
    return products.max(axis=3).sum(axis=2)


def projected_store(folder, dtype="fp32"):
    """50 items, of which 10 were deleted and one replaced, compacted; and the vectors they had."""
    given = vectors(COUNT)
    projection = Projection.learn([given], NARROW)
    store = Store.create(folder, GROUPS, WIDTH, "model", dtype, projection)
    store.add([f"{i}" for i in range(COUNT)], given, [{"n": i} for i in range(COUNT)])
    store.delete([f"{i}" for i in range(20, 30)])
    store = Store.open(folder)
    store.compact()
    store.add(["3"], vectors(1, seed=5), [{"n": 3}])
    kept = [*range(3), *range(4, 20), *range(30, 50)]
    return Store.open(folder), torch.cat([given[kept], vectors(1, seed=5)]), given


def test_the_rows_are_the_leading_right_singular_vectors():
    given = vectors(COUNT)
    found = Projection.learn([given[:20], given[20:]], NARROW)
    assert torch.allclose(found.rows @ found.rows.T, torch.eye(NARROW), atol=1e-6)
    expected = np.linalg.svd(given.double().numpy().reshape(-1, WIDTH))[2][:NARROW]
    # Each up to its sign.
    assert np.abs((found.rows.double().numpy() * expected).sum(axis=1)) == pytest.approx(
        1, abs=1e-5
    )
    assert found.to_bytes() == Projection.learn([given[:20], given[20:]], NARROW).to_bytes()
    assert torch.equal(Projection.from_bytes(found.to_bytes(), NARROW).rows, found.rows)


@pytest.mark.parametrize("dtype", ROUNDING)
def test_finds_what_svd_and_einsum_find(tmp_path, dtype, monkeypatch):
    # Where bf16 is faster, what it chose is read again.
    monkeypatch.setattr(cascade, "fast_dtype", lambda device: torch.float32)
    store, held, taught = projected_store(tmp_path / "s", dtype)
    assert (store.width, store.model_width, len(store)) == (NARROW, WIDTH, 40)
    queries, candidates = by_svd(taught, QUERIES), by_svd(taught, held)
    size = {"fp32": 4 * NARROW, "bf16": 2 * NARROW, "int8": NARROW + 4}[dtype]
    for budget in ("1x1", "4x1", "2x4", "4x8"):
        expected = einsum_scores(queries, candidates, budget)
        hits = store.search(QUERIES, budget, top=len(store))
        for q, rows in enumerate(hits.rows):
            assert sorted(rows) == list(range(40))
            assert hits.scores[q] == pytest.approx(expected[q, rows], abs=4 * ROUNDING[dtype])
        parts = torch.cat([scores for _, scores in store.scores(QUERIES, budget)], dim=1)
        assert parts.numpy() == pytest.approx(expected, abs=4 * ROUNDING[dtype])
        r_c = int(budget.partition("x")[2])
        assert hits.bytes_read == 40 * r_c * size
    exact = store.search(QUERIES, top=5)
    assert store.search(QUERIES, cascade="4x1:40,4x8:5").rows == exact.rows
    some = store.search(QUERIES, top=40, where="n>=40")
    assert {id for ids in some.ids for id in ids} == {f"{i}" for i in range(40, 50)}


def test_a_store_says_in_its_manifest_whether_it_has_a_projection(tmp_path):
    """One without reads as it did before there were any."""
    plain = Store.create(tmp_path / "plain", GROUPS, WIDTH, "model")
    manifest = json.loads((plain.folder / "manifest.json").read_text())
    assert (manifest["format"], "projection" in manifest) == (1, False)
    assert (plain.width, plain.model_width, plain.projection) == (WIDTH, WIDTH, None)
    store, _, _ = projected_store(tmp_path / "s")
    manifest = json.loads((store.folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["width"]) == (2, NARROW)


@pytest.mark.parametrize("damage", ["lost", "cut off", "another's"])
def test_refuses_a_store_whose_projection_is_damaged(tmp_path, damage):
    projected_store(tmp_path / "s")
    file = tmp_path / "s" / "projection.safetensors"
    if damage == "lost":
        file.unlink()
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_bytes(Projection.learn([vectors(COUNT, seed=8)], NARROW).to_bytes())
    with pytest.raises(UserError, match=r"projection.safetensors is missing, damaged or another"):
        Store.open(tmp_path / "s")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"rows": torch.eye(NARROW + 1, WIDTH)}, f"to {NARROW} .* of {NARROW + 1} x {WIDTH}"),
        ({"rows": torch.eye(NARROW, WIDTH).double()}, "torch.float64"),
        ({"rows": torch.full((NARROW, WIDTH), torch.nan)}, "this is no projection"),
        ({"columns": torch.eye(NARROW, WIDTH)}, "not a projection: 'rows'"),
        (None, "not a projection: "),
    ],
)
def test_refuses_what_is_no_projection(rows, message):
    content = b"no safetensors" if rows is None else save(rows)
    with pytest.raises(UserError, match=message):
        Projection.from_bytes(content, NARROW)


@pytest.mark.parametrize("width", [NARROW, WIDTH - 1])
def test_refuses_vectors_that_are_not_of_the_models_width(tmp_path, width):
    store, _, _ = projected_store(tmp_path / "s")
    with (
        shapes_unchecked(),
        pytest.raises(UserError, match=rf"N x 4 x {WIDTH} .* to {NARROW} .* got 1 x 4 x {width}"),
    ):
        store.search(torch.ones(1, 4, width))
    with shapes_unchecked(), pytest.raises(UserError, match=rf"1 x 8 x {WIDTH} .*1 x 8 x {width}"):
        store.add(["a"], torch.ones(1, 8, width))


@pytest.mark.parametrize(
    ("given", "width", "message"),
    [
        ([], 4, "to 4 components .* got 0"),
        ([vectors(1)[:, :3]], 4, "to 4 components .* got 3"),
        ([vectors(9)], WIDTH, f"between 1 and {WIDTH - 1} .* got {WIDTH}"),
    ],
)
def test_refuses_to_learn_what_cannot_be_learned(given, width, message):
    with pytest.raises(UserError, match=message):
        Projection.learn(given, width)


def test_refuses_a_projection_of_another_width(tmp_path):
    projection = Projection.learn([vectors(COUNT)], NARROW)
    with pytest.raises(UserError, match=rf"vectors of width {WIDTH}, the model's have 32"):
        Store.create(tmp_path / "s", GROUPS, 32, "model", projection=projection)
    assert not (tmp_path / "s").exists()


def test_a_plan_finds_what_was_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(cascade, "fast_dtype", lambda device: torch.float32)
    store, _, _ = projected_store(tmp_path / "s")
    found = calibrate(store, QUERIES, "queries")
    assert_plans_do_what_was_measured(store, QUERIES, found)
    assert calibrate(store).used.startswith("32 stored items, by their own vectors")


def pushed(store, address):
    collection = collection_at(address)
    try:
        return list(push(store, collection))[-1].sent
    finally:
        collection.close()


@pytest.mark.filterwarnings("ignore:Payload indexes have no effect in the local Qdrant")
@pytest.mark.filterwarnings("ignore:Local mode performs exact")
@pytest.mark.parametrize("kind", ["edge", "server"])
def test_a_collection_is_asked_as_the_store_is(tmp_path, monkeypatch, kind):
    store, _, _ = projected_store(tmp_path / "s")
    with serving(Api()) as server:
        address = tmp_path / "edge" if kind == "edge" else f"{server}/things"
        assert pushed(store, address) == 40
        assert pushed(store, address) == 0
        with open_at(address) as collection:
            assert (collection.width, collection.model_width) == (NARROW, WIDTH)
            hits, expected = (one.search(QUERIES, "4x8", top=40) for one in (collection, store))
            for ids, scores, known, their in zip(
                hits.ids, hits.scores, expected.ids, expected.scores, strict=True
            ):
                score_of = dict(zip(known, their, strict=True))
                assert scores == pytest.approx([score_of[id] for id in ids], abs=1e-4)
            with shapes_unchecked(), pytest.raises(UserError, match=rf"x {WIDTH} .* 4 x {NARROW}"):
                collection.search(torch.ones(1, 4, NARROW))
        other = Projection.learn([vectors(COUNT, seed=8)], NARROW)
        another = Store.create(tmp_path / "t", GROUPS, WIDTH, "model", projection=other)
        with pytest.raises(UserError, match=rf"{address} holds vectors with another projection"):
            pushed(another, address)
    monkeypatch.setattr(layout_module, "PROJECTION_CHARACTERS", 1000)
    with pytest.raises(UserError, match=rf"from {WIDTH} to {NARROW} .* at most 1,000"):
        pushed(store, tmp_path / "new")


@pytest.fixture(scope="module")
def model():
    return tiny.embedder()


@pytest.fixture(scope="module")
def items():
    """Texts, and every third a picture."""
    return [
        Item(image=tiny.picture(i), id=f"{i}") if i % 3 == 0 else Item(tiny.text(i), id=f"{i}")
        for i in range(40)
    ]


@pytest.fixture(scope="module")
def built(model, items, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores") / "s"
    return Store.build(folder, model, items, 16, dtype="fp16", width=NARROW)


def test_build_learns_from_the_items_and_embeds_each_once(built, model, items, tmp_path):
    given = model.encode_candidate(items)
    assert built.ids == [item.id for item in items]
    expected = by_svd(given, given)
    products = np.einsum("nrd,nrd->nr", built.vectors().numpy(), built.project(given).numpy())
    assert products == pytest.approx(1, abs=1e-3)
    # The same subspace, whatever its axes: the same products.
    ours = np.einsum("nrd,msd->nrms", built.vectors().numpy(), built.vectors().numpy())
    assert ours == pytest.approx(np.einsum("nrd,msd->nrms", expected, expected), abs=4e-3)


def test_killed_it_goes_on_at_the_next_item_to_the_same_bytes(built, model, items, tmp_path):
    store = Store.open_for(model, tmp_path / "s", "fp16", NARROW, items)
    steps = embed(store, model, items, 16)
    first = next(steps).embedded
    assert 0 < first < 40
    steps.close()
    with (tmp_path / "s" / "data-0000" / "slots-000-000.fp16").open("ab") as file:
        file.write(b"half a row")
    loaded = []
    entries = [
        Entry(item.id, lambda item=item: loaded.append(item.id) or item, {}) for item in items
    ]
    store = Store.open_for(model, tmp_path / "s", "fp16", NARROW, entries)
    assert list(embed(store, model, entries, 16))[-1].embedded == 40 - first
    assert loaded == [item.id for item in items[first:]]
    for file in [built.folder / "projection.safetensors", *built.folder.rglob("*.fp16")]:
        assert (tmp_path / "s" / file.relative_to(built.folder)).read_bytes() == file.read_bytes()


def test_says_how_many_of_the_nearest_it_kept(model, items, tmp_path):
    store = Store.open_for(model, tmp_path / "s", None, 4, items)
    progress = list(embed(store, model, items, 16))[-1]
    recall, count = storage_recall(store, progress)
    before, after = model.encode_candidate(items), store.vectors().numpy()
    asked = [before[:, :4].numpy(), store.project(before[:, :4]).numpy()]
    nearest = []
    for queries, candidates in zip(asked, (before.numpy(), after), strict=True):
        scores = einsum_scores(queries, candidates, "4x8")
        np.fill_diagonal(scores, -np.inf)
        nearest.append(scores.argsort(axis=1)[:, -10:])
    kept = [len(set(a) & set(b)) / 10 for a, b in zip(*nearest, strict=True)]
    assert count == 40
    assert recall == pytest.approx(np.mean(kept), abs=0.01)
    assert recall < 0.95, "four components cannot keep all"


@pytest.mark.parametrize(
    ("width", "given", "message"),
    [
        (8, None, f"stores vectors of width {NARROW}, not 8: leave out the width"),
        (32, None, f"stores vectors of width {NARROW}, not 32"),
        (33, "list", "between 1 and 31 components, as the model's vectors have 32; got 33"),
        (20, "two", "to 20 components is learned from at least as many vectors; got 16"),
        (20, "stream", "give a list, or"),
    ],
)
def test_refuses_widths_that_cannot_be(built, model, items, tmp_path, width, given, message):
    folder = built.folder if given is None else tmp_path / "s"
    some = {"two": items[:2], "stream": iter(items)}.get(given, items)
    with pytest.raises(UserError, match=message):
        Store.build(folder, model, some, width=width)
    assert not (tmp_path / "s").exists()


def test_the_models_own_width_is_no_projection(model, items, tmp_path):
    assert Store.build(tmp_path / "s", model, items[:2], width=32).projection is None


def test_a_width_that_the_model_was_trained_at_keeps_the_first_components(items, tmp_path):
    trained = tiny.embedder()
    trained.widths = (16, NARROW)
    unsized = iter(items)  # nothing is learned from them
    store = Store.build(tmp_path / "s", trained, unsized, 16, dtype="fp32", width=NARROW)
    queries, candidates = trained.encode_query(["a cat"]), trained.encode_candidate(items)
    expected = trained.score(queries, candidates, f"2x4x{NARROW}")[0].sort(descending=True)
    hits = store.search(queries, "2x4", top=3)
    assert hits.rows == [expected.indices[:3].tolist()]
    assert hits.scores[0] == pytest.approx(expected.values[:3].tolist(), abs=1e-5)


def test_mines_over_a_projected_store(model, tmp_path):
    pairs = tiny.pairs(8, 0)
    with ShardWriter(tmp_path / "pairs", "pairs") as writer:
        for pair in pairs:
            writer.write(pair)
    read = ShardedPairs(tmp_path / "pairs")
    corpus = Corpus([read])
    store = Store.open_for(model, tmp_path / "s", "fp16", NARROW, list(corpus.entries()))
    for _ in embed(store, model, corpus.entries(), 8):
        pass
    miner = Miner(model, store, corpus, read, Rules(num=7, ratio=float("inf")), depth=8)
    queries = store.project(model.encode_query([pair.query for pair in read])).numpy()
    expected = einsum_scores(queries, store.vectors().numpy(), "4x8") / 4
    for row, mined in enumerate(miner.mine(range(8))):
        assert mined.own == pytest.approx(expected[row, row], abs=1e-4)
        assert {hit.row for hit in mined.negatives} == {*range(8)} - {row}
        for hit in mined.negatives:
            assert hit.score == pytest.approx(expected[row, hit.row], abs=1e-4)
