"""The study of settings: tables by hand from made results, and a small one that is really run."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml

import tiny_run
from metaembed_pl.cli.main import main

FOLDER = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module", autouse=True)
def benchmarks_on_the_path():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def study(benchmarks_on_the_path):
    import study

    return study


@pytest.fixture(scope="module")
def study_tables(benchmarks_on_the_path):
    import _study_tables

    return _study_tables


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


def written(study, monkeypatch, *flags) -> None:
    monkeypatch.setattr(sys, "argv", ["study.py", "--write", *map(str, flags)])
    study.main()


def test_writes_the_tables_of_the_finished_runs_into_the_pages(
    study, study_tables, tmp_path, monkeypatch, capsys
):
    out, root = tmp_path / "runs", tmp_path / "house"
    today = [
        {"emoji_t2i": {"1x1": a, "2x4": b, "summed": 0.9}, "emoji_scene": {"1x1": 0.4, "2x4": 0.8}}
        for a, b in [(0.60, 0.5), (0.62, 0.5), (0.64, 0.5)]
    ]
    made(out, "today", ["1x1", "2x4"], today)
    made(out, "today_else", ["1x1", "2x4"], today)
    (out / "today-3").mkdir()  # is not finished
    made(out, "emoji_single", ["1x1"], [{"emoji_t2i": {"1x1": 0.3}}])
    made(out, "emoji_full", ["1x1", "16x64"], [{"emoji_edit": {"1x1": 0.25, "16x64": 0.5}}])
    (root / "docs").mkdir(parents=True)
    (root / "benchmarks").mkdir()
    shutil.copy(FOLDER / "study.yaml", root / "benchmarks" / "study.yaml")
    (root / "README.md").write_text("A\n<!-- study: quickstart -->\nold\n<!-- end -->\nB\n")
    (root / "docs" / "study.md").write_text("<!-- study: full -->\n<!-- end -->\n")
    monkeypatch.setattr(study, "STUDY", root / "benchmarks" / "study.yaml")
    saved = {}
    monkeypatch.setattr(study, "save", lambda kind, result: saved.update({kind: result}))
    written(study, monkeypatch, "--out", out)
    # Standard deviation .02, of three: 4.303 * .02 / sqrt(3) = .050.
    assert (root / "README.md").read_text() == (
        "A\n"
        "<!-- study: quickstart -->\n\n"
        "| recall@1, held out | 1x1 | 2x4 | one vector |\n"
        "|---|---|---|---|\n"
        "| name -> picture | .620 ± .050 | .500 ± .000 | .300 |\n"
        "| scene, one thing | .400 ± .000 | .800 ± .000 |  |\n"
        "| bytes a candidate, bf16 | 256 | 1,024 | 256 |\n"
        "\n"
        "Mean and 95 % interval over 3 seeds (one vector: 1).\n\n"
        "<!-- end -->\n"
        "B\n"
    )
    assert (root / "docs" / "study.md").read_text() == (
        "<!-- study: full -->\n\n"
        "| recall@1, held out | 1x1 | 16x64 |\n"
        "|---|---|---|\n"
        "| picture + edit -> picture | .250 | .500 |\n"
        "| bytes a candidate, bf16 | 256 | 16,384 |\n"
        "\n"
        "One seed.\n\n"
        "<!-- end -->\n"
    )
    assert [one["seed"] for one in saved["study"]["runs"]["today"]] == [0, 1, 2]
    assert "| recall@1, held out | 1x1 | 16x64 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match=r"README.md shows the table `quickstart`, and none"):
        written(study, monkeypatch, "--out", tmp_path / "nowhere")


def test_the_pages_show_the_saved_runs(study, study_tables):
    """README.md, docs/study.md and the recipes, from benchmarks/results alone."""
    root = FOLDER.parent
    described = yaml.safe_load((FOLDER / "study.yaml").read_text())
    (file,) = (FOLDER / "results").glob("study-*.json")
    runs = {name: [] for name in described["settings"]}
    runs |= json.loads(file.read_text())["runs"]
    assert runs.keys() == described["settings"].keys()
    made = study_tables.tables(described, runs)
    for page in study_tables.PAGES:
        text = (root / page).read_text()
        assert "<!-- study: " in text
        assert study_tables.with_tables(text, made, page) == text
    for name, recipe in {"today": "emoji", "emoji_single": "emoji_single"}.items():
        verified = (root / "recipes" / f"{recipe}.yaml").read_text()
        for dataset in ("emoji_t2i", "emoji_i2t", "emoji_scene", "emoji_scene_two"):
            values = [one["sets"][dataset][one["groups"][-1]] for one in runs[name]]
            assert f" {sum(values) / len(values):.3f}" in verified, (recipe, dataset)
    readme = (root / "README.md").read_text()
    for column in ("1x16", "summed", "8x16"):
        values = [one["sets"]["emoji_scene_two"][column] for one in runs["today"]]
        assert f" {sum(values) / len(values):.3f}".replace("0.", ".") in readme, column


def test_settings_are_compared_at_their_largest_groups(study, study_tables, tmp_path):
    alike = {"cosine of queries": 0.25}
    two = {"1x1": 0.1, "2x4": 0.5, "summed": 0.2, "2x4x64": 0.9, **alike}
    made(tmp_path, "today", ["1x1", "2x4"], [{"emoji_scene_two": two}])
    made(tmp_path, "single", ["1x1"], [{"emoji_scene_two": {"1x1": 0.3}}])
    described = {
        "bytes": [],
        "settings": {
            "today": {"about": "as it is"},
            "single": {"about": "one", "over": "today"},
            "missing": {"about": "no run"},
        },
    }
    runs = {name: study.finished(tmp_path, name) for name in described["settings"]}
    tables = study_tables.tables(described, runs)
    assert tables.keys() == {"recipes", "options", "budgets", "quickstart"}
    head = ["| setting | seeds | two things | query cosine | CPU min |", "|---|---|---|---|---|"]
    rows = [
        "| `today`: as it is | 1 | .500 | .250 | 8.0 |",
        "| `single`: one | 1 | .300 |  | 8.0 |",
    ]
    assert tables["recipes"].splitlines() == [*head, rows[0]]
    assert tables["options"].splitlines() == [*head, *rows]
    assert tables["budgets"].splitlines() == [
        "| setting | 1x1 | 2x4 | summed |",
        "|---|---|---|---|",
        "| `today` | .100 | .500 | .200 |",
        "| `single` | .300 |  |  |",
    ]


def test_a_quarter_of_the_bytes_is_a_share_of_the_whole_ones_recall(study, study_tables, tmp_path):
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
    assert study_tables.bytes_table(runs).splitlines() == [
        "| setting | candidates | bytes | of bf16 | s |",
        "|---|---|---|---|---|",
        "| `today` | projected to 32 | 256 | .25 | .900 |",
        "| `today` | first 64, int8 | 272 | .27 | .675 |",
        "| `today` | first 32 | 256 | .25 | .450 |",
        "| `today` | bits | 64 | .06 | .225 |",
    ]


def test_a_setting_is_laid_over_another_one(study):
    below = {"about": "a", "recipe": "r.yaml", "data": {"train": [1, 2], "seed": 3}}
    above = {"about": "b", "over": "below", "data": {"train": [4]}, "model": {"widths": [32]}}
    assert study.described({"settings": {"below": below, "above": above}}, "above") == {
        "recipe": "r.yaml",
        "data": {"train": [4], "seed": 3},
        "model": {"widths": [32]},
    }


def test_says_before_training_which_data_are_not_there(study, tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    settings = {"plain": {"about": "it"}, "single": {"recipe": "recipes/emoji_single.yaml"}}
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
            "plain": {"about": "as it is"},
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
