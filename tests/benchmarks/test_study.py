"""The study of settings: tables by hand from made results, and a small one that is really run."""

import json
import shutil
import sys
from pathlib import Path

import pytest

import tiny_run
from metaembed_pl.cli.main import main

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def study():
    sys.path.insert(0, str(FOLDER))
    import study

    yield study
    sys.path.remove(str(FOLDER))


def made(out: Path, name: str, groups: list[str], sets: list[dict], width: int = 128) -> None:
    """Runs of a setting as they are kept, one for each seed."""
    for seed, values in enumerate(sets):
        folder = out / f"{name}-{seed}"
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "metaembed.json").write_text(
            json.dumps({"groups": groups, "width": width})
        )
        kept = {"setting": name, "seed": seed, "cpu_min": 8.0, "sets": values}
        (folder / "study.json").write_text(json.dumps(kept))


def printed(study, monkeypatch, capsys, *flags) -> str:
    monkeypatch.setattr(sys, "argv", ["study.py", *map(str, flags)])
    study.main()
    return capsys.readouterr().out


def test_the_readmes_tables_are_those_of_the_finished_runs(study, tmp_path, monkeypatch, capsys):
    today = [
        {"emoji_t2i": {"1x1": a, "2x4": b, "summed": 0.9}, "emoji_scene": {"1x1": 0.4, "2x4": 0.8}}
        for a, b in [(0.60, 0.5), (0.62, 0.5), (0.64, 0.5)]
    ]
    made(tmp_path, "today", ["1x1", "2x4"], today)
    made(tmp_path, "today_else", ["1x1", "2x4"], today)
    (tmp_path / "today-3").mkdir()  # is not finished
    made(tmp_path, "emoji_single", ["1x1"], [{"emoji_t2i": {"1x1": 0.3}}])
    made(tmp_path, "emoji_full", ["1x1", "16x64"], [{"emoji_edit": {"1x1": 0.25, "16x64": 0.5}}])
    # Standard deviation .02, of three: 4.303 * .02 / sqrt(3) = .050.
    assert printed(study, monkeypatch, capsys, "--readme", "--out", tmp_path) == (
        "| recall@1, held out | 1x1 | 2x4 | one vector |\n"
        "|---|---|---|---|\n"
        "| name -> picture | 0.620 ± 0.050 | 0.500 ± 0.000 | 0.300 |\n"
        "| scene, one thing | 0.400 ± 0.000 | 0.800 ± 0.000 |  |\n"
        "| bytes a candidate, bf16 | 256 | 1,024 | 256 |\n"
        "\n"
        "Mean and 95 % interval over 3 seeds (one vector: 1).\n"
        "\n"
        "| recall@1, held out | 1x1 | 16x64 |\n"
        "|---|---|---|\n"
        "| picture + edit -> picture | 0.250 | 0.500 |\n"
        "| bytes a candidate, bf16 | 256 | 16,384 |\n"
        "\n"
        "One seed.\n"
    )
    with pytest.raises(SystemExit, match="no run of `today` is finished"):
        printed(study, monkeypatch, capsys, "--readme", "--out", tmp_path / "nowhere")


def test_the_overview_shows_each_setting_at_its_largest_group(study, tmp_path, monkeypatch, capsys):
    alike = {"cosine of queries": 0.25}
    made(tmp_path, "today", ["1x1", "2x4"], [{"s": {"1x1": 0.1, "2x4": 0.5, **alike}}])
    made(tmp_path, "emoji_single", ["1x1"], [{"s": {"1x1": 0.3}}])
    runs = {name: study.finished(tmp_path, name) for name in ("today", "emoji_single")}
    assert study.overview(runs).splitlines() == [
        "| setting | seeds | CPU min | s | cosine of queries |",
        "|---|---|---|---|---|",
        "| today | 1 | 8.0 | 0.500 | 0.250 |",
        "| emoji_single | 1 | 8.0 | 0.300 |  |",
    ]


def test_a_quarter_of_the_bytes_is_a_share_of_the_whole_ones_recall(study, tmp_path):
    forms = {
        "2x4 projected to 32": 0.4,
        "2x4x64": 0.4,
        "2x4x32": 0.2,
        "2x4 int8": 0.4,
        "2x4x64 int8": 0.3,
        "2x4 bits": 0.1,
    }
    sets = [{"s": {"2x4": whole, **forms}} for whole in (0.4, 0.5)]
    made(tmp_path, "today", ["1x1", "2x4"], sets)
    made(tmp_path, "nothing", ["2x4"], [{"s": {"2x4": 0.0, **forms}}])
    runs = {name: study.finished(tmp_path, name) for name in ("today", "nothing")}
    lines = study.shares(runs).splitlines()
    assert lines[0] == "a quarter of the bytes: share of the recall kept"
    # .5 and .4 of it, for instance: 12.706 * .0707 / sqrt(2) = .635.
    assert lines[4:] == [
        "| today | 2x4x32 | 256 | 0.25 | 0.450 ± 0.635 |",
        "| today | 2x4x64 int8 | 272 | 0.27 | 0.675 ± 0.953 |",
        "| today | 2x4 bits | 64 | 0.06 | 0.225 ± 0.318 |",
        "| today | 2x4 projected to 32 | 256 | 0.25 | 0.900 ± 1.271 |",
    ]


def test_says_before_training_which_data_are_not_there(study, tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    settings = {"plain": None, "single": {"recipe": "recipes/emoji_single.yaml"}}
    described = {
        "recipe": "recipes/emoji.yaml",
        "test": [str(tmp_path / "emoji_scene_two")],
        "settings": {**settings, "own": {"data": {"train": [{"path": str(tmp_path)}]}}},
    }
    with pytest.raises(SystemExit, match=r"not there: .*/emoji_scene_two; make them with python"):
        study.refuse_missing_data(described, ["own"])
    described["test"] = []
    study.refuse_missing_data(described, ["own"])
    described["settings"]["own"]["test"] = [str(tmp_path / "elsewhere")]
    with pytest.raises(SystemExit, match="/elsewhere; make them"):
        study.refuse_missing_data(described, ["own"])


def test_a_setting_is_taught_by_another_one_of_the_same_seed(study, tmp_path):
    data = tiny_run.data(tmp_path)
    recipe = tiny_run.recipe(data, tmp_path, trainer__max_steps=1, data__val=[], data__test=[])
    assert main(["fit", "--config", str(recipe)]) == 0
    out = tmp_path / "study"
    made(out, "plain", ["1x1", "2x4"], [{}])
    shutil.rmtree(out / "plain-0" / "model")
    shutil.copytree(tmp_path / "runs" / "r" / "model", out / "plain-0" / "model")
    described = {
        "recipe": str(recipe),
        "test": [str(data / "test")],
        "settings": {
            "plain": None,
            "taught": {"taught_by": "plain", "model": {"loss": {"teacher": {"weight": 2.0}}}},
        },
    }
    found = study.run(described, "taught", 0, out)
    assert (found["seed"], found["groups"], found["width"]) == (0, ["1x1", "2x4"], 32)
    config = (out / "taught-0" / "config.fit.yaml").read_text()
    assert f"model: {out}/plain-0/model" in config
    assert "weight: 2.0" in config
    (values,) = found["sets"].values()
    assert {"1x1", "2x4", "1x4", "summed", "2x4 int8"} <= values.keys()
    assert study.run(described, "taught", 0, out) == found, "what is finished is kept"
