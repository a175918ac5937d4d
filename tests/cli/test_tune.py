"""A search over settings: real runs of a tiny recipe, in a study that Optuna made before."""

import json
import sys

import pytest
import yaml

import tiny_run
from metaembed_pl.cli.main import main

optuna = pytest.importorskip("optuna")
optuna.logging.set_verbosity(optuna.logging.WARNING)
SPACE = {
    "model.optimizer.lr": {"low": 1e-5, "high": 1e-2, "log": True},
    "model.loss.query_spread": [None, {"weight": 3.0}],
}
BOTH = json.dumps({"weight": 3.0})


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny_run.data(tmp_path_factory.mktemp("data"))


def tune(folder, recipe, *options, space=SPACE):
    (folder / "space.yaml").write_text(yaml.safe_dump(space, sort_keys=False))
    command = ["tune", "--config", str(recipe), "--space", str(folder / "space.yaml")]
    return main([*command, "--out", str(folder / "tune"), *options])


def study(folder):
    (folder / "tune").mkdir(exist_ok=True)
    storage = f"sqlite:///{folder / 'tune/study.db'}"
    return optuna.create_study(
        storage=storage, study_name="tune", direction="maximize", load_if_exists=True
    )


def distributions():
    return {
        "model.optimizer.lr": optuna.distributions.FloatDistribution(1e-5, 1e-2, log=True),
        "model.loss.query_spread": optuna.distributions.CategoricalDistribution(["null", BOTH]),
    }


def test_goes_on_with_what_was_cut_off_and_stops_what_is_worse_than_the_others(
    data, tmp_path, capfd
):
    before = study(tmp_path)
    good = {"model.optimizer.lr": 1e-3, "model.loss.query_spread": "null"}
    for _ in range(5):
        before.add_trial(
            optuna.create_trial(
                params=good, distributions=distributions(), value=2.0, intermediate_values={1: 2.0}
            )
        )
    before.enqueue_trial({"model.optimizer.lr": 2e-3, "model.loss.query_spread": BOTH})
    cut_off = before.ask(distributions())  # as a kill leaves it: running for ever
    long = tiny_run.recipe(
        data, tmp_path / "long", trainer__max_steps=5000, trainer__val_check_interval=1
    )
    assert tune(tmp_path, long, "--trials", "6") == 0
    said = capfd.readouterr().out
    assert f"trial-{cut_off.number}: model.optimizer.lr 0.002, " in said
    assert "stopped at step 1, " in said  # no recall is above 2
    assert "best of 6: 2.0000, --model.optimizer.lr=0.001" in said
    config = yaml.safe_load((tmp_path / f"tune/trial-{cut_off.number}/config.fit.yaml").read_text())
    assert config["model"]["optimizer"]["lr"] == 2e-3
    assert config["model"]["loss"]["query_spread"] == {"weight": 3.0, "margin": 0.5}

    short = tiny_run.recipe(
        data, tmp_path / "short", trainer__max_steps=1, trainer__val_check_interval=1
    )
    assert tune(tmp_path, short, "--trials", "7", "--no-pruning") == 0
    (last,) = (t for t in study(tmp_path).trials if t.state.name == "COMPLETE" and t.value < 2)
    run = tmp_path / "tune" / last.user_attrs["run"]
    said = json.loads((run / "headlines.jsonl").read_text())
    assert said == {"step": 1, "headline": last.value}
    assert (run / "model" / "metaembed.json").exists()


def test_a_setting_that_cannot_be_trained_with_stops_the_search(data, tmp_path, capsys):
    recipe = tiny_run.recipe(data, tmp_path / "r")
    space = {"model.optimizer.learning_rate": [1.0, 2.0]}
    assert tune(tmp_path, recipe, space=space) == 2
    error = capsys.readouterr().err
    assert "fit ended with status 2; its last line: metaembed-pl: " in error
    assert "learning_rate" in error


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "must map keys of a recipe to their values"),
        ({"a": [1]}, "a must be a list of at least two choices or a range"),
        ({"a": {"low": 2, "high": 1}}, "a must be a list"),
        ({"a": {"low": 0, "high": 1, "log": True}}, "a must be a list"),
        ({"a": {"low": 1, "high": 2, "steps": 1}}, "got {'low': 1, 'high': 2, 'steps': 1}"),
    ],
)
def test_a_space_that_is_none_is_one_line(tmp_path, capsys, space, message):
    assert tune(tmp_path, "emoji", space=space) == 2
    assert message in capsys.readouterr().err


def test_without_optuna_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert tune(tmp_path, "emoji") == 2
    assert "pip install metaembed-pl[tune]" in capsys.readouterr().err
