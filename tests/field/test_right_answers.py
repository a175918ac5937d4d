"""A query with several right answers, one that nobody can find, and one that is itself a candidate.

The numbers are compared with pytrec_eval's, on the model's own scores.
"""

import json

import pytest
import pytrec_eval

import hub
import tiny
from metaembed_pl.data.beir import read_retrieval_set
from metaembed_pl.data.mapping import open_rows
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.data_prep import pairs as pairs_script
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.registry import open_benchmark
from metaembed_pl.evaluation.run import EvaluationOptions, evaluate
from metaembed_pl.item import Item, Pair
from metaembed_pl.ranking import ranking_metrics
from metaembed_pl.retrieval.mining import RankedCandidate, Rules
from metaembed_pl.training.metrics import RetrievalMetrics

CORPUS = {"a1": "flag moon", "a2": "moon flag", "b1": "red apple", "b2": "apple red", "c1": "cat"}
OWN_IDS = {"a1": "flag moon", "b1": "red apple", "c1": "cat"}


def write_set(folder, queries, qrels, corpus=CORPUS, manifest=None):
    (folder / "qrels").mkdir(parents=True)
    for name, items in (("corpus", corpus), ("queries", queries)):
        lines = [json.dumps({"_id": id, "text": text}) for id, text in items.items()]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    lines = [f"{q}\t{c}\t1" for q, right in qrels.items() for c in right]
    (folder / "qrels" / "test.tsv").write_text("\n".join(["query-id\tcorpus-id\tscore", *lines]))
    if manifest is not None:
        (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def expected(model, queries, qrels, own_too=False):
    """What pytrec_eval says of the model's scores, hits of a query's own id left out as in BEIR."""
    found = model.score(
        model.encode_query(list(queries.values())), model.encode_candidate(list(CORPUS.values()))
    )
    run = {
        query: {c: float(s) for c, s in zip(CORPUS, row, strict=True) if own_too or c != query}
        for query, row in zip(queries, found, strict=True)
    }
    judged = {query: dict.fromkeys(right, 1) for query, right in qrels.items()}
    scored = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recall.1"}).evaluate(run)
    return {
        ours: sum(of[theirs] for of in scored.values()) / len(scored)
        for ours, theirs in (("ndcg@10", "ndcg_cut_10"), ("recall@1", "recall_1"))
    }


def scores(model, folder, out):
    outcome = evaluate(
        model, open_benchmark(f"beir:{folder}", out), model.groups, EvaluationOptions(out, out)
    )
    return {name: outcome.tasks[0].score("4x8", name) for name in ("ndcg@10", "recall@1")}


def validated(model, folder):
    """The same in training's own metric."""
    found = read_retrieval_set(folder)
    metric = RetrievalMetrics(
        model.groups, found.relevant, len(found.candidates), gains=found.gains, itself=found.itself
    )
    for side, items in (("query", found.queries), ("candidate", found.candidates)):
        encode = model.encode_query if side == "query" else model.encode_candidate
        metric.update(side, tiny.torch.arange(len(items)), encode(list(items)))
    values = metric.compute()
    return {name: float(values[f"{name}/4x8"]) for name in ("ndcg@10", "recall@1")}


def test_a_document_that_the_corpus_lacks_is_told_and_found_by_nobody(tmp_path, caplog):
    queries = {"q1": "red apple", "q2": "flag moon", "q3": "cat"}
    qrels = {"q1": ["b1", "gone"], "q2": ["a1"], "q3": ["lost"]}
    folder, model = write_set(tmp_path / "set", queries, qrels), tiny.embedder()
    found = scores(model, folder, tmp_path / "out")
    assert found == pytest.approx(expected(model, queries, qrels))
    assert found == pytest.approx(validated(model, folder))
    assert "2 ids are not in corpus.jsonl, such as 'gone'" in caplog.text


def test_a_query_that_was_left_out_of_the_set_is_told(tmp_path, caplog):
    qrels = {"q1": ["b1"], "elsewhere": ["a1"]}
    found = read_retrieval_set(write_set(tmp_path, {"q1": "red apple"}, qrels))
    assert found.relevant == [[2]]
    assert "1 ids are not in queries.jsonl, such as 'elsewhere'" in caplog.text


def test_a_set_of_which_nothing_can_be_found_is_refused(tmp_path):
    folder = write_set(tmp_path, {"q1": "red apple"}, {"q1": ["gone"]})
    with pytest.raises(UserError, match="not one of 1 queries"):
        read_retrieval_set(folder)


@pytest.mark.parametrize("asked", [None, True, False])
def test_a_query_that_stands_in_the_corpus_does_not_find_itself(tmp_path, caplog, asked):
    qrels = {"a1": ["a2"], "b1": ["b2"], "c1": ["c1", "a1"]}
    manifest = None if asked is None else {"ignore_identical_ids": asked}
    folder = write_set(tmp_path / "set", OWN_IDS, qrels, manifest=manifest)
    model = tiny.embedder()
    found = scores(model, folder, tmp_path / "out")
    # c1 judges itself right: as in BEIR, it is taken from what is found, not from what is right.
    assert found == pytest.approx(expected(model, OWN_IDS, qrels, own_too=asked is False))
    assert found == pytest.approx(validated(model, folder))
    assert ("3 queries are also in the corpus" in caplog.text) == (asked is not False)


def test_ids_that_are_alike_by_chance_are_searched(tmp_path, caplog):
    queries = {"a1": "green", "b1": "blue"}
    folder = write_set(tmp_path, queries, {"a1": ["a1"], "b1": ["a2"]})
    assert read_retrieval_set(folder).itself is None
    assert "2 queries share an id with a different candidate" in caplog.text


def test_smaller_sets_keep_what_is_missing_and_who_is_itself(tmp_path):
    qrels = {"a1": ["a2"], "b1": ["b2", "gone"], "c1": ["c1"]}
    found = read_retrieval_set(write_set(tmp_path, OWN_IDS, qrels))
    assert (found.relevant, found.itself) == ([[1], [-1, 3], [-1]], [0, 2, 4])
    small = found.subset(max_queries=2, max_candidates=3)
    assert [item.id for item in small.candidates] == ["a1", "a2", "b2"]
    assert (small.relevant, small.itself) == ([[1], [-1, 2]], [0, -1])
    assert found.asking([1]).itself == [2]


def test_a_missing_answer_counts_and_the_query_itself_does_not():
    scores = tiny.torch.tensor([[0.9, 0.5, 0.1]])
    found = ranking_metrics(scores, [[-1, 1]], itself=[0])
    assert (found["recall@1"], found["mrr"]) == (0.5, 1)


PAIRS = [
    {"query": "flag: Japan", "positive": {"text": "flag: Japan", "id": "j1"}},
    {"query": "flag: Japan", "positive": {"text": "Japan: flag", "id": "j2"}},
    {"query": "cat face", "positive": {"text": "cat face", "id": "c1"}},
    {
        "query": "cat face",
        "positive": {"text": "face: cat", "id": "c2"},
        "negatives": [{"text": "cat face", "id": "c1"}, {"text": "dog", "id": "d"}],
    },
    {"query": "a face", "positive": {"text": "face: cat", "id": "c2"}},
]


def write_pairs(folder, form):
    folder.mkdir()
    rows = [
        {
            "query": pair["query"],
            "positive": pair["positive"]["text"],
            "positive_id": pair["positive"]["id"],
        }
        for pair in PAIRS
    ]
    if form == "jsonl":
        (folder / "p.jsonl").write_text("\n".join(map(json.dumps, PAIRS)))
    elif form == "csv":
        lines = [",".join(rows[0]), *(",".join(row.values()) for row in rows)]
        (folder / "p.csv").write_text("\n".join(lines))
    else:
        hub.write_parquet(folder / "p.parquet", rows)
    options = ["--pairs", folder / f"p.{form}", "--out", folder / "out", "--held-out", "0"]
    assert pairs_script.main([*map(str, options), "--num-workers", "0"]) == 0
    return ShardedPairs(folder / "out" / "train")


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_all_rows_of_a_query_are_right_answers_to_it(tmp_path, form):
    pairs = write_pairs(tmp_path / form, form)
    assert [set(pair.relevant_ids) for pair in pairs] == [
        *[{"j1", "j2"}] * 2,
        *[{"c1", "c2"}] * 2,
        {"c2"},
    ]
    found = RetrievalSet.from_pairs("x", pairs)
    assert [query.text for query in found.queries] == ["flag: Japan", "cat face", "a face"]
    assert found.relevant == [[0, 1], [2, 3], [3]]
    assert all(item.id != "c1" for pair in pairs for item in pair.negatives)


def test_columns_say_what_is_asked_and_answered(tmp_path):
    (tmp_path / "p.csv").write_text(
        'query,positive,positive_id,asks,answers\nred,apple,1,7,"[7, 8]"\nblue,sea,2,2,\n'
    )
    first, second = open_rows(str(tmp_path / "p.csv")).pairs()
    assert (first.relevant_ids, first.positive.answers) == (("7",), ("7", "8"))
    assert (second.relevant_ids, second.positive.answer_ids) == (("2",), ("2",))


def test_an_answer_that_shows_the_same_as_a_right_one_is_right():
    picture = hub.png(0)
    pairs = [
        Pair("1", Item("red"), Item(image=picture, id="a")),
        Pair("2", Item("blue"), Item(image=picture, id="b")),
    ]
    assert RetrievalSet.from_pairs("x", pairs).relevant == [[0, 1], [0, 1]]


def test_one_picture_with_two_questions_has_two_questions():
    picture = hub.png(0)
    pairs = [
        Pair("1", Item(image=picture, instruction="Its name:"), Item("a cat")),
        Pair("2", Item(image=picture, instruction="Its colour:"), Item("grey")),
    ]
    assert RetrievalSet.from_pairs("x", pairs).relevant == [[0], [1]]


def test_the_same_text_or_picture_is_mined_once():
    ranked = [
        RankedCandidate(0, 0.5),
        RankedCandidate(1, 0.4),
        RankedCandidate(2, 0.3),
        RankedCandidate(3, 0.2),
    ]
    mined = Rules(num=3).choose(ranked, 0.9, lambda row: False, {0: 7, 1: 7, 2: 8, 3: 9}.get)
    assert [found.row for found in mined.negatives] == [0, 2, 3]
    assert mined.counts == {"shown already": 1}
