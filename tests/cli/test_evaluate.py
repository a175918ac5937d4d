"""The verb: from files to a table, a report and a comparison, and what it refuses."""

import json

import pytest

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.data.beir import RetrievalSetWriter
from metaembed_pl.item import Item


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A model, another one, and two retrieval sets of which one has lists."""
    root = tmp_path_factory.mktemp("home")
    for seed in (0, 1):
        tiny.embedder(seed=seed).save_pretrained(root / f"model{seed}")
    for name in ("one", "two"):
        with RetrievalSetWriter(root / "sets" / name, name) as writer:
            for i in range(8):
                writer.add_candidate(Item(image=tiny.picture(i), id=f"p{i}"))
            for i in range(6):
                writer.add_query(Item(tiny.text(i), id=f"q{i}"))
                writer.judge(f"q{i}", f"p{i}")
                if name == "two":
                    writer.list_candidates(f"q{i}", [f"p{i}", "p6", "p7"])
    return root


def evaluate(home, seed, out, *flags):
    where = "--model", str(home / f"model{seed}"), "--benchmark", f"beir:{home}/sets"
    return main(["evaluate", *where, "--out", str(home / out), *flags])


def test_a_table_goes_to_standard_output_and_a_report_into_the_folder(home, capsys):
    assert evaluate(home, 0, "a") == 0
    shown = capsys.readouterr().out
    lines = {line.split("  ")[0]: line for line in shown.splitlines()}
    kept = json.loads((home / "a/results.json").read_text())["metrics"]
    for task in ("one", "two"):
        assert f"{kept[f'evaluate/{task}/ndcg@10/4x8']:.3f}" in lines[task]
    mean = (kept["evaluate/one/ndcg@10/1x1"] + kept["evaluate/two/ndcg@10/1x1"]) / 2
    assert f"{mean:.3f}" in lines["overall"]
    assert (home / "a/report.html").exists()


def test_two_models_and_two_budgets_are_compared_query_by_query(home, capsys):
    assert evaluate(home, 0, "a") == 0
    assert evaluate(home, 1, "b", "--budgets", "1x1,4x8") == 0
    capsys.readouterr()
    folders = str(home / "a"), str(home / "b")
    assert main(["evaluate", "compare", *folders]) == 0
    shown = capsys.readouterr().out
    first, second = (
        json.loads((home / name / "results.json").read_text())["metrics"] for name in "ab"
    )
    difference = second["evaluate/overall/4x8"] - first["evaluate/overall/4x8"]
    assert f"(difference {difference:+.4f}, p = " in shown
    assert main(["evaluate", "compare", folders[0], folders[0], "--budgets", "1x1,4x8"]) == 0
    assert f"A: {folders[0]} at 1x1" in capsys.readouterr().out
    assert main(["evaluate", "compare", *folders, "--budgets", "2x4"]) == 2
    assert "no ndcg@10/2x4" in capsys.readouterr().err


def test_one_task_is_compared_under_its_name(home, capsys):
    flags = "--model", str(home / "model0"), "--benchmark", f"beir:{home}/sets/one"
    assert main(["evaluate", *flags, "--out", str(home / "c")]) == 0
    capsys.readouterr()
    assert main(["evaluate", "compare", *[str(home / "c")] * 2, "--budgets", "1x1,4x8"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()[3:5]]
    assert names == ["task", "one"]


def test_bm25_without_texts_is_refused_before_the_model_is_loaded(home, capsys):
    pytest.importorskip("bm25s")
    assert evaluate(home, "-missing", "d", "--bm25") == 2
    assert "one: no candidate has a text for BM25" in capsys.readouterr().err


def test_evaluations_of_other_data_are_not_compared(home, tmp_path, capsys):
    assert evaluate(home, 0, "a") == 0
    kept = json.loads((home / "a/tasks/one.json").read_text())
    (tmp_path / "tasks").mkdir()
    for name in ("results.json", "tasks/two.json"):
        (tmp_path / name).write_bytes((home / "a" / name).read_bytes())
    (tmp_path / "tasks/one.json").write_text(json.dumps(kept | {"data": "other"}))
    assert main(["evaluate", "compare", str(home / "a"), str(tmp_path)]) == 2
    assert "one: the two evaluations used different data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "evaluate needs --model"),
        (["--model", "m"], "evaluate needs --benchmark; benchmarks are mmeb, "),
        (["--model", "m", "--benchmark", "mmeb"], "36 of 36 sets are not in data"),
        (["--model", "m", "--benchmark", "memb"], "did you mean mmeb"),
        (
            ["--model", "m", "--benchmark", "beir:x", "--data", "d"],
            "--data is not for beir:x, which",
        ),
        (["--model", "m", "compare", "a", "b"], "--model is not for `evaluate compare`"),
        (["--budgets", "1x1", "compare", "a", "b"], "--budgets is not for `evaluate compare`"),
        (["--batch-size", "8", "compare", "a", "b"], "--batch-size is not for `evaluate compare`"),
        (["compare", "nowhere", "b"], "nowhere is not a finished evaluation"),
    ],
)
def test_refuses_in_one_line(flags, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *flags]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_budget_above_the_models_is_refused_before_anything_is_written(home, capsys):
    assert evaluate(home, 0, "never", "--budgets", "16x64") == 2
    assert "not trained at 16 query vectors; choose one of 1, 2, 4" in capsys.readouterr().err
    assert not (home / "never").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_metrics_and_pictures_go_to_mlflow(home, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)  # artifacts go below the working folder
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert evaluate(home, 0, "a", "--mlflow-uri", uri) == 0
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("metaembed-evaluation")
    (run,) = client.search_runs([experiment.experiment_id])
    kept = json.loads((home / "a/results.json").read_text())
    assert run.data.metrics["evaluate/one/ndcg_at_10/4x8"] == pytest.approx(
        kept["metrics"]["evaluate/one/ndcg@10/4x8"]
    )
    assert run.data.params["identity"] == kept["about"]["identity"]
    names = {file.path for file in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "tasks.png", "worst.png", "maps.png"} <= names
