import pytest
import torch

from metaembed_pl.budget import parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval import cascade as cascade_module
from metaembed_pl.retrieval import scoring
from metaembed_pl.retrieval.cascade import Stage, parse_cascade
from metaembed_pl.retrieval.planes import vector_bytes
from metaembed_pl.retrieval.scoring import best_columns, fast_dtype
from metaembed_pl.retrieval.store import Store
from unchecked import shapes_unchecked

GROUPS = parse_groups(["1x1", "2x4", "4x8"])
WIDTH, COUNT = 16, 60


def unit(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(*shape, generator=generator), dim=-1)


QUERIES = unit(3, 4, WIDTH, seed=1)


@pytest.fixture(scope="module", params=["bf16", "fp16", "int8"])
def store(request, tmp_path_factory):
    """60 items, of which 10 were deleted and one replaced."""
    store = Store.create(
        tmp_path_factory.mktemp("stores") / "s", GROUPS, WIDTH, "model", request.param
    )
    for start in range(0, COUNT, 20):
        rows = range(start, start + 20)
        metadata = [{"n": i, "parity": "even" if i % 2 == 0 else "odd"} for i in rows]
        store.add([f"item {i}" for i in rows], unit(20, 8, WIDTH, seed=10 + start), metadata)
    store.delete([f"item {i}" for i in range(15, 25)])
    store.add(["item 3"], unit(1, 8, WIDTH, seed=99), [{"n": 3, "parity": "odd"}])
    return store


def slow_scores(queries, candidates, r_q, r_c):
    """MaxSim as the paper writes it, one dot product at a time."""
    return torch.tensor(
        [
            [
                sum(
                    max(torch.dot(query[i], candidate[j]).item() for j in range(r_c))
                    for i in range(r_q)
                )
                for candidate in candidates
            ]
            for query in queries
        ]
    )


@pytest.mark.parametrize("r_q", [1, 2, 4])
@pytest.mark.parametrize("r_c", [1, 4, 8])
def test_finds_what_the_slow_loop_finds_at_any_two_counts(store, r_q, r_c, monkeypatch):
    # Several tiles, several parts: their seams must not show.
    monkeypatch.setattr(scoring, "CPU_TILE_BYTES", 5000)
    monkeypatch.setattr(scoring, "SCORES_AT_A_TIME", 3 * 17)
    expected = slow_scores(QUERIES, store.vectors(), r_q, r_c)
    hits = store.search(QUERIES, f"{r_q}x{r_c}", top=len(store))
    best, order = expected.sort(dim=1, descending=True)
    assert torch.allclose(torch.tensor(hits.scores), best, atol=1e-5)
    assert hits.rows == order.tolist()
    assert hits.ids == [[store.ids[row] for row in rows] for rows in hits.rows]
    parts = list(store.scores(QUERIES, f"{r_q}x{r_c}"))
    assert [row for rows, _ in parts for row in rows] == list(range(len(store)))
    assert torch.allclose(torch.cat([part for _, part in parts], dim=1), expected, atol=1e-5)


def test_a_store_without_holes_is_searched_like_one_with_them(tmp_path):
    candidates = unit(30, 8, WIDTH)
    store = Store.create(tmp_path / "s", GROUPS, WIDTH, "model", "fp16")
    store.add([str(i) for i in range(30)], candidates)
    whole = store.search(QUERIES, top=30)
    assert torch.allclose(
        torch.tensor(whole.scores).sort().values,
        slow_scores(QUERIES, store.vectors(), 4, 8).sort().values,
        atol=1e-5,
    )
    assert whole.ids == [[str(row) for row in rows] for rows in whole.rows]
    assert store.metadata([2, 0, 1]) == [store.metadata()[row] for row in (2, 0, 1)]
    store.delete(["7"])
    kept = [[id for id in ids if id != "7"] for ids in whole.ids]
    assert store.search(QUERIES, top=30).ids == kept


def test_as_many_hits_as_the_store_has_items_keep_their_ids(tmp_path):
    store = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    store.add([str(i) for i in range(9)], unit(9, 8, WIDTH), [{"n": i} for i in range(9)])
    for hits in (store.search(QUERIES[:1], top=9), store.search(QUERIES, top=3)):
        assert hits.ids == [[str(row) for row in rows] for rows in hits.rows]
    rows = store.search(QUERIES[:1], top=9).rows[0]
    assert rows != sorted(rows)
    assert store.metadata(rows) == [{"n": row} for row in rows]


def test_of_equal_scores_the_earlier_row_comes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(scoring, "SCORES_AT_A_TIME", 7)
    store = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    vectors = unit(1, 8, WIDTH).expand(50, -1, -1)
    store.add([str(i) for i in range(50)], vectors)
    hits = store.search(QUERIES, "4x8", top=5)
    assert hits.rows == [[0, 1, 2, 3, 4]] * 3
    assert store.search(QUERIES, cascade="4x1:9,4x8:4").rows == [[0, 1, 2, 3]] * 3


def test_ties_at_the_last_place_go_to_the_earlier_column():
    scores = torch.tensor([[0.0, 2.0, 1.0, 1.0, 3.0, 1.0], [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    values, columns = best_columns(scores, 4)
    assert columns.tolist() == [[4, 1, 2, 3], [5, 4, 3, 2]]
    assert values.tolist() == [[3, 2, 1, 1], [6, 5, 4, 3]]
    many = torch.randint(4, (8, 3000), generator=torch.Generator().manual_seed(0)).float()
    for top in (1, 50, 1000, 3000):
        expected = many.sort(dim=1, descending=True, stable=True)
        values, columns = best_columns(many, top)
        assert torch.equal(values, expected.values[:, :top])
        assert torch.equal(columns, expected.indices[:, :top])


def test_a_cascade_that_keeps_all_is_exact(store):
    count = len(store)
    cascade = f"1x1:{count},2x4:{count},4x8:{count}"
    hits, exact = store.search(QUERIES, cascade=cascade), store.search(QUERIES, top=count)
    assert hits.rows == exact.rows
    assert torch.allclose(torch.tensor(hits.scores), torch.tensor(exact.scores), atol=1e-5)


def test_a_cascade_scores_again_what_each_stage_keeps(store):
    """By hand: the 20 best at 4x1, of these the 6 best at 2x4, of these the 3 best at 4x8."""
    vectors = store.vectors()
    hits = store.search(QUERIES, cascade="4x1:20,2x4:6,4x8:3")
    for q, rows in enumerate(hits.rows):
        left = list(range(len(store)))
        for r_q, r_c, keep in [(4, 1, 20), (2, 4, 6), (4, 8, 3)]:
            scores = slow_scores(QUERIES[q : q + 1], vectors[left], r_q, r_c)[0]
            left = [left[i] for i in scores.argsort(descending=True)[:keep].tolist()]
        assert rows == left


def test_a_pooled_stage_scores_with_the_sum_of_the_query(store):
    """By hand: the 9 best by the sum's best product with 4 vectors, of these the 3 best at 4x8."""
    vectors = store.vectors()
    hits = store.search(QUERIES, cascade="poolx4:9,4x8:3")
    for query, rows in zip(QUERIES, hits.rows, strict=True):
        best = (vectors[:, :4] @ query.sum(dim=0)).amax(dim=1).argsort(descending=True)[:9]
        scores = slow_scores(query[None], vectors[best], 4, 8)[0]
        assert rows == best[scores.argsort(descending=True)[:3]].tolist()
    assert (
        store.search(QUERIES, cascade="poolx1:7,4x8:3").rows
        == store.search(QUERIES, cascade="4x1:7,4x8:3").rows
    )
    size = vector_bytes(store.description)
    read = store.search(QUERIES[:1], cascade="poolx8:9,4x8:3").bytes_read
    assert read >= (len(store) + 9) * 8 * size


def test_stages_for_many_items_find_what_those_for_few_do(store, monkeypatch):
    found = store.search(QUERIES, cascade="poolx8:40,2x4:30,4x8:20")
    monkeypatch.setattr(cascade_module, "FEW", 0)
    again = store.search(QUERIES, cascade="poolx8:40,2x4:30,4x8:20")
    assert again.rows == found.rows
    assert torch.allclose(torch.tensor(again.scores), torch.tensor(found.scores), atol=1e-5)


def test_says_how_many_bytes_were_read(store, monkeypatch):
    # Where bf16 is faster, what it chose is read again.
    monkeypatch.setattr(cascade_module, "fast_dtype", lambda device: torch.float32)
    size = {"bf16": 2 * WIDTH, "fp16": 2 * WIDTH, "int8": WIDTH + 4}[store.dtype]
    assert store.search(QUERIES, "4x1").bytes_read == len(store) * size
    assert store.search(QUERIES, "1x4").bytes_read == 4 * len(store) * size
    hits = store.search(QUERIES, cascade="1x1:20,2x4:6,4x8:3")
    assert hits.bytes_read == (len(store) + 3 * 20 * 4 + 3 * 6 * 8) * size
    assert hits.milliseconds > 0


def test_coarse_arithmetic_finds_the_same_and_returns_fine_scores(store, monkeypatch):
    exact = store.search(QUERIES, "4x8", top=5)
    cascaded = store.search(QUERIES, cascade="4x1:20,4x8:5")
    monkeypatch.setattr(cascade_module, "fast_dtype", lambda device: torch.bfloat16)
    again = store.search(QUERIES, "4x8", top=5)
    assert again.rows == exact.rows
    assert torch.allclose(torch.tensor(again.scores), torch.tensor(exact.scores), atol=1e-6)
    assert store.search(QUERIES, cascade="4x1:20,4x8:5").rows == cascaded.rows


def test_the_fast_dtype_is_one_of_two():
    assert fast_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_normalised_scores_compare_across_budgets(store):
    whole = store.search(QUERIES, "4x8", top=3)
    hits = store.search(QUERIES, "4x8", top=3, normalised=True)
    assert hits.rows == whole.rows
    assert torch.allclose(4 * torch.tensor(hits.scores), torch.tensor(whole.scores))


@pytest.mark.parametrize(
    ("where", "holds"),
    [
        ("parity=odd", lambda v: v["parity"] == "odd"),
        ("parity!=odd", lambda v: v["parity"] != "odd"),
        ("n>=40", lambda v: v["n"] >= 40),
        (["n < 50", "n > 30", "parity = even"], lambda v: 30 < v["n"] < 50 and v["n"] % 2 == 0),
    ],
)
def test_only_items_for_which_the_conditions_hold_are_found(store, where, holds):
    every = store.search(QUERIES, top=len(store))
    wanted = {row for row, value in enumerate(store.metadata()) if holds(value)}
    assert 0 < len(wanted) < len(store)
    filtered = store.search(QUERIES, top=len(store), where=where)
    assert filtered.rows == [[row for row in rows if row in wanted] for rows in every.rows]
    some = store.search(QUERIES, cascade="4x1:10,4x8:10", where=where)
    assert all(set(rows) <= wanted for rows in some.rows)


def test_a_filter_that_nothing_passes_finds_nothing(store):
    assert store.search(QUERIES, where="colour=red").ids == [[], [], []]
    assert store.search(QUERIES, where="n>60").ids == [[], [], []]


def test_no_queries_find_nothing(store):
    assert store.search(QUERIES[:0]).ids == []


def test_stages_are_read_from_text_and_from_lists():
    expected = (Stage(GROUPS[1], 20), Stage(GROUPS[2], 5))
    assert parse_cascade("2x4:20, 4x8:5", GROUPS) == expected
    assert parse_cascade([Stage(GROUPS[1], 20), "4x8:5"], GROUPS) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": "3x4"}, "not trained at 3 query vectors; choose one of 1, 2, 4"),
        ({"budget": "4x64"}, "not trained at 64 candidate vectors; choose one of 1, 4, 8"),
        ({"top": 0}, "top must be at least 1, got 0"),
        ({"cascade": "1x1:20,4x8"}, "such as 4x8:200, .* or each@.7:50; got '4x8'"),
        ({"cascade": "poolx8:20"}, "the last stage .* scores at a budget, .*; got poolx8:20"),
        ({"cascade": "pool@.5:20"}, "the last stage .* scores at a budget, .*; got pool@0.5:20"),
        ({"cascade": "1x1:20,pool@.5:20,4x8:10"}, "only the first stage .* not pool@0.5:20"),
        ({"cascade": "pool@1.5:20,4x8:10"}, "got 'pool@1.5:20'"),
        ({"cascade": "pool@.:20,4x8:10"}, r"got 'pool@\.:20'"),
        ({"cascade": "poolx3:20,4x8:10"}, "not trained at 3 candidate vectors"),
        ({"cascade": "pool@.5:20,4x8:10"}, "has no index for pool@0.5:20: build one with `index"),
        ({"cascade": "1x1:0"}, "got '1x1:0'"),
        ({"cascade": "1x1:5,4x8:9"}, "4x8:9 of a cascade keeps more than 1x1:5"),
        ({"cascade": "1x1:5,4x64:3"}, "not trained at 64 candidate vectors"),
        ({"cascade": []}, "at least one stage"),
        ({"cascade": "4x8:5", "top": 6}, "4x8:5 keeps fewer than the top 6"),
        ({"cascade": "4x8:5", "budget": "1x1"}, "a budget .1x1. or a cascade, not both"),
        ({"where": "parity"}, "such as lang=de; got 'parity'"),
        ({"queries": unit(1, 4, 8)}, "queries must be N x 4 x 16 .*, got 1 x 4 x 8"),
        ({"queries": unit(1, 2, WIDTH)}, "got 1 x 2 x 16"),
        ({"queries": unit(4, WIDTH)}, "queries must be a tensor .* got 4 x 16"),
        ({"queries": "an apple"}, "queries must be a tensor of items x vectors x width.* got str"),
        ({"queries": torch.full((1, 4, WIDTH), torch.nan)}, "queries contain NaN"),
    ],
)
def test_refuses_what_it_cannot_search(store, settings, message):
    settings = {"queries": QUERIES} | settings
    with shapes_unchecked(), pytest.raises(UserError, match=message):
        store.search(**settings)


def test_an_empty_store_says_so(tmp_path):
    store = Store.create(tmp_path / "s", GROUPS, WIDTH, "model")
    with pytest.raises(UserError, match=r"/s is empty: add items"):
        store.search(QUERIES)
