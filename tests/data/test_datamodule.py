import io
import math
import os
import re
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities import move_data_to_device
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

import tiny
from metaembed_pl.data import recipe_sources
from metaembed_pl.data.batches import EvaluationBatches, TrainingBatches
from metaembed_pl.data.beir import RetrievalSetWriter
from metaembed_pl.data.collate import (
    Chunk,
    Cut,
    EvalBatch,
    Instructions,
    TrainBatch,
    chosen_negatives,
    collate,
    decoded,
    with_positive_of,
)
from metaembed_pl.data.datamodule import RetrievalDataModule
from metaembed_pl.data.plan import Plan, PlannedSource
from metaembed_pl.data.recipe_sources import EvalSource, TrainSource
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.data.workers import Loader, explained, workers_for
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair, stable_hash


class CountItems:
    """Stands in for a processing where only the pairs matter."""

    cut = Cut()

    def __call__(self, items, side):
        return {"count": torch.tensor(len(items))}

    def in_chunks(self, items, side, max_tokens=None):
        return [Chunk(torch.arange(len(items)), self(items, side))]

    def rough_length(self, item, side):
        return len(item.text or "")


count_items = CountItems()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("shards")
    return [tiny.shards(root / "a", 23), tiny.shards(root / "b", 31, first=100)]


def batches_of(folders, process=count_items, num_steps=12, num_negatives=1) -> TrainingBatches:
    shards = [ShardedPairs(folder) for folder in folders]
    planned = [PlannedSource(s.name, tuple(s.shard_sizes), 1.0) for s in shards]
    batches = TrainingBatches(shards, [num_negatives] * len(shards), Plan(planned, 8), process)
    batches.last = num_steps
    return batches


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("num_workers", [1, 4])
def test_workers_change_nothing(folders, num_workers):
    process = tiny.embedder().processor()
    alone = list(DataLoader(batches_of(folders, process), batch_size=None))
    shared = DataLoader(batches_of(folders, process), batch_size=None, num_workers=num_workers)
    for one, other in zip(alone, shared, strict=True):
        assert (one.step, one.source, one.keys) == (other.step, other.source, other.keys)
        for part in ("queries", "candidates"):
            tensors, others = getattr(one, part), getattr(other, part)
            assert tensors.keys() == others.keys()
            assert all(torch.equal(tensors[name], others[name]) for name in tensors)


def test_two_ranks_share_the_batches_of_one(folders):
    whole = batches_of(folders)
    halves = [batches_of(folders) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.rank, half.num_ranks = rank, 2
    for step in range(12):
        keys = [key for half in halves for key in half.load(step).keys]
        assert sorted(keys) == sorted(whole.load(step).keys)


def test_ranks_have_about_as_many_tokens_to_encode(tmp_path):
    """Pages beside thumbnails, a long text beside short ones: by picture size and text, unread."""
    sizes = [(84, 84), (28, 28), (28, 84), (56, 28)]
    with ShardWriter(tmp_path / "s", "s") as writer:
        for i in range(16):
            query = Item(tiny.text(i, 1 + 9 * (i % 3)))
            writer.write(Pair(f"{i}", query, Item(image=tiny.picture(i, sizes[i // 4]))))
    process = tiny.embedder().processor()
    shards = ShardedPairs(tmp_path / "s")
    busy = []
    for is_dealt in (False, True):
        planned = PlannedSource("s", (16,))
        batches = TrainingBatches([shards], [1], Plan([planned], 16), process)
        if not is_dealt:
            batches._costs = lambda batch: [1] * 16
        batches.num_ranks, batches.in_chunks = 4, True
        tokens = []
        for rank in range(4):
            batches.rank = rank
            batch = batches.load(0)
            chunks = [*batch.queries, *batch.candidates]
            tokens.append(sum(int(chunk.inputs["attention_mask"].sum()) for chunk in chunks))
        busy.append(sum(tokens) / (4 * max(tokens)))
    assert busy[1] > 0.95 > busy[0]


def test_candidates_are_positives_then_each_querys_negatives():
    pairs = tiny.pairs(3, num_negatives=2)
    seen = {}
    batch = collate(
        [[pair] for pair in pairs],
        lambda items, side: seen.update({side: items}) or {},
        source="s",
        step=0,
    )
    positives = [pair.positive for pair in pairs]
    negatives = [negative for pair in pairs for negative in pair.negatives]
    assert seen["candidate"] == positives + negatives
    assert batch.positive_of.tolist() == [0, 1, 2]
    assert batch.negatives_of.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert batch.asks.tolist() == [
        [
            stable_hash(name)
            for name in (f"picture-{i}", pairs[i].positive.content, pairs[i].question)
        ]
        for i in range(3)
    ]
    assert batch.negative_answers.shape == (6, 2)


def test_no_right_answer_of_a_question_is_its_negative():
    batch = collated(
        [
            Pair("1", Item("q"), Item("p", id="a")),
            Pair("2", Item("q"), Item("r", id="b")),  # the same question
            Pair("3", Item("s"), Item("t", id="c"), asks=("c", "a")),  # either is right
            Pair("4", Item("q", instruction="Not"), Item("u", id="d")),
        ]
    )
    asked, answers = batch.asks.tolist(), batch.answers.tolist()
    found = [[bool(set(asked[i]) & set(answers[j])) for j in range(4)] for i in range(4)]
    assert found == [
        [True, True, False, False],
        [True, True, False, False],
        [True, False, True, False],
        [False, False, False, True],
    ]


def test_a_candidate_answers_what_any_of_its_pairs_says():
    first = decoded(Pair("1", Item("q"), Item(image=tiny.picture(0), id="a", answers=("x",))))
    other = Pair("2", Item("r"), Item(image=tiny.picture(0), id="a", answers=("y",)))
    shared = with_positive_of(other, first)
    assert shared.positive.load_image() is first.positive.load_image()
    assert shared.target_id == "y"
    batch = collate([[first, shared]], count_items, source="s", step=0)
    assert {stable_hash("x"), stable_hash("y")} <= set(batch.answers[0].tolist())


def test_nothing_is_encoded_twice_and_nothing_that_no_score_uses():
    scene, other = Item("scene", id="s", answers=("a", "b", "c")), Item("other", id="o")
    shared, own = Item("both", id="x"), Item("one", id="y")
    seen = {}
    batch = collate(
        [
            [
                Pair("1", Item("a"), scene, (shared, own), asks="a"),
                Pair("2", Item("b"), scene, (shared,), asks="b"),
                Pair("3", Item("c"), scene, (), asks="c"),
            ],
            [Pair("4", Item("d"), other, (replace(own),))],
        ],
        lambda items, side: seen.update({side: items}) or {},
        source="s",
        step=0,
    )
    assert [item.text for item in seen["query"]] == ["a", "b", "c", "d"]
    assert [item.text for item in seen["candidate"]] == ["scene", "other", "both", "one"]
    assert batch.positive_of.tolist() == [0, 0, 0, 1]
    assert batch.negatives_of.tolist() == [[0, 1], [0, -1], [-1, -1], [1, -1]]
    assert (batch.num_positives, len(batch.asks), len(batch.answers)) == (2, 4, 2)
    embeddings = torch.arange(4.0).view(4, 1, 1)
    parts = batch.loss_inputs(embeddings)
    assert parts["positives"].flatten().tolist() == [0, 1]
    assert parts["negatives"].flatten().tolist() == [2, 3]


def collated(pairs):
    found = [[decoded(replace(pair, negatives=pair.negatives[:1]))] for pair in pairs]
    return collate(found, count_items, source="s", step=0)


def test_the_scores_that_mining_kept_come_with_the_batch():
    def pair(id, own, *others):
        negatives = tuple(Item(f"n{i}", score=score) for i, score in enumerate(others))
        return Pair(id, Item(id), Item("shared", score=own), negatives)

    asked = [pair("1", 0.9, 0.5, None), pair("2", 0.25)]
    asked[1] = with_positive_of(asked[1], asked[0])
    found = collate([asked], tiny.embedder().processor(), source="s", step=0).scores
    expected = torch.tensor([[0.9, 0.5, math.nan], [0.25, -math.inf, -math.inf]])
    torch.testing.assert_close(found, expected, equal_nan=True)
    plain = collate([[pair("1", None, None)]], tiny.embedder().processor(), source="s", step=0)
    assert plain.scores is None


def test_a_candidate_that_shows_the_same_as_the_positive_answers_it_whatever_its_id():
    png = io.BytesIO()
    tiny.picture(0).save(png, "PNG")
    batch = collated(
        [
            Pair("1", Item("q"), Item(image=png.getvalue(), id="a"), (Item("n"),)),
            Pair("2", Item("r"), Item(image=png.getvalue(), id="b"), (Item("m", id="c"),)),
            Pair("3", Item("s"), Item("m", id="d"), (Item(image=png.getvalue(), id="e"),)),
            Pair("4", Item("t"), Item("u", id="f"), (Item("u", id="g"),)),
        ]
    )
    asked = [set(row) for row in batch.asks.tolist()]
    answers = [set(row) for row in batch.answers.tolist()]
    rows = batch.negative_answers.tolist()
    hard = [set(rows[number]) for (number,) in batch.negatives_of.tolist()]
    found = [[bool(asked[i] & answers[j]) for j in range(4)] for i in range(4)]
    assert found == [
        [True, True, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, False, True],
    ]
    assert [bool(asked[i] & hard[i]) for i in range(4)] == [False, False, False, True]


def test_decoding_does_not_change_what_a_picture_is():
    png = io.BytesIO()
    tiny.picture(0).save(png, "PNG")
    item = Item(image=png.getvalue())
    assert item.decoded().content == item.content
    assert item.decoded().uid == item.uid


def test_a_source_tells_what_to_do_in_training_and_evaluation_alike(folders):
    seen = {}

    def process(items, side):
        return seen.update({side: items}) or {}

    found = batches_of(folders[:1])
    found.process = process
    found.instructions = [Instructions("Find:", "Shown:")]
    found.load(0)
    assert {item.instruction for item in seen["query"]} == {"Find:"}
    assert {item.instruction for item in seen["candidate"]} == {"Shown:"}
    source = EvalSource(str(folders[0]), instruction="Find:", candidate_instruction="Shown:")
    data = RetrievalDataModule(test=[source])
    data.setup("test")
    (pool,) = data.eval_sets["test"]
    assert {item.instruction for item in pool.queries} == {"Find:"}
    assert {item.instruction for item in pool.candidates} == {"Shown:"}
    plain = RetrievalDataModule(test=[EvalSource(str(folders[0]))])
    plain.setup("test")
    assert pool.relevant == plain.eval_sets["test"][0].relevant


def test_an_items_own_instruction_stands():
    pair = Pair("1", Item("q", instruction="Mine:"), Item("p"))
    assert Instructions("Theirs:").on(pair).query.instruction == "Mine:"


def test_refuses_an_empty_instruction(folders):
    with pytest.raises(UserError, match="an instruction is empty"):
        _ = TrainSource(str(folders[0]), instruction=" ").instructions


def test_a_pair_with_few_negatives_keeps_those_it_has():
    assert chosen_negatives(1, 2, turn=3) == [0]
    assert chosen_negatives(0, 2, turn=3) == []


def test_negatives_take_turns():
    assert {chosen_negatives(3, 1, turn)[0] for turn in range(3)} == {0, 1, 2}


def _with_broken_pictures(folder, count, broken):
    with ShardWriter(folder, "broken", pairs_per_shard=100) as writer:
        for i, pair in enumerate(tiny.pairs(count)):
            if i in broken:
                png = io.BytesIO()
                tiny.picture(i).save(png, "PNG")
                image = png.getvalue()[:200]
                pair = Pair(
                    pair.id, pair.query, Item(image=image, id=f"broken-{i}"), pair.negatives
                )
            writer.write(pair)
    return folder


def test_a_picture_that_does_not_decode_is_replaced_and_counted(tmp_path):
    folder = _with_broken_pictures(tmp_path / "s", 16, broken={3, 4})
    batches = batches_of([folder])
    found = [batches.load(step) for step in range(2)]  # one pass over all 16
    assert all(len(batch.keys) == 8 for batch in found)
    keys = [key for batch in found for key in batch.keys]
    assert "pair-3" not in keys
    assert "pair-4" not in keys
    assert keys.count("pair-5") == 3  # itself, and in place of both
    faults = {(shard, key) for batch in found for shard, key, _ in batch.faults}
    assert len(faults) == 2


def test_lightning_moves_every_tensor_of_a_batch_and_nothing_else():
    def made(where):
        ids = torch.zeros(2, device=where)
        chunks = [Chunk(ids, {"input_ids": ids}), Chunk(ids, {"input_ids": ids})]
        return TrainBatch("s", 4, ["a"], {"input_ids": ids}, chunks, ids, None, ids, ids, None)

    def devices(batch):
        parts = [batch.positive_of, batch.asks, batch.answers, *batch.queries.values()]
        parts += [part for c in batch.candidates for part in (c.rows, *c.inputs.values())]
        return {part.device.type for part in parts}

    batch = made("cpu")
    moved = move_data_to_device(batch, torch.device("meta"))
    assert devices(moved) == {"meta"}
    assert devices(batch) == {"cpu"}
    assert moved.keys is batch.keys
    one = EvalBatch("pool", "query", torch.zeros(2), {"input_ids": torch.zeros(2)})
    one = move_data_to_device(one, torch.device("meta"))
    assert one.index.is_meta
    assert one.inputs["input_ids"].is_meta


def test_torch_pins_every_tensor_of_a_batch(monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t, *_: pinned.append(t) or t)
    ids = torch.zeros(2)
    chunks = [Chunk(ids, {})]
    pin_memory(TrainBatch("s", 4, ["a"], {"ids": ids}, chunks, ids, None, ids, ids, None))
    assert len(pinned) == 5


def test_too_many_bad_samples_stop_the_run(tmp_path):
    source = TrainSource(str(tiny.shards(tmp_path / "s", 10)), name="s")
    data = RetrievalDataModule([source], global_batch_size=8, max_bad_samples=1)
    data.setup("fit")
    empty = torch.empty(0)
    batch = TrainBatch("s", 4, [], {}, {}, empty, None, empty, empty, None)
    batch.faults = [("0.tar", "k1", "broken")]
    data.on_before_batch_transfer(batch, 0)
    data.on_before_batch_transfer(batch, 0)  # the same pair again is not another one
    batch.faults = [("0.tar", "k2", "broken")]
    with pytest.raises(UserError, match=r"2 pairs could not.*data.max_bad_samples \(1\).*k2"):
        data.on_before_batch_transfer(batch, 0)


def test_a_source_of_broken_pairs_alone_is_an_error(tmp_path):
    folder = _with_broken_pictures(tmp_path / "s", 8, broken=set(range(8)))
    with pytest.raises(UserError, match="none of its 8 pairs"):
        batches_of([folder]).load(0)


def test_an_unreadable_shard_is_an_error_before_training(tmp_path):
    folder = tiny.shards(tmp_path / "s", 10)
    shard = next(folder.glob("*.tar"))
    shard.write_bytes(b"no tar at all")
    data = RetrievalDataModule([TrainSource(str(folder))], global_batch_size=4)
    with pytest.raises(UserError, match=shard.name):
        data.setup("fit")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()], ids=["missing", "empty"])
def test_a_folder_without_shards_is_an_error(tmp_path, make):
    make(tmp_path / "s")
    data = RetrievalDataModule([TrainSource(str(tmp_path / "s"))])
    with pytest.raises(UserError, match=str(tmp_path / "s")):
        data.setup("fit")


def test_state_names_the_very_next_batch(folders):
    data = RetrievalDataModule([TrainSource(str(folders[0]))], global_batch_size=4, num_workers=0)
    data.setup("fit")
    embedder = SimpleNamespace(processor=lambda: count_items, packs=False)
    module = SimpleNamespace(embedder=embedder, max_chunk_tokens=None)
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
    loader = data.train_dataloader()
    assert len(loader) == 6
    seen = []
    for batch in loader:
        seen.append(data.on_before_batch_transfer(batch, 0).step)
        if len(seen) == 4:
            break
    again = RetrievalDataModule([TrainSource(str(folders[0]))], global_batch_size=4, num_workers=0)
    again.setup("fit")
    again.trainer = data.trainer
    again.load_state_dict(data.state_dict())
    assert again.num_drawn == {"a": 16}
    loader = again.train_dataloader()
    rest = [again.on_before_batch_transfer(batch, 0).step for batch in loader]
    assert seen + rest == list(range(6))
    assert again.num_drawn == {"a": 24}
    assert [batch.step for batch in loader] == list(range(6, 12))  # the next epoch


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_item_is_evaluated_and_all_ranks_have_equally_many_batches(num_ranks):
    pool = RetrievalSet.from_pairs("pool", tiny.pairs(10))
    ranks = [EvaluationBatches(pool, count_items, 4, r, num_ranks) for r in range(num_ranks)]
    assert len({len(rank) for rank in ranks}) == 1
    for side in ("query", "candidate"):
        seen = [
            i
            for rank in ranks
            for b in map(rank.__getitem__, range(len(rank)))
            if b.side == side
            for i in b.index.tolist()
        ]
        assert set(seen) == set(range(10))


def test_what_cannot_be_read_in_an_evaluation_set_is_named_and_the_rest_evaluated(tmp_path):
    folder = _with_broken_pictures(tmp_path / "s", 6, broken={3})
    pool = RetrievalSet.from_pairs("pool", ShardedPairs(folder))
    candidates = EvaluationBatches(pool, tiny.processing(), 4)[0]
    assert len(candidates.inputs["input_ids"]) == len(candidates.index) == 4
    ((row, reason),) = candidates.unread.items()
    assert pool.candidates[int(candidates.index[row])].id == "broken-3"
    assert "does not decode" in reason


def test_max_queries_shrinks_the_pool(folders):
    data = RetrievalDataModule(test=[EvalSource(str(folders[0]), "mine", max_queries=5)])
    data.setup("test")
    (pool,) = data.eval_sets["test"]
    assert (pool.name, len(pool.queries), len(pool.candidates)) == ("mine", 5, 5)


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A retrieval set: 6 pages, 3 queries of which one is in German, graded, with lists."""
    path = tmp_path_factory.mktemp("sets") / "pages"
    with RetrievalSetWriter(path, "pages") as writer:
        for i in range(6):
            writer.add_candidate(Item(image=tiny.picture(i), id=f"p{i}"))
        for i, language in enumerate(["en", "de", "en"]):
            writer.add_query(Item(tiny.text(i), id=f"q{i}"), language=language)
            writer.judge(f"q{i}", f"p{i}", 2)
            writer.judge(f"q{i}", "p5", 1)
            writer.list_candidates(f"q{i}", [f"p{i}", "p5", "p3", "p4"])
    return path


def test_a_retrieval_set_is_an_evaluation_source_like_any_other(pages, folders):
    data = RetrievalDataModule(
        val=[
            EvalSource(str(folders[0]), max_queries=2, max_candidates=2),
            EvalSource(
                str(pages),
                max_queries=2,
                max_candidates=3,
                where={"language": "en"},
                instruction="Find the page.",
            ),
        ]
    )
    data.setup("validate")
    pool, graded = data.eval_sets["val"]
    assert pool.lists is None
    assert (graded.name, graded.gains) == ("pages", [[2.0, 1.0], [2.0, 1.0]])
    assert [len(graded.searched(query)) for query in (0, 1)] == [3, 3]
    assert [query.instruction for query in graded.queries] == ["Find the page."] * 2
    assert len(graded.candidates) == 4  # p0, p2, p5 and the p3 that both lists have


def test_without_test_sets_the_validation_sets_are_tested_whole(pages):
    data = RetrievalDataModule(val=[EvalSource(str(pages), "mine", max_queries=1)])
    data.setup("validate")
    data.setup("test")
    sizes = [len(data.eval_sets[part][0].queries) for part in ("val", "test")]
    assert (sizes, data.eval_sets["test"][0].name) == ([1, 3], "mine")
    assert RetrievalDataModule(val=[EvalSource(str(pages))], test=[]).eval_sources["test"] == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "PAGES", "where": {"language": "latin"}}, "its values of 'language' are"),
        ({"path": "PAGES", "where": {"lang": "en"}}, "no query has the key 'lang', but _id"),
        ({"path": "SHARDS", "where": {"language": "en"}}, "`where` chooses queries of retrieval"),
        ({"path": "no/where"}, "1 of 2 folders of shards are missing: no/where; prepare"),
    ],
)
def test_test_sets_are_looked_at_before_training(pages, folders, source, message):
    path = {"PAGES": str(pages), "SHARDS": str(folders[0])}.get(source["path"], source["path"])
    test = [EvalSource(str(pages)), EvalSource(**source | {"path": path})]
    data = RetrievalDataModule([TrainSource(str(folders[0]))], test=test, global_batch_size=8)
    with pytest.raises(UserError, match=f"data.test: .*{re.escape(message)}"):
        data.setup("fit")
    data = RetrievalDataModule([TrainSource(str(folders[0]))], test=test[:1], global_batch_size=8)
    data.setup("fit")
    assert "test" not in data.eval_sets, "not kept in memory while it trains"


def test_a_retrieval_set_that_is_tested_after_training_is_read_once(pages, folders, monkeypatch):
    read, reads = recipe_sources.read_retrieval_set, []
    monkeypatch.setattr(
        recipe_sources, "read_retrieval_set", lambda *a, **k: reads.append(a) or read(*a, **k)
    )
    test = [EvalSource(str(pages)), EvalSource(str(folders[1]))]
    data = RetrievalDataModule([TrainSource(str(folders[0]))], test=test, global_batch_size=8)
    data.setup("fit")
    data.setup("test")
    assert [len(pool.queries) for pool in data.eval_sets["test"]] == [3, 31]
    assert len(reads) == 1


def test_each_of_two_sources_with_one_path_is_checked(folders):
    sources = [EvalSource(str(folders[0]), "small", max_queries=0), EvalSource(str(folders[0]))]
    with pytest.raises(UserError, match="max_queries must be at least 1, got 0"):
        RetrievalDataModule(val=sources)


@pytest.mark.parametrize("part", ["val", "test"])
def test_two_evaluation_sets_of_one_name_are_refused(pages, folders, part):
    german = EvalSource(str(pages), where={"language": "de"})
    sources = [EvalSource(str(pages)), german]
    train = [TrainSource(str(folders[0]))]
    data = RetrievalDataModule(train, global_batch_size=8, **{"test": [], part: sources})
    with pytest.raises(UserError, match=rf"^data\.{part}: .*pages.* are both called 'pages'"):
        data.setup("fit")
    german.name = "german pages"
    data = RetrievalDataModule(train, global_batch_size=8, **{"test": [], part: sources})
    data.setup("fit")


def test_where_is_refused_for_shards(folders):
    data = RetrievalDataModule(val=[EvalSource(str(folders[0]), where={"language": "en"})])
    with pytest.raises(UserError, match="`where` chooses queries of retrieval sets"):
        data.setup("validate")


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """Twenty candidates with one, two or three questions each."""
    folder = tmp_path_factory.mktemp("asked") / "asked"
    with ShardWriter(folder, "asked", pairs_per_shard=12) as writer:
        for i, pair in enumerate(tiny.pairs(20)):
            for n in range(1 + i % 3):
                query = Item(f"{pair.query.text} {n}")
                writer.write(Pair(f"{pair.id}/{n}", query, pair.positive, pair.negatives))
    return folder


def question_batches(folder, questions=2, process=count_items) -> TrainingBatches:
    shards = ShardedPairs(folder)
    planned = TrainSource(str(folder), questions=questions).planned(shards)
    batches = TrainingBatches([shards], [1], Plan([planned], 8), process)
    batches.last = 12
    return batches


def test_a_candidate_comes_with_its_questions(asked):
    batches = question_batches(asked)
    for step in range(6):
        batch = batches.load(step)
        candidates = [key.split("/")[0] for key in batch.keys]
        assert batch.num_positives == 8
        assert batch.positive_of.tolist() == sorted(batch.positive_of.tolist())
        of = dict(zip(batch.positive_of.tolist(), candidates, strict=True))
        assert [of[c] for c in batch.positive_of.tolist()] == candidates
        assert max(Counter(batch.positive_of.tolist()).values()) == 2


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_and_ranks_change_nothing_about_questions(asked):
    whole = [batch.keys for batch in DataLoader(question_batches(asked), batch_size=None)]
    shared = DataLoader(question_batches(asked), batch_size=None, num_workers=3)
    assert [batch.keys for batch in shared] == whole
    halves = [question_batches(asked) for _ in range(2)]
    for rank, half in enumerate(halves):
        half.rank, half.num_ranks = rank, 2
    for step, keys in enumerate(whole):
        assert sorted(key for half in halves for key in half.load(step).keys) == sorted(keys)
        assert [half.load(step).num_positives for half in halves] == [4, 4]


def test_a_broken_question_leaves_the_others_of_its_candidate(tmp_path):
    png = io.BytesIO()
    tiny.picture(9).save(png, "PNG")
    broken = png.getvalue()[:200]
    good = Item("page", id="p")
    with ShardWriter(tmp_path / "s", "s") as writer:
        writer.write(Pair("1", Item("a"), good))
        writer.write(Pair("2", Item("b", image=broken), good))
        writer.write(Pair("3", Item("c"), good))
        writer.write(Pair("4", Item("d", image=broken), Item("other", id="o")))
        writer.write(Pair("5", Item("e"), Item("third", id="t")))
    planned = PlannedSource(
        "s", (5,), candidates=ShardedPairs(tmp_path / "s").candidate_numbers(), questions=None
    )
    batches = TrainingBatches([ShardedPairs(tmp_path / "s")], [0], Plan([planned], 3), count_items)
    batch = batches.load(0)
    assert sorted(batch.keys) in (["1", "3", "5", "5"], ["1", "1", "3", "5"])  # one stands in for 4
    assert all("does not decode" in reason for _, _, reason in batch.faults)
    assert batch.num_positives == 3


def test_an_id_for_two_candidates_stops_the_run_and_names_both_pairs(tmp_path):
    with ShardWriter(tmp_path / "s", "s") as writer:
        for n, text in enumerate(("x", "y", "z")):
            writer.write(Pair(f"pair-{n}", Item(f"q{n}"), Item(text, id="z" if n == 2 else "same")))
    shards = ShardedPairs(tmp_path / "s")
    planned = TrainSource(str(tmp_path / "s"), questions="all").planned(shards)
    batches = TrainingBatches([shards], [0], Plan([planned], 2), count_items)
    with pytest.raises(UserError, match=r"pairs 'pair-[01]' and 'pair-[01]' share .* id 'same'"):
        batches.load(0)


def test_a_source_without_several_questions_says_so_and_trains_as_before(folders, caplog):
    caplog.set_level("INFO")
    shards = ShardedPairs(folders[0])
    planned = TrainSource(str(folders[0]), name="a", questions=3).planned(shards)
    assert "each of its candidates has only one question" in caplog.text
    batches = TrainingBatches([shards], [1], Plan([planned], 8), count_items)
    plain = batches_of(folders[:1])
    for step in range(5):
        assert len(batches.load(step).keys) == len(plain.load(step).keys) == 8


@pytest.mark.parametrize(
    "said",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory. Please try to raise your limit.",
        "unable to write to file </torch_123_456_7>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_1_2>: Resource unavailable (11)",
    ],
)
def test_full_shared_memory_is_told_with_what_to_do(said):
    def batches():
        yield 1
        raise RuntimeError(said)

    found = explained(batches(), "data.num_workers: 0")
    assert next(found) == 1
    with pytest.raises(UserError, match=r"/dev/shm has \d+\.\d+ GiB.*--shm-size=16g"):
        next(found)


def test_a_batch_that_has_no_room_is_told_and_not_waited_for(monkeypatch):
    def full(*_):
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1_2>")

    monkeypatch.setattr(torch.UntypedStorage, "_share_fd_cpu_", full)
    batch = EvalBatch("pool", "query", torch.arange(2), {"input_ids": torch.ones(2, 3)})
    loader = Loader([batch], batch_size=None, num_workers=1, timeout=20)
    with pytest.raises(UserError, match="--shm-size=16g"):
        next(iter(loader))


def test_other_faults_of_workers_stay_what_they_are():
    def batches():
        raise RuntimeError("size mismatch")
        yield

    with pytest.raises(RuntimeError, match="size mismatch"):
        next(explained(batches(), "data.num_workers: 0"))


@pytest.mark.parametrize(
    ("num_cores", "num_ranks", "count"), [(2, 1, 1), (16, 1, 8), (96, 8, 8), (48, 8, 5), (8, 8, 1)]
)
def test_a_rank_has_as_many_workers_as_there_are_cores_for(
    monkeypatch, num_cores, num_ranks, count
):
    monkeypatch.setattr(os, "cpu_count", lambda: num_cores)
    assert workers_for(num_ranks) == count
