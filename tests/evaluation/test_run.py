"""Whole evaluations of a tiny model: what comes out does not depend on how it was computed."""

import json
import shutil
from dataclasses import asdict

import numpy as np
import pytest
import torch
from PIL import Image

import tiny
from metaembed_pl.data.beir import RetrievalSetWriter, read_retrieval_set
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.maps_picture import _pictured
from metaembed_pl.evaluation.outcome import Outcome
from metaembed_pl.evaluation.registry import open_benchmark
from metaembed_pl.evaluation.report import write_report
from metaembed_pl.evaluation.run import EvaluationOptions, evaluate, parse_budgets
from metaembed_pl.item import Item
from metaembed_pl.late_interaction import nested_scores
from metaembed_pl.model.encoding import Pace
from metaembed_pl.model.processing import Processing
from metaembed_pl.ranking import ranking_metrics
from metaembed_pl.retrieval.store import Store
from ranks import on_two_ranks

NUM_PAGES = 14


def write_set(folder):
    """Pages, texts, and pages with texts; two pages are alike; graded; q3 has nothing right."""
    with RetrievalSetWriter(folder, folder.name) as writer:
        for i in range(NUM_PAGES):
            image = tiny.picture(6 if i == 7 else i, (56, 28 + 28 * (i % 3))) if i % 4 else None
            text = tiny.text(i) if i % 4 in (0, 3) else None
            writer.add_candidate(Item(text, image, id=f"p{i}"), text_layer=tiny.text(i, 8))
        for i in range(9):
            image = tiny.picture(100 + i) if i % 3 == 1 else None
            writer.add_query(Item(tiny.text(i + 3, 2 + i), image, id=f"q{i}"))
            for j in range(1 + i % 3):
                writer.judge(f"q{i}", f"p{(i + 5 * j) % NUM_PAGES}", 0 if i == 3 else 1 + j)
    return folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    write_set(root / "pages")
    read_retrieval_set(write_set(root / "broken")).queries[6].image.write_bytes(b"cut off")
    with RetrievalSetWriter(root / "alone", "alone") as writer:
        for name in "abc":
            writer.add_candidate(Item(f"{name} {tiny.text(1)}", id=name))
        writer.add_query(Item(tiny.text(2), id="q"))
        writer.judge("q", "b")
        writer.list_candidates("q", ["b", "c"])
    tiny.shards(root / "shards", 7)
    return root


def settings(sets, out, **changes):
    return EvaluationOptions(sets, out, **{"pace": Pace(5), "dtype": "fp32", **changes})


def evaluated(sets, out, name="pages", **changes):
    model = tiny.embedder()
    benchmark = open_benchmark(f"beir:{sets}/{name}", sets)
    return evaluate(model, benchmark, model.groups, settings(sets, out, **changes))


@pytest.fixture(scope="module")
def outcome(sets, tmp_path_factory):
    return evaluated(sets, tmp_path_factory.mktemp("out"))


def test_scores_are_those_of_the_model_on_all_pairs_at_once(sets, outcome):
    model, pages = tiny.embedder(), read_retrieval_set(sets / "pages")
    queries, candidates = (
        model.encode_query(pages.queries),
        model.encode_candidate(pages.candidates),
    )
    (task,) = outcome.tasks
    assert (len(task.queries), task.num_left_out) == (8, 1)
    for budget, scores in zip(
        outcome.budgets, nested_scores(queries, candidates, model.groups), strict=True
    ):
        for name, values in ranking_metrics(scores, pages.relevant, gains=pages.gains).items():
            assert task.values[f"{name}/{budget}"] == pytest.approx(values.tolist()), (name, budget)


def told(outcome):
    """All that an outcome says of its only task, but for times and the last digit of cosines."""
    task = asdict(outcome.tasks[0])
    found = {budget: [[i for i, _ in of] for of in hits] for budget, hits in task["hits"].items()}
    alike = {
        side: np.array(cosines).round(2).tolist() for side, cosines in task["diversity"].items()
    }
    return {**task, "hits": found, "diversity": alike, "labels": [], "seconds": {}}


def work(rank):
    """What rank 0 tells of two sets, on two ranks, and how many queries each encoded."""
    import os
    from pathlib import Path

    sets, out = Path(os.environ["SETS"]), Path(os.environ["OUT"])
    asked, prepared = [], Processing.prepared

    def counted(self, items, side, *a):
        asked.extend(items if side == "query" else ())
        return prepared(self, items, side, *a)

    Processing.prepared = counted
    outcomes = [evaluated(sets, out / name, name, pace=Pace(2)) for name in ("broken", "alone")]
    return [outcome and told(outcome) for outcome in outcomes], len(asked)


def test_batch_sizes_and_ranks_change_nothing(sets, outcome, tmp_path, monkeypatch):
    for batch_size in (1, 64):
        other = evaluated(sets, tmp_path / f"{batch_size}", pace=Pace(batch_size))
        assert told(other) == told(outcome)
    monkeypatch.setenv("SETS", str(sets))
    monkeypatch.setenv("OUT", str(tmp_path / "ranks"))
    (tmp_path / "meeting").mkdir()
    first, second = on_two_ranks(work, tmp_path / "meeting")
    expected = [told(evaluated(sets, tmp_path / name, name)) for name in ("broken", "alone")]
    assert [line[:3] for line in expected[0]["bad_queries"]] == ["q7:"]
    # Of eight queries one of the second rank's cannot be read; of one query it has no part.
    assert first == (expected, 4 + 1)
    assert second == ([None, None], 3)


def test_a_corpus_is_encoded_once_for_all_tasks_and_budgets(sets, tmp_path, monkeypatch):
    model, seen, prepared = tiny.embedder(), [], Processing.prepared

    def counted(self, items, side, *a):
        seen.extend(items if side == "candidate" else ())
        return prepared(self, items, side, *a)

    monkeypatch.setattr(Processing, "prepared", counted)
    benchmark = open_benchmark(f"beir:{sets}/pages", sets)
    twice = type(benchmark)(
        "twice",
        "Twice",
        (benchmark.tasks[0], type(benchmark.tasks[0])("again", benchmark.tasks[0].folder, "mrr")),
    )
    evaluate(model, twice, model.groups[:1], settings(sets, tmp_path / "out"))
    assert len(seen) == NUM_PAGES
    evaluate(model, twice, model.groups, settings(sets, tmp_path / "out"))  # more budgets
    assert len(seen) == NUM_PAGES


def test_an_evaluation_goes_on_where_it_was_stopped(sets, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(what, done, total):
        if what == "candidates" and done >= 10:
            raise Stopped

    with pytest.raises(Stopped):
        evaluated(sets, tmp_path / "out", on_progress=stop)
    (store,) = (tmp_path / "out/stores").iterdir()
    num_kept = len(Store.open(store))
    assert 5 <= num_kept < NUM_PAGES
    told = []
    found = evaluated(sets, tmp_path / "out", on_progress=lambda *row: told.append(row))
    assert found.tasks[0].values == evaluated(sets, tmp_path / "fresh").tasks[0].values
    told.clear()
    evaluated(sets, tmp_path / "out", on_progress=lambda *row: told.append(row))
    assert told == []  # the finished task was kept


def test_changed_data_are_evaluated_anew_in_a_store_of_their_own(sets, tmp_path):
    for name in ("before", "after"):
        shutil.copytree(sets / "pages", tmp_path / name / "pages")
    file = tmp_path / "after/pages/qrels/test.tsv"
    file.write_text(file.read_text() + "q1\tp2\t3\n")
    model, values = tiny.embedder(), []
    for name in ("before", "after"):
        benchmark = open_benchmark(f"beir:{tmp_path}/{name}/pages", tmp_path)
        renamed = type(benchmark)("mine", "Mine", benchmark.tasks)
        found = evaluate(model, renamed, model.groups[:1], settings(sets, tmp_path / "out"))
        values.append(found.tasks[0].values)
    assert values[0] != values[1]


def test_what_cannot_be_read_counts_as_missed_and_is_told(sets, tmp_path):
    path = tmp_path / "pages"
    shutil.copytree(sets / "pages", path)
    pages = read_retrieval_set(path)
    right = pages.relevant[1][0]  # of the query q1, which has a picture too
    broken = pages.candidates[right].image or pages.candidates[pages.relevant[1][1]].image
    broken.write_bytes(b"no picture")
    pages.queries[3].image.write_bytes(b"cut off")
    found = evaluated(tmp_path, tmp_path / "out")
    (task,) = found.tasks
    assert [line[:3] for line in task.bad_queries] == ["q4:"]
    assert task.bad_candidates
    assert "does not decode" in task.bad_candidates[0]
    at = task.queries.index("q4")
    assert all(values[at] == 0 for values in task.values.values())
    assert task.values["recall@10/4x8"][1] < 1
    assert all(np.isfinite(values).all() for values in task.values.values())


def test_another_model_or_dtype_does_not_mix_with_what_is_there(sets, tmp_path):
    evaluated(sets, tmp_path / "out")
    with pytest.raises(UserError, match="with dtype 'fp32', not 'bf16': choose another --out"):
        evaluated(sets, tmp_path / "out", dtype="bf16")
    model = tiny.embedder(seed=1)
    benchmark = open_benchmark(f"beir:{sets}/pages", sets)
    with pytest.raises(UserError, match="contains an evaluation with identity"):
        evaluate(model, benchmark, model.groups, settings(sets, tmp_path / "out"))


def test_bf16_stores_rank_nearly_the_same(sets, outcome, tmp_path):
    found = evaluated(sets, tmp_path / "out", dtype="bf16")
    assert found.mean("overall", "4x8").mean == pytest.approx(
        outcome.mean("overall", "4x8").mean, abs=0.1
    )


def test_an_outcome_is_kept_and_read_back(sets, tmp_path):
    found = evaluated(sets, tmp_path / "out")
    read = Outcome.load(tmp_path / "out")
    assert read.tasks[0].values == found.tasks[0].values
    assert read.about == found.about
    kept = json.loads((tmp_path / "out/results.json").read_text())
    assert kept["metrics"]["evaluate/pages/ndcg@10/4x8"] == found.tasks[0].score("4x8")
    assert kept["means"]["overall"]["4x8"]["low"] <= found.tasks[0].score("4x8")
    with pytest.raises(UserError, match="not a finished evaluation"):
        Outcome.load(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [("4x9", "not trained at 9 candidate"), ("8x8", "at 8 query"), ("4", "got '4'")],
)
def test_refuses_a_budget_above_the_models(text, message):
    with pytest.raises(UserError, match=message):
        parse_budgets(text, tiny.embedder().groups)


def test_the_report_has_tables_pictures_and_warnings_in_one_file(sets, tmp_path, monkeypatch):
    model = tiny.embedder()
    shutil.copytree(sets / "pages", tmp_path / "data/<pages>")
    benchmark = open_benchmark(f"beir:{tmp_path}/data/<pages>", sets)
    out = tmp_path / "out"
    found = evaluate(model, benchmark, model.groups, settings(sets, out))
    pools = [task.open(sets) for task in benchmark.tasks]
    files = write_report(found, pools, out, model=model)
    kinds = ("budgets", "tasks", "gallery", "worst", "maps", "diversity")
    names = {f"{kind}.png" for kind in kinds}
    assert {file.name for file in files} >= names
    for name in names:
        Image.open(out / name).verify()
    page = (out / "report.html").read_text()
    assert page.count('src="data:image/png;base64,') == len(names)
    assert "http://" not in page
    assert "https://" not in page
    assert "<pages>" not in page
    assert "&lt;pages&gt;" in page
    assert f"{found.tasks[0].score('4x8'):.3f}" in page
    assert "1 queries have no right candidate" in page
    assert f"torch&quot;: &quot;{torch.__version__.partition('+')[0]}" in page
    text = (out / "report.md").read_text()
    assert f"| {found.tasks[0].score('1x1'):.3f} |" in text
    assert "![Scores by task](tasks.png)" in text
    assert "uses cross-attention" not in text
    monkeypatch.setattr("metaembed_pl.evaluation.maps_picture.patch_attention", lambda *_: None)
    write_report(found, pools, out, model=model)
    assert "uses cross-attention" in (out / "report.md").read_text()


def test_the_maps_mark_what_the_query_matches_at_the_largest_budget_that_was_evaluated(
    sets, tmp_path
):
    model = tiny.embedder()
    benchmark = open_benchmark(f"beir:{sets}/pages", sets)
    found = evaluate(model, benchmark, parse_budgets("2x4", model.groups), settings(sets, tmp_path))
    looks = [*_pictured(found.tasks[0], benchmark.tasks[0].open(sets), model, "2x4")]
    assert looks
    for look in looks:
        query = model.encode_query([look.query])[0, :2]
        candidate = model.encode_candidate([look.candidate])[0, :4]
        assert look.matched == sorted(
            {max(range(4), key=lambda c: q @ candidate[c]) for q in query}
        )
