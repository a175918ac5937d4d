"""The recipes: listed, printed, copied; each parses, builds on a tiny stand-in and trains."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig

import tiny
from metaembed_pl.cli.main import main
from metaembed_pl.cli.recipe_faults import read_recipe, recipe_parser
from metaembed_pl.cli.recipe_keys import made
from metaembed_pl.cli.recipes import HEAD_KEYS, copy_recipe, read_head, recipe_files
from metaembed_pl.training.objective import LossConfig, Objective, check_widths

FOLDER = Path(__file__).parents[2] / "recipes"
# What recipes share lies in these folders and is no recipe by itself.
PARTS = {"backbones", "sources"}
EVERY_YAML = sorted(FOLDER.rglob("*.yaml"))
RECIPES = [path for path in EVERY_YAML if not PARTS & set(path.relative_to(FOLDER).parts)]
PAPER = (
    "qwen3b qwen7b qwen32b llama11b paligemma3b qwen7b_single qwen3b_single qwen3b_no_mmr "
    "qwen3vl8b custom_lora emoji emoji_full emoji_single"
).split()
FAMILIES = {  # by the hub id's name
    "Qwen2.5-VL": "qwen2_5_vl",
    "Qwen3-VL": "qwen3_vl",
    "Llama-3.2": "mllama",
    "paligemma": "paligemma",
}


def by_name(path):
    return path.stem


def test_every_promised_recipe_is_there_and_found_by_the_verb():
    assert {path.stem for path in RECIPES} >= set(PAPER)
    assert [path.name for path in recipe_files()] == [path.name for path in RECIPES]


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_a_head_says_what_a_reader_must_know(path):
    head = read_head(path)
    assert head["title"]
    needed = HEAD_KEYS if not path.stem.startswith("emoji") else ("paper", "command", "hardware")
    assert not [key for key in needed if not head.get(key)]
    assert f"--config recipes/{path.name}" in head["command"]
    assert max(map(len, path.read_text().splitlines())) <= 120


def test_every_part_is_referred_to_by_a_recipe():
    text = "".join(path.read_text() for path in RECIPES)
    parts = [path.relative_to(FOLDER).as_posix() for path in EVERY_YAML if path not in RECIPES]
    assert parts
    assert not [part for part in parts if part not in text]


def test_the_papers_mix_is_all_there():
    sources = yaml.safe_load((FOLDER / "sources" / "paper.yaml").read_text())
    paths = [source["path"] for source in sources]
    assert len(set(paths)) == len(paths) == 27
    assert sum(path.startswith("data/mmeb_train/") for path in paths) == 20


def test_the_capped_mix_is_the_papers_with_a_cap_for_each_mmeb_subset():
    plain, capped = (
        yaml.safe_load((FOLDER / "sources" / f"{name}.yaml").read_text())
        for name in ("paper", "paper_capped")
    )
    caps = [source.pop("max_pairs", None) for source in capped]
    assert capped == plain
    assert all(caps[:20])
    assert not any(caps[20:])
    assert sum(caps[:20]) == 1_103_000


def test_the_list_has_one_line_a_recipe(capsys):
    assert main(["recipes"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.split() == ["recipe", "paper", "hardware", "verified"]
    assert [line.split()[0] for line in lines] == [path.stem for path in RECIPES]
    qwen = next(line for line in lines if line.startswith("qwen7b "))
    assert "MetaEmbed-7B" in qwen
    assert qwen.endswith("not yet")


def test_the_list_as_json(capsys):
    assert main(["recipes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["qwen3b"]["paper"] == "MetaEmbed-3B"


def test_a_name_prints_the_file(capsys):
    assert main(["recipes", "qwen7b"]) == 0
    assert capsys.readouterr().out == (FOLDER / "qwen7b.yaml").read_text()


def test_a_folder_called_like_a_recipe_does_not_hide_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "manuals").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["recipes", "manuals"]) == 0
    assert capsys.readouterr().out == (FOLDER / "manuals.yaml").read_text()


def test_a_value_may_go_on_in_the_next_line(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text(
        "# A title: with a colon.\n#\n# paper:  one\n#   and two\nrun: {}\n# paper: no\n"
    )
    assert read_head(file) == {"title": "A title: with a colon.", "paper": "one and two"}


def test_a_copy_has_its_own_name_and_brings_what_it_refers_to(tmp_path, capsys):
    target = tmp_path / "deep" / "mine.yaml"
    assert main(["recipes", "emoji", "--copy", str(target)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        str(target),
        str(target.parent / "backbones" / "tiny_qwen25vl.yaml"),
    ]
    copied, original = (yaml.safe_load(p.read_text()) for p in (target, FOLDER / "emoji.yaml"))
    assert copied.pop("run") == {"name": "mine"}
    original.pop("run")
    assert copied == original
    assert f"--config {target}" in target.read_text()


def test_a_copy_leaves_out_what_its_head_only_speaks_of(tmp_path):
    assert "qwen3b.yaml" in (FOLDER / "qwen3b_single.yaml").read_text()
    copied = copy_recipe(FOLDER / "qwen3b_single.yaml", tmp_path / "qwen2.5")
    assert copied == [tmp_path / "qwen2.5.yaml", tmp_path / "sources" / "paper.yaml"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qwen77b"], "no recipe at qwen77b; recipes that come with the package: custom_lora"),
        (["--copy", "x.yaml"], "--copy needs the NAME"),
        (["qwen7b", "--copy", "x", "--json"], "--json does not work with --copy"),
        (["qwen7b", "--copy", "{taken}"], "taken.yaml exists already"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(tmp_path, capsys, arguments, message):
    taken = tmp_path / "taken.yaml"
    taken.write_text("mine")
    assert main(["recipes", *(a.replace("{taken}", str(taken)) for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert taken.read_text() == "mine"


def test_a_copy_does_not_overwrite_anothers_part(tmp_path):
    part = tmp_path / "backbones" / "tiny_qwen25vl.yaml"
    part.parent.mkdir()
    part.write_text("mine")
    with pytest.raises(ValueError, match=r"tiny_qwen25vl\.yaml exists already"):
        copy_recipe(FOLDER / "emoji.yaml", tmp_path / "mine.yaml")
    assert part.read_text() == "mine"
    assert not (tmp_path / "mine.yaml").exists()


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("recipes")
    tiny.shards(root / "pairs", 12)
    tiny.embedder().save_pretrained(root / "model")
    return root


def stand_in(path: Path, data: Path, run: Path) -> Path:
    """The recipe as it stands, but for a tiny backbone of its own family and tiny shards."""
    values = yaml.safe_load(path.read_text())
    pairs = str(data / "pairs")
    values["run"] |= {"folder": str(run), "name": "tiny"}
    model = values["model"]
    if "start_from" in model:
        model["start_from"] = str(data / "model")
    elif isinstance(model["backbone"], dict):
        hub_id = model["backbone"].pop("path")
        (family,) = (family for name, family in FAMILIES.items() if name in hub_id)
        model["backbone"]["scratch"] = tiny.CONFIGS[family]
        model["backbone"].pop("max_pixels", None)
        model["backbone"]["dtype"] = "float32"
        model["backbone"]["tokenizer"] = {"vocab_size": 300, "sources": [pairs]}
    else:
        backbone = yaml.safe_load((path.parent / model["backbone"]).read_text())
        backbone["scratch"]["text_config"]["num_hidden_layers"] = 1
        backbone["tokenizer"] = {"vocab_size": 300, "sources": [pairs]}
        model["backbone"] = backbone
    sources = values["data"]["train"]
    if isinstance(sources, str):
        sources = yaml.safe_load((path.parent / sources).read_text())
    first = {k: v for k, v in sources[0].items() if k not in ("path", "weight", "first_step")}
    values["data"] |= {"train": [{**first, "path": pairs}], "global_batch_size": 4}
    values["data"] |= {"val": [], "test": [{"path": pairs, "max_queries": 4}], "num_workers": 0}
    values["trainer"] |= {"accelerator": "cpu", "devices": 1, "strategy": "auto", "max_steps": 2}
    values["trainer"] |= {"precision": "32-true", "logger": False, "log_every_n_steps": 1}
    values["trainer"].pop("val_check_interval", None)
    file = run / f"{path.stem}.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_a_recipe_trains_two_steps_on_a_tiny_stand_in_of_its_family(path, data, tmp_path):
    file = stand_in(path, data, tmp_path)
    assert main(["fit", "--config", str(file)]) == 0
    groups = yaml.safe_load(file.read_text())["model"].get("groups", ["4x8"])
    metrics = json.loads((tmp_path / "tiny" / "report" / "metrics.json").read_text())
    assert 0 <= metrics[f"test/pairs/recall@1/{groups[-1]}"] <= 1


@pytest.mark.parametrize("path", RECIPES, ids=by_name)
def test_a_recipe_parses_as_it_stands(path, tmp_path, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    recipe = read_recipe(path)
    # The model that custom_lora.yaml starts from is there once it has been trained.
    assert [f for f in recipe.faults if not f.startswith("model.start_from: runs/")] == []
    assert re.fullmatch(r"[\w]+", recipe.config.run.name)
    as_training_does = recipe_parser().parse_path(str(path))
    for part in ("run", "model", "data"):
        assert _plain(as_training_does[part]) == _plain(recipe.config[part])


def _plain(value):
    """Parsed values without the notes on which file they came from."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if hasattr(value, "as_dict"):
        value = value.as_dict()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key != "__path__"}
    return value


OPTION = re.compile(r"^  # (loss: .*)$", re.MULTILINE)
OFFERING = [path for path in RECIPES if OPTION.search(path.read_text())]


@pytest.mark.parametrize("path", OFFERING, ids=by_name)
def test_options_that_a_recipe_only_offers_are_valid_for_its_model(path):
    values = yaml.safe_load(path.read_text())["model"]
    place = FOLDER / "configs" / values["backbone"]["path"]
    width = AutoConfig.from_pretrained(place).get_text_config().hidden_size
    for line in OPTION.findall(path.read_text()):
        config = made(yaml.safe_load(line)["loss"], LossConfig, "model.loss")
        check_widths(Objective(values["groups"], config).widths, width)
        for number in re.findall(r"([\d,]+) components", line):
            assert int(number.replace(",", "")) == width


def test_the_papers_recipes_offer_options_and_train_without_them():
    names = {path.stem for path in OFFERING}
    assert names >= {"qwen3b", "qwen7b", "qwen32b", "llama11b", "paligemma3b"}
    for path in OFFERING:
        assert yaml.safe_load(path.read_text())["model"]["loss"] == {"temperature": 0.03}


def test_the_list_is_light():
    program = "import sys; from metaembed_pl.cli.main import main; main(['recipes'])"
    check = "print({'torch', 'transformers', 'lightning', 'yaml', 'numpy'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}\n{check}"], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"
