"""Stopping and going on: signals, changed settings, nothing to do, two runs of one name."""

import os
import shutil
import signal
import time

import pytest
import torch
import yaml

import faults
import tiny_run
from metaembed_pl.cli.main import main
from ranks import command_line

# A copy of a run is another folder.
pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_run.data(tmp_path_factory.mktemp("data"))


def read(folder):
    return torch.load(folder / "runs/r/checkpoints/last.ckpt", weights_only=True)


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A whole run of six steps."""
    folder = tmp_path_factory.mktemp("finished")
    assert main(["fit", "--config", str(tiny_run.recipe(root, folder))]) == 0
    return folder


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        (signal.SIGUSR1, 138),
        (signal.SIGHUP, 129),
    ],
)
def test_a_signal_leaves_a_checkpoint_and_its_exit_status(root, tmp_path, number, status):
    file = tiny_run.recipe(root, tmp_path, trainer__max_steps=100_000)
    [(found, said)] = tiny_run.signalled(tiny_run.started(file), number, "step 3 of")
    assert found == status, said
    step = read(tmp_path)["global_step"]
    assert 3 <= step < 100_000
    assert (
        f"stopped by {number.name}; {tmp_path}/runs/r/checkpoints/last.ckpt of step {step} is"
        in said
    )
    assert "Traceback" not in said
    assert not (tmp_path / "runs/r/model").exists()


def test_a_search_over_settings_that_is_stopped_stops_its_trial(root, tmp_path):
    pytest.importorskip("optuna")
    file = tiny_run.recipe(root, tmp_path, trainer__max_steps=100_000)
    (tmp_path / "space.yaml").write_text("model.optimizer.lr: [1.0e-3, 2.0e-3]\n")
    flags = ["--space", str(tmp_path / "space.yaml"), "--out", str(tmp_path / "tune")]
    tune = command_line(1, tmp_path / "said", "tune", "--config", str(file), *flags)
    log = tmp_path / "tune" / "trial-0" / "tune.log"
    for _ in range(2000):
        if log.exists() and "step 3 of" in log.read_text():
            break
        time.sleep(0.1)
    os.kill(tune.processes[0].pid, signal.SIGTERM)
    [(status, said)] = tune.end()
    assert status == 143, said
    assert "metaembed-pl: stopped by SIGTERM\nthe same command continues the study" in said
    assert "last.ckpt of step" in log.read_text().splitlines()[-1], "the trial has ended, too"
    assert "Traceback" not in said


def test_all_ranks_stop_at_the_same_step(root, tmp_path):
    changes = {"trainer__devices": 2, "trainer__strategy": "ddp", "trainer__max_steps": 100_000}
    run = tiny_run.started(tiny_run.recipe(root, tmp_path, **changes), count=2)
    ends = tiny_run.signalled(run, signal.SIGTERM, "step 3 of")
    assert [status for status, _ in ends] == [143, 143], ends
    assert sum("is saved: resume" in said for _, said in ends) == 1


def test_what_was_stopped_goes_on_to_the_same_weights(root, tmp_path, finished):
    """Stopped after its second step and, later, in the middle of a validation."""
    file = tiny_run.recipe(root, tmp_path, trainer__val_check_interval=4, data__eval_batch_size=4)
    stops = [("on_train_batch_end", 2), ("on_validation_batch_end", 4)]
    for number, (hook, step) in enumerate(stops):
        resume = ["--ckpt_path", "last"] * bool(number)
        run = command_line(
            1,
            tmp_path / f"said{number}",
            "fit",
            "--config",
            str(file),
            *resume,
            first=faults.STOPS[hook],
        )
        [(status, said)] = run.end()
        assert status == 143, said
        assert read(tmp_path)["global_step"] == step
    assert main(["fit", "--config", str(file), "--ckpt_path", "last"]) == 0
    for name, tensor in read(finished)["state_dict"].items():
        assert torch.equal(tensor, read(tmp_path)["state_dict"][name]), name


def test_another_rate_is_used_and_told(root, tmp_path, finished, caplog):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    file = tiny_run.recipe(
        root,
        tmp_path,
        trainer__max_steps=8,
        model__optimizer={
            "lr": 1e-5,
            "weight_decay": 0.5,
            "schedule": "constant_with_warmup",
            "warmup": 0.0,
        },
    )
    before = read(tmp_path)["state_dict"]
    assert main(["fit", "--config", str(file), "--ckpt_path", "last"]) == 0
    after = read(tmp_path)
    groups = after["optimizer_states"][0]["param_groups"]
    assert {group["lr"] for group in groups} == {1e-5}
    assert groups[0]["weight_decay"] == 0.5
    name = "embedder.meta_tokens.embedding.weight"
    moved = (after["state_dict"][name] - before[name]).abs().max()
    assert 1e-6 < moved < 1e-4  # two steps of 1e-5 and not of 1e-3
    assert "model.optimizer.lr was 0.001; from step 7 on it is 1e-05" in caplog.text
    assert "trainer.max_steps was 6" in caplog.text
    assert (
        yaml.safe_load((tmp_path / "runs/r/config.fit.yaml").read_text())["trainer"]["max_steps"]
        == 8
    )


@pytest.mark.parametrize(
    ("flag", "key"),
    [
        ("--model.layout=both", "model.layout"),
        ("--model.projection=16", "model.projection"),
        ("--model.optimizer.muon_lr=1e-3", "model.optimizer.muon_lr"),
        ("--model.train_vision=false", "model.train_vision"),
        ("--model.lora={r: 4}", "model.lora"),
    ],
)
def test_what_cannot_change_is_refused_by_name(root, tmp_path, finished, capsys, flag, key):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    file = tiny_run.recipe(root, tmp_path, trainer__max_steps=8)
    config = (tmp_path / "runs/r/config.fit.yaml").read_bytes()
    assert main(["fit", "--config", str(file), "--ckpt_path", "last", flag]) == 2
    assert f"{key}" in capsys.readouterr().err.splitlines()[-1]
    assert (tmp_path / "runs/r/config.fit.yaml").read_bytes() == config


@pytest.mark.parametrize("max_steps", [5, 6])
def test_nothing_to_train_is_said_and_nothing_written(root, tmp_path, finished, capsys, max_steps):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*")}
    file = tiny_run.recipe(root, tmp_path, trainer__max_steps=max_steps)
    assert main(["fit", "--config", str(file), "--ckpt_path", "last"]) == 2
    said = capsys.readouterr().err
    assert f"the run is already at step 6; trainer.max_steps is {max_steps}: nothing" in said
    now = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").rglob("*")}
    assert {f: t for f, t in now.items() if f.is_file() and f.name != ".lock"} == {
        f: t for f, t in kept.items() if f.is_file() and f.name != ".lock"
    }


def test_what_was_killed_after_its_last_step_is_completed(root, tmp_path, finished):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/r/model")
    file = tiny_run.recipe(root, tmp_path)
    assert main(["fit", "--config", str(file), "--ckpt_path", "last"]) == 0
    assert (tmp_path / "runs/r/model/metaembed.json").exists()


def test_the_second_of_one_name_is_refused_and_a_killed_one_is_taken_over(root, tmp_path, capsys):
    file = tiny_run.recipe(root, tmp_path, trainer__max_steps=100_000)
    first = tiny_run.started(file)
    tiny_run.wait_for(first, "step 1 of")
    assert main(["fit", "--config", str(file)]) == 2
    said = capsys.readouterr().err
    assert (
        f"another process trains into {tmp_path}/runs/r (process {first.processes[0].pid} on"
        in said
    )
    first.kill()
    first.end()
    assert (tmp_path / "runs/r/.lock").exists()
    assert main(["fit", "--config", str(file), "--trainer.max_steps=1"]) == 0


def test_predict_is_not_offered(capsys):
    with pytest.raises(SystemExit) as refused:
        main(["predict", "--config", "emoji"])
    assert refused.value.code == 2
    assert "invalid choice: 'predict'" in capsys.readouterr().err


def test_a_recipe_for_gpus_says_in_one_line_that_there_is_none(root, tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    file = tiny_run.recipe(root, tmp_path, trainer__accelerator="gpu")
    assert main(["fit", "--config", str(file)]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert "gpu" in said[-1].lower()
    assert "Traceback" not in "".join(said)
