"""Mined hard negatives, against a plain ranking of everything by hand."""

import io
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from metaembed_pl.data.collate import Instructions
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair
from metaembed_pl.retrieval.embedding import embed
from metaembed_pl.retrieval.mining import Corpus, Miner, RankedCandidate, Rules
from metaembed_pl.retrieval.store import Store


def encoded(seed):
    buffer = io.BytesIO()
    tiny.picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


PAIRS = [
    *(Pair(f"p{i}", Item(tiny.text(i)), Item(image=encoded(i), id=f"c{i}")) for i in range(12)),
    Pair("twin", Item(tiny.text(0)), Item(image=encoded(50), id="another answer to 0")),
    Pair("copy", Item(tiny.text(20)), Item(image=encoded(1), id="shows the same as c1")),
    Pair("wide", Item(tiny.text(21)), Item(tiny.text(22), id="w", answers=("w", "c2", "c3"))),
    Pair("self", Item(tiny.text(23)), Item(tiny.text(24))),
    Pair("mirror", Item(tiny.text(24)), Item(tiny.text(25))),  # its query is a candidate
    Pair("broken", Item(tiny.text(26)), Item(image=encoded(3)[:300], id="broken")),
]


def write(folder, pairs):
    with ShardWriter(folder, folder.name, pairs_per_shard=5) as writer:
        for pair in pairs:
            writer.write(pair)
    return ShardedPairs(folder)


def stored(model, folder, corpus):
    store = Store.open_for(model, folder)
    for progress in embed(store, model, corpus.entries(), 4, skip_bad=True, previews=False):
        skipped = progress.skipped
    return store, skipped


@pytest.fixture(scope="module")
def model():
    return tiny.embedder()


@pytest.fixture(scope="module")
def mined(model, tmp_path_factory):
    """Everything below the positive, for every pair, and what it was made of."""
    root = tmp_path_factory.mktemp("mined")
    pairs = write(root / "pairs", PAIRS)
    corpus = Corpus([pairs, [Item("extra"), Item(image=encoded(60), id="more")]])
    store, skipped = stored(model, root / "store", corpus)
    assert len(skipped) == 1
    miner = Miner(model, store, corpus, pairs, Rules(num=100, ratio=1.0), depth=100)
    return pairs, corpus, store, miner.mine(range(len(pairs)))


def by_hand(model, corpus, store, pair, limit):
    """The uids below the positive, by the plain sum of maxima over what is stored."""
    query = model.encode_query([pair.query])[0]
    scores = {}
    for uid, vectors in zip(store.ids, store.vectors(), strict=True):
        scores[uid] = float(sum(max(q @ c for c in vectors) for q in query) / len(query))
    same_query = [p for p in PAIRS if p.query.content == pair.query.content]
    right = {name for p in same_query for name in (p.target_id, p.positive.content)}
    right.add(pair.query.content)
    items = {uid: corpus[row] for uid, row in corpus.rows.items()}
    wrong = [uid for uid in store.ids if not right & {*items[uid].answer_ids, items[uid].content}]
    own = scores[pair.positive.uid]
    kept = [uid for uid in wrong if scores[uid] <= limit(own)]
    best = {}
    for uid in sorted(kept, key=lambda uid: -scores[uid]):
        best.setdefault(items[uid].content, uid)  # what shows the same is taken once
    return own, list(best.values()), scores


def test_mined_negatives_are_the_best_wrong_candidates_below_the_limit(model, mined):
    _, corpus, store, found = mined
    uids = list(corpus.rows)
    for pair, result in zip(PAIRS[:-1], found[:-1], strict=True):
        own, expected, scores = by_hand(model, corpus, store, pair, lambda own: own)
        assert result.own == pytest.approx(own, abs=1e-5)
        assert [uids[f.row] for f in result.negatives] == expected, pair.id
        assert [f.score for f in result.negatives] == pytest.approx(
            [scores[uid] for uid in expected], abs=1e-5
        )


def test_known_answers_are_no_negatives(mined):
    _, corpus, _, found = mined
    uids = list(corpus.rows)

    def seen(number):
        result = found[number]
        return {uids[f.row] for f in (*result.negatives, *result.left_out)}

    assert not {"c0", "another answer to 0"} & (seen(0) | seen(12))  # both ask the same
    assert "shows the same as c1" not in seen(1)
    assert "c1" not in seen(13)
    assert "w" not in seen(2) | seen(3)  # answers what these ask
    assert Item(tiny.text(24)).uid not in seen(16)  # the query itself
    assert found[0].counts["known answers"] == 2


def test_a_pair_whose_positive_cannot_be_read_says_why(mined):
    assert "does not decode" in mined[3][-1]


def test_a_cascade_that_keeps_everything_finds_the_same(model, mined):
    pairs, corpus, store, found = mined
    rules = Rules(num=100, ratio=1.0)
    miner = Miner(model, store, corpus, pairs, rules, cascade="1x1:100,4x8:100")
    again = miner.mine(range(len(pairs) - 1))
    for one, other in zip(again, found[:-1], strict=True):
        assert [f.row for f in one.negatives] == [f.row for f in other.negatives]
        assert [f.score for f in one.negatives] == pytest.approx([f.score for f in other.negatives])


def test_instructions_reach_the_model_on_both_sides(model, mined, tmp_path):
    pairs = mined[0]
    told = Instructions("red", "blue")
    other = Corpus([pairs], told)
    store, _ = stored(model, tmp_path / "store", other)
    row = store.rows_of(["c0"])
    expected = model.encode_candidate([Item(image=encoded(0), instruction="blue")])
    torch.testing.assert_close(store.vectors(row), expected, atol=0.01, rtol=0)
    result = Miner(model, store, other, pairs, Rules(), instructions=told).mine([0])[0]
    query = model.encode_query([Item(PAIRS[0].query.text, instruction="red")])
    assert result.own == pytest.approx(float(model.score(query, store.vectors(row)) / 4), abs=1e-4)


def test_refuses_a_store_of_other_items(model, mined):
    pairs, _, store, _ = mined
    with pytest.raises(UserError, match="holds other items than the corpus: remove it"):
        Miner(model, store, Corpus([[Item("extra")]]), pairs, Rules())


SCORES = st.floats(-1, 1)


@settings(derandomize=True, database=None, max_examples=100)
@given(
    scores=st.lists(SCORES, max_size=12),
    own=SCORES,
    right=st.sets(st.integers(0, 11)),
    num=st.integers(0, 5),
    skip_top=st.integers(0, 3),
    margin=st.floats(0, 0.5) | st.none(),
    ratio=st.floats(0, 1) | st.just(math.inf),
)
def test_the_rules_are_what_they_say(scores, own, right, num, skip_top, margin, ratio):
    ranked = [RankedCandidate(row, score) for row, score in enumerate(sorted(scores, reverse=True))]
    mined = Rules(num, skip_top, margin, ratio).choose(ranked, own, lambda row: row in right)
    wrong = [found for found in ranked if found.row not in right][skip_top:]
    if margin is not None:
        wrong = [found for found in wrong if found.score <= own - margin]
    if ratio < math.inf:
        wrong = [found for found in wrong if found.score <= (own * ratio if own > 0 else own)]
    expected = wrong
    assert mined.negatives == expected[:num]


@pytest.mark.parametrize(
    "setting", [{"num": -1}, {"skip_top": -1}, {"margin": -0.1}, {"ratio": math.nan}], ids=str
)
def test_refuses_rules_out_of_range(setting):
    [(name, value)] = setting.items()
    with pytest.raises(UserError, match=f"{name} must be at least 0, got {value}"):
        Rules(**setting)
