"""A search over settings: real runs of a tiny recipe, in a study that Optuna made before."""

import json
import shlex
import sys
from datetime import date

import pytest
import yaml

import tiny_run
from metaembed_pl.cli import tune as tune_module
from metaembed_pl.cli.main import main
from metaembed_pl.cli.tune_space import read_space

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
    assert tune(tmp_path, long, "--trials", "6", "--prune-from", "1") == 0
    said = capfd.readouterr().out
    assert f"trial-{cut_off.number}: model.optimizer.lr 0.002, " in said
    assert "stopped at step 1, " in said  # no recall is above 2
    best = "best of 6: trial-0, 2.0000: model.optimizer.lr 0.001, model.loss.query_spread null"
    assert best in said.splitlines()
    config = yaml.safe_load((tmp_path / f"tune/trial-{cut_off.number}/config.fit.yaml").read_text())
    assert config["model"]["optimizer"]["lr"] == 2e-3
    assert config["model"]["loss"]["query_spread"] == {"weight": 3.0, "margin": 0.5}

    short = tiny_run.recipe(
        data, tmp_path / "short", trainer__max_steps=1, trainer__val_check_interval=1
    )
    assert tune(tmp_path, short, "--trials", "7", "--no-pruning") == 0
    (last,) = (t for t in study(tmp_path).trials if t.state.name == "COMPLETE" and t.value < 2)
    assert last.user_attrs["run"] == "trial-6"  # the one that was cut off kept its number
    run = tmp_path / "tune" / last.user_attrs["run"]
    said = json.loads((run / "headlines.jsonl").read_text())
    assert said == {"step": 1, "headline": last.value}
    assert (run / "model" / "metaembed.json").exists()


def test_the_best_settings_are_a_recipe_that_the_printed_command_trains_with(
    data, tmp_path, capsys, monkeypatch
):
    pruner: dict[str, int] = {}
    monkeypatch.setattr(optuna.pruners, "MedianPruner", lambda **given: pruner.update(given))
    recipe = tiny_run.recipe(data, tmp_path / "r", trainer__val_check_interval=1)
    choices = {"model.optimizer.lr": 1e-3, "model.loss.query_spread": BOTH}
    for value in (0.5, 0.25):
        trial = optuna.create_trial(params=choices, distributions=distributions(), value=value)
        study(tmp_path).add_trial(trial)
        choices = {"model.optimizer.lr": 2e-3, "model.loss.query_spread": "null"}
    (tmp_path / "tune/trial-0/model").mkdir(parents=True)
    assert tune(tmp_path, recipe, "--trainer.max_steps=3", "--trials", "2") == 0
    assert pruner == {"n_warmup_steps": 1}, "a third of the steps"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("best of 2: trial-0, 0.5000: model.optimizer.lr 0.001, ")
    assert lines[1] == f"its model: {tmp_path / 'tune/trial-0/model'}"
    words = shlex.split(lines[2].removeprefix("train with its settings: "))
    assert words[:4] == ["python", "-m", "metaembed_pl", "fit"]
    with pytest.raises(SystemExit):
        main([*words[3:], "--print_config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["model"]["optimizer"]["lr"] == 1e-3
    assert config["model"]["loss"]["query_spread"] == {"weight": 3.0, "margin": 0.5}
    assert config["trainer"]["max_steps"] == 3
    assert config["run"]["name"] == "tuned", "the recipe's own run may exist"
    assert config["model"]["groups"] == ["1x1", "2x4"], "the recipe's other keys stay"


@pytest.mark.parametrize(
    ("space", "changes", "message"),
    [
        (
            {"model.optimizer.lrr": [1.0, 2.0]},
            {},
            "model.optimizer.lrr: no such key; did you mean 'lr'?",
        ),
        (
            {"data.global_batch_size": {"low": 8, "high": 16.5}},
            {},
            "data.global_batch_size: expected an integer, got 16.5",
        ),
        (
            {"model.loss.quantization": [None, {"bits": 8}, {"bits": 3}]},
            {},
            "model.loss.quantization.bits is 8 or 1, got 3",
        ),
        (
            {"trainer.max_steps": [6, 2000]},
            {"trainer__val_check_interval": 1000},
            "trainer.val_check_interval: 1000 is above trainer.max_steps, 6",
        ),
        (SPACE, {"data__val": []}, "data.val: tune compares trials on validation sets"),
        (SPACE, {"model__lay_out": "own"}, "model.lay_out: no such key; did you mean 'layout'?"),
    ],
)
def test_what_fit_would_refuse_in_a_trial_is_refused_before_the_first(
    data, tmp_path, capsys, space, changes, message
):
    recipe = tiny_run.recipe(data, tmp_path / "r", trainer__val_check_interval=1)
    if changes:
        recipe = tiny_run.recipe(data, tmp_path / "r", **changes)
    assert tune(tmp_path, recipe, space=space) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    is_of_space = space is not SPACE and "trainer.max_steps" not in space
    assert ("space.yaml: " in line) == is_of_space
    assert not (tmp_path / "tune").exists()


def test_a_trial_that_fails_stops_the_search_with_its_last_line(data, tmp_path, capsys):
    recipe = tiny_run.recipe(data, tmp_path / "r", trainer__val_check_interval=1)
    space = {"data.train": [[{"path": "no/where"}], [{"path": "nor/here"}]]}
    assert tune(tmp_path, recipe, space=space) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "fit ended with status 2; its last line: metaembed-pl: data.train: 1 of 1 fold" in last


RANGE = {"low": 1, "high": 4}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "must map keys of a recipe to their values"),
        ({"a": 1}, "a: expected a list of choices, or a range such as {low: 1, high: 4}, got 1"),
        ({"a": []}, "a: expected at least two choices, or a range"),
        ({"a": [1]}, "a: expected at least two choices, or a range"),
        ({"a": [1, 2, 1]}, "a: a choice occurs twice"),
        ({"a": [date(2026, 1, 1), 1]}, "a: choices are numbers, texts, true, false, null"),
        ({"a": {"low": 1}}, "a: a range needs numbers for low and high"),
        ({"a": RANGE | {"high": "x"}}, "a: a range needs numbers for low and high"),
        ({"a": RANGE | {"high": float("inf")}}, "a: a range needs numbers for low and high"),
        ({"a": RANGE | {"step": "x"}}, "a: a range needs numbers for low and high"),
        ({"a": {"low": 2, "high": 1}}, "a: low must be below high"),
        ({"a": {"low": 0, "high": 1, "log": True}}, "a: a range with log: true needs low above 0"),
        ({"a": RANGE | {"log": True, "step": 1}}, "log: true needs low above 0, and has no step"),
        ({"a": RANGE | {"log": "maybe"}}, "a: log is true or false"),
        ({"a": RANGE | {"step": 0}}, "a: step must be above 0, and at most high - low"),
        ({"a": RANGE | {"step": 4}}, "a: step must be above 0, and at most high - low"),
        ({"a": RANGE | {"step": 1.5}}, "a: step must be an integer if low and high are"),
        ({"a": RANGE | {"steps": 1}}, "and no 'steps'; did you mean 'step'?"),
        ({"run.name": ["a", "b"]}, "run.name: it cannot be searched, because each trial has its"),
        ({"data.val": [[], [1]]}, "data.val: it cannot be searched, because trials are compared"),
        ({"a": RANGE, "a.b": RANGE}, "a.b is part of a: search one of them"),
    ],
)
def test_a_space_that_is_none_is_one_line(tmp_path, capsys, space, message):
    assert tune(tmp_path, "emoji", space=space) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_numbers_with_an_exponent_are_numbers(tmp_path):
    # YAML reads 1e-3 as a text: it asks for a dot and a sign.
    file = tmp_path / "space.yaml"
    file.write_text("a: {low: 1e-4, high: 1.0e-3}\nb: [1e-3, 2E3, x1e-3]\n")
    found = read_space(file)
    assert found == {"a": {"low": 1e-4, "high": 1e-3}, "b": [1e-3, 2000.0, "x1e-3"]}


def test_no_space_and_no_trials_are_one_line(tmp_path, capsys):
    command = ["tune", "--config", "emoji", "--space", str(tmp_path / "none.yaml")]
    assert main(command) == 2
    assert f"there is no {tmp_path / 'none.yaml'}: --space names" in capsys.readouterr().err
    assert main([*command, "--trials", "0"]) == 2
    assert "--trials must be at least 1, got 0" in capsys.readouterr().err


def test_a_study_of_other_choices_or_none_at_all_is_refused(data, tmp_path, capsys):
    recipe = tiny_run.recipe(data, tmp_path / "r", trainer__val_check_interval=1)
    good = {"model.optimizer.lr": 1e-3, "model.loss.query_spread": "null"}
    before = study(tmp_path)
    before.add_trial(optuna.create_trial(params=good, distributions=distributions(), value=1.0))
    space = {"model.loss.query_spread": [None, {"weight": 4.0}]}
    assert tune(tmp_path, recipe, space=space) == 2
    said = "space.yaml: model.loss.query_spread has other choices than in the trials of "
    assert said in capsys.readouterr().err
    (tmp_path / "tune/study.db").write_text("not a database " * 100)
    assert tune(tmp_path, recipe) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "study.db cannot be read as a study" in line


def test_an_interrupted_study_says_how_to_go_on(data, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(tune_module, "_try", interrupted)
    recipe = tiny_run.recipe(data, tmp_path / "r", trainer__val_check_interval=1)
    assert tune(tmp_path, recipe) == 130
    assert "the same command continues the study" in capsys.readouterr().err


def test_without_optuna_says_how_to_get_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    assert tune(tmp_path, "emoji") == 2
    assert "pip install metaembed-pl[tune]" in capsys.readouterr().err
