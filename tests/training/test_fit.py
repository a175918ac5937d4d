"""The command line, on a tiny recipe: fit, resume, refuse."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import tiny
from metaembed_pl.cli import TRAINING_VERBS, train
from metaembed_pl.cli.main import main
from metaembed_pl.data.beir import RetrievalSetWriter
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from ranks import Ranks, command_line


def recipe(root: Path) -> dict:
    """A recipe for a tiny model on tiny shards below `root`."""
    train, test = str(root / "train"), str(root / "test")
    return {
        "run": {
            "name": "tiny",
            "folder": str(root / "runs"),
            "checkpoint_every_n_steps": 1,
            "mlflow_uri": f"sqlite:///{root}/mlflow.db",
        },
        "model": {
            "backbone": {
                "scratch": tiny.QWEN25_VL,
                "tokenizer": {"vocab_size": 300, "sources": [train]},
                "max_pixels": 56 * 56,
            },
            "groups": ["1x1", "2x4"],
            "layout": "own",
            "optimizer": {"lr": 1e-3},
        },
        "data": {
            "train": [{"path": train}],
            "val": [{"path": test}],
            "test": [{"path": test, "name": "pool"}],
            "global_batch_size": 8,
            "num_workers": 0,
        },
        "trainer": {
            "max_steps": 6,
            "val_check_interval": 3,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "logger": False,
        },
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("fit")
    tiny.shards(root / "train", 40)
    tiny.shards(root / "test", 12, first=500)
    return root


def write_recipe(folder: Path, values: dict) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def fit_in_a_process(folder: Path, values: dict) -> str:
    """What a whole `fit`, started as a user starts it, says."""
    done = subprocess.run(
        [sys.executable, "-m", "metaembed_pl", "fit", "--config", write_recipe(folder, values)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory) -> tuple[Path, str]:
    """A whole run with MLflow, in its own process."""
    folder = tmp_path_factory.mktemp("whole")
    values = recipe(data)
    values["run"]["folder"] = str(folder / "runs")
    del values["trainer"]["logger"]
    values["run"]["mlflow_uri"] = f"sqlite:///{folder}/mlflow.db"
    return folder, fit_in_a_process(folder, values)


def test_a_run_leaves_config_checkpoints_model_and_report(data, finished):
    run = finished[0] / "runs" / "tiny"
    for name in (
        "config.fit.yaml",
        "checkpoints/last.ckpt",
        "checkpoints/best.ckpt",
        "model/metaembed.json",
        "report/metrics.json",
        "report/budgets.png",
        "report/gallery.png",
        "report/maps.png",
    ):
        assert (run / name).is_file(), name
    metrics = json.loads((run / "report" / "metrics.json").read_text())
    assert 0 <= metrics["test/pool/recall@1/2x4"] <= 1
    assert {
        f"test/pool/{m}/1x1" for m in ("recall@5", "recall@10", "mrr", "ndcg@5")
    } <= metrics.keys()
    vectors = MetaEmbedder.from_pretrained(run / "model").encode_query(
        [pair.query for pair in ShardedPairs(data / "test")]
    )
    expected = torch.cosine_similarity(vectors[:, 0], vectors[:, 1], dim=1).mean().item()
    assert metrics["test/pool/cosine/query"] == pytest.approx(expected, abs=1e-4)


def test_the_log_says_how_many_negatives_a_query_sees(finished):
    said = (
        "a batch of this rank has 8 queries to 8 candidates (1.0 each); a query sees 7 negatives "
    )
    assert said + "of the global batch and 1.0 hard ones of its own" in finished[1]


def test_the_log_says_what_was_drawn_of_each_source(finished):
    assert "train: 48 pairs drawn, 1.20 passes" in finished[1]


def test_a_pipe_gets_plain_lines_and_no_traceback(finished):
    assert "step 6 of 6" in finished[1]
    assert "Traceback" not in finished[1]
    assert "\r" not in finished[1]


def test_the_exported_model_has_the_checkpoints_weights(finished):
    run = finished[0] / "runs" / "tiny"
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    model = MetaEmbedder.from_pretrained(run / "model")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint["state_dict"][f"embedder.{name}"]), name


def test_mlflow_has_parameters_versions_curves_and_artifacts(finished):
    mlflow = pytest.importorskip("mlflow")
    folder = finished[0]
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    note = json.loads((folder / "runs" / "tiny" / "mlflow.json").read_text())
    run = client.get_run(note["run_id"])
    assert run.info.status == "FINISHED"
    assert run.data.params["model/optimizer/lr"] == "0.001"
    assert run.data.tags["version.torch"] == torch.__version__
    assert run.data.metrics["data/train/pairs"] == 48
    assert run.data.metrics["data/bad_samples"] == 0
    steps = [point.step for point in client.get_metric_history(run.info.run_id, "train/loss/2x4")]
    assert len(steps) == 6
    assert "test/pool/recall_at_1/2x4" in run.data.metrics
    assert {"config.fit.yaml", "model", "report"} <= {
        item.path for item in client.list_artifacts(run.info.run_id)
    }


def test_validate_and_test_print_whole_names(finished, capsys):
    arguments = ["--config", str(finished[0] / "recipe.yaml"), "--run.name", "again"]
    assert main(["validate", *arguments]) == 0
    assert re.search(r"^val/test/recall@1/2x4  [01]\.\d{4}$", capsys.readouterr().out, re.M)
    assert main(["test", *arguments]) == 0
    assert re.match(r"again: test sets\n\ntask +metric", capsys.readouterr().out)


def test_a_dry_run_of_few_batches_ranks_nothing_and_writes_nothing(data, tmp_path, capsys):
    few = recipe(data) | {"run": {"name": "x", "folder": str(tmp_path / "runs")}}
    file = write_recipe(tmp_path, few)
    arguments = ["fit", "--config", file, "--data.eval_batch_size=2"]
    assert main([*arguments, "--trainer.fast_dev_run=1"]) == 0
    assert not list((tmp_path / "runs").rglob("*.*"))
    assert main([*arguments, "--trainer.limit_val_batches=1"]) == 2
    assert "use max_queries, not trainer.limit_val_batches" in capsys.readouterr().err


def test_every_verb_of_lightning_has_its_own_help(capsys):
    for verb, does in TRAINING_VERBS.items():
        with pytest.raises(SystemExit):
            main([verb, "--help"])
        assert f"\n{does}\n" in capsys.readouterr().out.partition("options:\n")[0]


def test_two_ranks_end_where_one_does(data, finished, tmp_path):
    """The whole way: plan, loss over both ranks, DDP, metrics, model folder and report."""
    values = recipe(data)
    values["run"]["folder"] = str(tmp_path)
    values["trainer"] |= {"devices": 2, "strategy": "ddp"}
    assert fit_in_a_process(tmp_path, values).count("a query sees") == 1  # not once a rank
    runs = [folder / "tiny" for folder in (finished[0] / "runs", tmp_path)]
    models = [MetaEmbedder.from_pretrained(run / "model").state_dict() for run in runs]
    one, two = (torch.cat([t.flatten() for t in model.values()]) for model in models)
    # AdamW turns rounding into whole steps where a gradient is next to nothing, and only there.
    assert ((one - two).abs() > 1e-4).float().mean() < 0.01
    metrics = [json.loads((run / "report" / "metrics.json").read_text()) for run in runs]
    assert metrics[0].keys() == metrics[1].keys()
    first, second = (found["test/pool/mrr/2x4"] for found in metrics)
    assert first == pytest.approx(second, abs=0.1)


@pytest.mark.parametrize("fast", [True, False])
def test_mixed_bf16_becomes_fp32_where_the_cpu_has_no_instructions_for_it(monkeypatch, fast):
    monkeypatch.setattr(train, "computes_in_bf16", lambda _: fast)
    found = train._precision({"precision": "bf16-mixed", "accelerator": "cpu"})
    assert found == ("bf16-mixed" if fast else "32-true")
    assert train._precision({"precision": "bf16-true", "accelerator": "cpu"}) == "bf16-true"


def test_a_second_fit_of_the_same_name_is_refused(finished, capsys):
    recipe_file = str(finished[0] / "recipe.yaml")
    assert main(["fit", "--config", recipe_file]) == 2
    assert "--ckpt_path last" in capsys.readouterr().err


@pytest.mark.slow
def test_killed_at_any_step_and_resumed_ends_with_the_same_weights(data, tmp_path):
    """Bitwise: SIGKILL after checkpoints 3, 4 and 5, each time then `--ckpt_path last`."""
    files, lasts = {}, {}
    for name in ("whole", "killed"):
        values = recipe(data)
        values["run"] |= {"folder": str(tmp_path / name)}
        (tmp_path / name).mkdir()
        files[name] = write_recipe(tmp_path / name, values)
        lasts[name] = tmp_path / name / "tiny" / "checkpoints" / "last.ckpt"

    def started(name: str, *resume: str) -> Ranks:
        said = tmp_path / name / "said"
        return command_line(1, said, "fit", "--config", files[name], *resume)

    runs = [started("whole")]
    for kill in (3, 4, 5):
        last = lasts["killed"]
        _kill_at(started("killed", *(["--ckpt_path", "last"] * last.exists())), last, kill)
    runs.append(started("killed", "--ckpt_path", "last"))
    for run in runs:
        [(status, said)] = run.end()
        assert status == 0, said
    weights = [torch.load(last, weights_only=True) for last in lasts.values()]
    assert weights[0]["global_step"] == weights[1]["global_step"] == 6
    states = [checkpoint["state_dict"] for checkpoint in weights]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def _kill_at(run: Ranks, last: Path, step: int) -> None:
    """Kills a run once the checkpoint of this step, or a later one, is there."""
    [process] = run.processes
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.exitcode is None:
        if last.exists() and torch.load(last, weights_only=True)["global_step"] >= step:
            break
        time.sleep(0.01)
    run.kill()
    [(status, said)] = run.end()
    assert status == -signal.SIGKILL, said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model.layuot=own"], "model.layuot: no such key; did you mean 'layout'"),
        (["--trainer.max_step=3"], "trainer.max_step: no such key; did you mean 'max_steps'"),
        (["--model.groups=[4x8,1x1]"], "nested"),
        (["--model.layout=neither"], "own"),
        (["--data.train=[{path: nowhere}]"], "nowhere"),
        (["--data.global_batch_size=1000"], "fewer than one global batch of 1000"),
        (["--model.optimizer.warmup=2"], "optimizer.warmup is a share of all steps, 0 to below 1"),
        (["--model.loss.quantization.bits=3"], "quantization.bits is 8 or 1, got 3"),
        (["--ckpt_path=last"], "no .*last.ckpt to continue from"),
        (["--weights_only=false"], "weights_only has no effect: it is always true"),
    ],
)
def test_a_faulty_recipe_is_one_line_and_exit_2(data, tmp_path, capsys, arguments, message):
    file = write_recipe(tmp_path, recipe(data) | {"run": {"name": "x", "folder": str(tmp_path)}})
    assert main(["fit", "--config", file, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("metaembed-pl: ")
    assert re.search(message, error), error
    assert not (tmp_path / "x" / "checkpoints").exists()


@pytest.mark.parametrize("flag", ["--help", "--model.loss.help", "--data.train.help"])
def test_help_explains_keys_without_naming_classes(flag, capsys):
    with pytest.raises(SystemExit):
        main(["fit", flag])
    shown = capsys.readouterr().out
    assert "see `" not in shown
    assert "subclasses" not in shown
    assert 20 < shown.count("\n") < 230
    if flag == "--help":
        assert "--trainer.max_steps MAX_STEPS\n" in shown
        assert "--model.loss.help" in shown


def test_an_unknown_key_in_the_file_names_the_nearest(data, tmp_path, capsys):
    values = recipe(data)
    values["model"]["temprature"] = 1
    values["model"]["lay_out"] = values["model"].pop("layout")
    assert main(["fit", "--config", write_recipe(tmp_path, values)]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_yaml_object_tags_are_refused(data, tmp_path, capsys):
    file = tmp_path / "evil.yaml"
    file.write_text(f"run: !!python/object/apply:os.system ['touch {tmp_path}/owned']\n")
    assert main(["fit", "--config", str(file)]) == 2
    assert "tag" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_a_checkpoint_that_unpickles_objects_is_refused(data, tmp_path, capsys):
    file = tmp_path / "evil.ckpt"
    torch.save({"state_dict": {}, "x": Path("anything")}, file)
    recipe_file = write_recipe(
        tmp_path, recipe(data) | {"run": {"name": "x", "folder": str(tmp_path)}}
    )
    assert main(["fit", "--config", recipe_file, "--ckpt_path", str(file)]) == 2
    assert "evil.ckpt" in capsys.readouterr().err


def test_pools_lists_and_grades_are_validated_side_by_side_and_tested_whole(data, tmp_path):
    with RetrievalSetWriter(tmp_path / "lists", "lists") as writer:
        for i in range(6):
            writer.add_candidate(Item(image=tiny.picture(i), id=f"p{i}"))
        for i in range(3):
            writer.add_query(Item(tiny.text(i), id=f"q{i}"))
            writer.judge(f"q{i}", f"p{i}", 1 + i)
            writer.list_candidates(f"q{i}", [f"p{i}", "p4", "p5"])
    values = recipe(data)
    values["run"]["folder"] = str(tmp_path / "runs")
    del values["data"]["test"]
    values["data"]["val"] = [
        {"path": str(data / "test"), "max_queries": 4},
        {"path": str(tmp_path / "lists"), "max_queries": 2, "max_candidates": 2},
    ]
    values["trainer"] |= {"max_steps": 1, "val_check_interval": 1}
    file = write_recipe(tmp_path, values)
    assert main(["fit", "--config", file, "--model.headline=lists/ndcg@5/1x1"]) == 0
    best = torch.load(tmp_path / "runs/tiny/checkpoints/best.ckpt", weights_only=True)
    (kept,) = [state for name, state in best["callbacks"].items() if "headline" in name]
    # Two candidates a query, one of them right: it ranks first or second.
    assert any(
        float(kept["best_model_score"]) == pytest.approx(mean)
        for mean in (1, 1 / math.log2(3), (1 + 1 / math.log2(3)) / 2)
    )
    metrics = json.loads((tmp_path / "runs/tiny/report/metrics.json").read_text())
    assert metrics["test/lists/recall@5/1x1"] == 1  # each searches three candidates alone
    page = (tmp_path / "runs/tiny/report/report.md").read_text()
    assert "| test | recall@1 | 12 |" in page
    assert "| lists | recall@1 | 3 |" in page


def test_a_headline_that_is_no_metric_is_refused_before_the_first_step(data, tmp_path, capsys):
    values = recipe(data)
    values["run"]["folder"] = str(tmp_path / "runs")
    file = write_recipe(tmp_path, values)
    assert main(["fit", "--config", file, "--model.headline=ndcg@7"]) == 2
    assert "no metric 'ndcg@7'" in capsys.readouterr().err
    assert not (tmp_path / "runs/tiny/checkpoints").exists()
