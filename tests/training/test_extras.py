"""What Lightning has and a recipe may ask for: it works, or is refused in one line."""

import gc
import json
import logging

import pytest
import torch

import tiny_run
from metaembed_pl.cli import train
from metaembed_pl.cli.main import main
from metaembed_pl.errors import UserError
from metaembed_pl.training.optimizer import OptimizerConfig, build_optimizer

LIGHTNING = "lightning.pytorch"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny_run.data(tmp_path_factory.mktemp("extras"))


@pytest.fixture
def fit(root, tmp_path, monkeypatch, capsys):
    """Runs a tiny recipe with changes: its status, what it said, the run's folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.root, "handlers", [])  # each command writes to what is captured now

    def run(**changes):
        changes = {"data__val": None, "data__test": None, "trainer__max_steps": 2} | changes
        status = main(["fit", "--config", str(tiny_run.recipe(root, tmp_path, **changes))])
        return status, capsys.readouterr().err, tmp_path / "runs" / "r"

    return run


def part(kind, **settings):
    return {"class_path": f"{LIGHTNING}.{kind}", "init_args": settings}


def steps_of(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_the_learning_rate_finder_sets_the_rate_and_takes_no_step_of_the_run(fit):
    finder = part("callbacks.LearningRateFinder", num_training_steps=30, min_lr=1e-6, max_lr=1e-1)
    schedule = {"lr": 1e-3, "meta_token_lr": 1e-2, "schedule": "constant_with_warmup", "warmup": 0}
    changes = {"trainer__callbacks": [finder], "model__optimizer": schedule}
    status, told, run = fit(**changes, trainer__max_steps=6)
    assert status == 0, told
    checkpoint = steps_of(run)
    assert checkpoint["global_step"] == 6
    *weights, meta_tokens = [g["lr"] for g in checkpoint["optimizer_states"][0]["param_groups"]]
    assert len(set(weights)) == 1
    assert weights[0] != pytest.approx(1e-3)
    assert meta_tokens == pytest.approx(10 * weights[0])
    assert not list(run.glob(".lr_find*"))


# Of so few steps the profiler warns, and torch's own does not like to be thrown away.
@pytest.mark.filterwarnings("default", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_profiler_writes_what_took_time(fit, tmp_path):
    profiler = part("profilers.PyTorchProfiler", dirpath=str(tmp_path), filename="profile")
    status, told, _ = fit(trainer__profiler=profiler)
    assert status == 0, told
    assert list(tmp_path.glob("*profile*"))
    gc.collect()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"trainer__callbacks": [part("callbacks.StochasticWeightAveraging", swa_lrs=1e-3)]},
            "StochasticWeightAveraging averages over epochs",
        ),
        (
            {"trainer__callbacks": [part("callbacks.BatchSizeFinder")]},
            "BatchSizeFinder changes the batch, and with it the negatives of a query: use `check",
        ),
        (
            {"trainer__logger": part("loggers.WandbLogger")},
            "'wandb.* not met: install it, or remove it from the recipe$",
        ),
    ],
)
def test_what_does_not_work_is_refused_in_one_line(root, tmp_path, changes, message):
    recipe = tiny_run.recipe(root, tmp_path, **changes)
    with pytest.raises(UserError, match=message) as refused:
        train.run(["fit", "--config", str(recipe)])
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "runs").exists()


def test_another_logger_leaves_mlflow_on_until_it_is_turned_off(fit, tmp_path):
    pytest.importorskip("mlflow")
    logger = part("loggers.CSVLogger", save_dir=str(tmp_path / "csv"), name="own", version="v")
    own = tmp_path / "csv" / "own" / "v" / "metrics.csv"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    status, told, run = fit(trainer__logger=logger, run__mlflow_uri=uri)
    assert status == 0, told
    assert "train/loss" in own.read_text()
    assert json.loads((run / "mlflow.json").read_text())["run_id"]
    own.unlink()
    off = {"name": "off", "folder": str(tmp_path / "runs"), "mlflow_uri": None}
    status, told, run = fit(trainer__logger=logger, run=off)
    assert status == 0, told
    assert "train/loss" in own.read_text()
    assert not (run.parent / "off" / "mlflow.json").exists()


def test_the_optimiser_is_the_one_that_is_named():
    layer = torch.nn.Linear(2, 2)
    config = OptimizerConfig(kind="torch.optim.Adafactor", options={"d": 2.0}, lr=0.5)
    optimizer, _ = build_optimizer(layer, [], config, num_steps=10)
    assert type(optimizer) is torch.optim.Adafactor
    assert {group["d"] for group in optimizer.param_groups} == {2.0}
    assert "betas" not in optimizer.param_groups[0]
    usual, _ = build_optimizer(layer, [], OptimizerConfig(betas=(0.8, 0.9)), num_steps=10)
    assert type(usual) is torch.optim.AdamW
    assert usual.param_groups[0]["betas"] == (0.8, 0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "torch.optim.Adam3"}, "expected a class such as torch.optim.AdamW, got"),
        ({"kind": "no_such_package.Lion"}, "No module named 'no_such_package'"),
        ({"kind": "AdamW"}, "expected a class such as torch.optim.AdamW, got 'AdamW'"),
        ({"kind": "torch.nn.Linear"}, "torch.nn.Linear is no torch.optim.Optimizer"),
        ({"options": {"epsilon": 1}}, "torch.optim.AdamW does not take epsilon; it takes"),
    ],
)
def test_an_optimiser_that_cannot_be_is_told_in_one_line(settings, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**settings)
