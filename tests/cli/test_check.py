"""`check`: all faults at once, real shapes without weights, and what a run would take."""

import json
import time
from pathlib import Path

import pytest
import torch
import yaml

import tiny
from metaembed_pl.cli import check_rate
from metaembed_pl.cli.check import _num_batches, _weightless_model
from metaembed_pl.cli.main import main
from metaembed_pl.cli.recipe_faults import read_recipe
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair
from metaembed_pl.model.weightless import _on_meta, _place, count_parameters
from metaembed_pl.training.teacher import refuse_other_inputs

CONFIGS = Path(__file__).parents[2] / "recipes" / "configs"
RECIPES = CONFIGS.parent


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("check")
    tiny.shards(root / "train", 40)
    tiny.shards(root / "test", 6, first=500)
    tiny.embedder(layout="both").save_pretrained(root / "model")
    return root


@pytest.fixture
def recipe(data, tmp_path):
    """A recipe that would run, changed by what a test gives, and written."""

    def write(**changes) -> str:
        train = str(data / "train")
        values = {
            "run": {"name": "tiny", "folder": str(tmp_path / "runs")},
            "model": {
                "backbone": {
                    "scratch": tiny.QWEN25_VL,
                    "tokenizer": {"vocab_size": 300, "sources": [train]},
                    "max_pixels": 56 * 56,
                },
                "groups": ["1x1", "2x4"],
            },
            "data": {"train": [{"path": train}], "global_batch_size": 8},
            "trainer": {"max_steps": 6, "accelerator": "cpu"},
        }
        for name, value in changes.items():
            part, _, key = name.partition("__")
            values[part][key] = value
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(values))
        return str(file)

    return write


def check(*arguments) -> int:
    return main(["check", *map(str, arguments)])


def test_a_recipe_that_would_run_gives_its_numbers_and_0(recipe, capsys):
    assert check("--config", recipe(), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    model = tiny.embedder(groups=("1x1", "2x4"))
    backbone = sum(p.numel() for p in model.backbone.parameters())
    assert found["parameters"]["meta tokens"] == {"total": 6 * 32, "trained": 6 * 32}
    assert found["parameters"]["all"]["trained"] == found["parameters"]["all"]["total"]
    # The vocabularies are trained on different words.
    assert found["parameters"]["all"]["total"] == pytest.approx(backbone + 6 * 32, rel=0.05)
    assert found["negatives"] == {"in_batch": 7, "hard": [1]}
    assert found["steps"] == {
        "global_batch_size": 8,
        "max_steps": 6,
        "num_pairs": 40,
        "steps_an_epoch": 5,
    }
    assert found["tokens"]["candidate"]["longest"] > found["tokens"]["candidate"]["patches"] // 4
    assert found["memory"]["total"] > 0
    assert found["faults"] == []


def test_a_second_recipe_is_laid_over_the_first(recipe, tmp_path, capsys):
    first, over = recipe(), tmp_path / "over.yaml"
    over.write_text("data: {global_batch_size: 4}\nmodel: {groups: [1x1]}\n")
    assert check("--config", first, "--config", over, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recipe"] == f"{first}, {over}"
    assert found["steps"]["global_batch_size"] == 4
    assert found["parameters"]["meta tokens"]["total"] == 2 * 32
    over.write_text("data: {global_batch: 4}\n")
    assert check("--config", first, "--config", over) == 2
    assert "no such key; did you mean 'global_batch_size'" in capsys.readouterr().err


def test_the_report_is_readable_and_has_no_faults(recipe, capsys):
    assert check("--config", recipe()) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "7 of the batch, 1 hard" in out
    assert "6 of 8 pairs; 5 an epoch of 40 pairs" in out
    assert "activations" in out


def test_lengths_are_those_of_the_batches_that_training_makes(recipe, data, capsys):
    assert check("--config", recipe(), "--json") == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    module = read_recipe(Path(recipe())).model
    assert module is not None
    module.configure_model()
    process = module.embedder.processor()
    pairs = tiny.pairs(40)
    for side, items in (
        ("query", [pair.query for pair in pairs]),
        ("candidate", [item for pair in pairs for item in (pair.positive, *pair.negatives)]),
    ):
        lengths = process(items, side)["attention_mask"].sum(1).float()
        assert tokens[side]["longest"] == lengths.max()
        assert tokens[side]["average"] == pytest.approx(lengths.mean().item(), abs=0.5)


def test_questions_are_counted_and_planned(recipe, tmp_path, capsys):
    with ShardWriter(tmp_path / "asked", "asked") as writer:
        for pair in tiny.pairs(12):
            for n in range(3):
                writer.write(Pair(f"{pair.id}/{n}", Item(f"{pair.query.text} {n}"), pair.positive))
    source = {"path": str(tmp_path / "asked"), "questions": 2}
    assert check("--config", recipe(data__train=[source]), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["questions"] == 1.5  # three questions come as two and one
    assert found["steps"]["steps_an_epoch"] == 3  # 24 candidates in batches of 8
    assert check("--config", recipe(data__train=[source])) == 0
    assert "1.5 per candidate in a batch, on average" in capsys.readouterr().out
    for wrong in (0, -1, "some"):
        assert check("--config", recipe(data__train=[source | {"questions": wrong}])) == 2
        assert "questions" in capsys.readouterr().out


def test_all_faults_are_told_at_once_with_the_nearest_key(recipe, capsys):
    file = recipe(
        model__lay_out="both",
        model__optimizer={"lrr": 1e-3, "warmup": 2},
        model__loss={"temperature": "hot"},
        data__train=[{"path": "nowhere", "wieght": 1, "first_step": "soon"}],
        data__global_batch_size=7,
        trainer__strategy="dpp",
        trainer__max_step=3,
    )
    assert check("--config", file, "--gpus", 2) == 2
    err = capsys.readouterr().err
    for fault in (
        "model.lay_out: no such key; did you mean 'layout'?",
        "model.optimizer.lrr: no such key; did you mean 'lr'?",
        "model.optimizer.warmup is a share of all steps, 0 to below 1, got 2",
        "model.loss.temperature: expected a number, got 'hot'",
        "data.train[0].first_step: expected an integer, got 'soon'",
        "data.train[0].wieght: no such key; did you mean 'weight'?",
        "data.train: 1 of 1 folders of shards are missing: nowhere",
        "data.global_batch_size: 7 cannot be divided evenly over 2 GPUs",
        "trainer.strategy: no strategy 'dpp'; did you mean 'ddp'?",
        "trainer.max_step: no such key; did you mean 'max_steps'?",
    ):
        assert fault in err, fault
    lines = err.splitlines()
    assert sum(line.startswith("fault: ") for line in lines) == 10
    assert lines[-1].endswith("would not run: 10 faults")
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model__groups": ["4x8", "1x1"]}, "groups must be nested"),
        ({"model__lora": {"targets": "nothing"}}, "'nothing' matches no linear layer"),
        ({"model__backbone": {"scratch": {"model_type": "bert"}, "tokenizer": None}}, "tokenizer"),
        ({"model__backbone": {}}, "give a backbone, or a model to start_from"),
        ({"model__backbone": {"path": "no/where"}}, "no/where: no such folder"),
        ({"model__start_from": "no/where"}, "no/where does not exist"),
        ({"run__nmae": "x"}, "run.nmae: no such key; did you mean 'name'?"),
        ({"data__train": []}, "names no training source"),
        ({"data__global_batch_size": 80}, "fewer than one global batch of 80"),
        ({"data__test": [{"path": "nowhere"}]}, "data.test: 1 of 1 folders"),
        ({"data__train": [{"weight": 1}]}, "data.train[0]: it needs a 'path'"),
        ({"data__train": "all"}, "data.train: expected a list, got 'all'"),
        ({"model__optimizer": {"lr": None}}, "model.optimizer.lr: expected a number, got None"),
        ({"model__layout": "neither"}, "model.layout: expected 'both' or 'own' or null"),
        ({"trainer__precision": "bf17"}, "trainer.precision: expected 64 or 32 or"),
        ({"trainer__max_steps": "many"}, "trainer.max_steps: expected an integer, got 'many'"),
        ({"trainer__strategy": "deepspeed_stage_4"}, "did you mean 'deepspeed_stage_"),
        (
            {"trainer__strategy": "deepspeed_stage_2", "model__optimizer": {"muon_lr": 1e-3}},
            "model.optimizer.muon_lr does not work with DeepSpeed",
        ),
    ],
)
def test_a_fault_is_one_line_and_exit_2(recipe, capsys, changes, message):
    assert check("--config", recipe(**changes)) == 2
    out, err = capsys.readouterr()
    faults = [line for line in err.splitlines() if line.startswith("fault: ")]
    assert len(faults) == 1, err
    assert message in faults[0]
    assert out.startswith("recipe")


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        (
            "--model.loss.widths=16",
            "model.loss.widths: expected a list of integers or null, got 16",
        ),
        ("--model.loss.query_spread.wieght=3", "model.loss.query_spread.wieght: no such key; did"),
        ("--model.loss.temperature=warm", "model.loss.temperature: expected a number, got 'warm'"),
        ("--model.loss.query_spread.weight=-1", "model.loss.query_spread.weight must be positive"),
        ("--model.optimizer.warmup=2", "model.optimizer.warmup is a share of all steps"),
        ("--data.eval_batch_size=0", "data: eval_batch_size must be at least 1, got 0"),
        ("--run.nmae=x", "run.nmae: no such key; did you mean 'name'?"),
        ("--trainer.max_step=5", "trainer.max_step: no such key; did you mean 'max_steps'?"),
    ],
)
def test_fit_says_what_check_says(recipe, capsys, flag, message):
    file = recipe()
    assert check("--config", file, flag) == 2
    (fault,) = [line for line in capsys.readouterr().err.splitlines() if line[:7] == "fault: "]
    assert fault.removeprefix("fault: ").startswith(message)
    assert main(["fit", "--config", file, flag]) == 2
    assert capsys.readouterr().err == f"metaembed-pl: {fault[7:]}\n"


TOKENIZER = {"vocab_size": 300, "sources": ["MODEL/../train"]}
QWEN = "Qwen/Qwen2.5-VL-3B-Instruct"
SCRATCH = {"scratch": tiny.QWEN25_VL, "tokenizer": TOKENIZER}
POOLED = {"model__groups": ["1x1"], "model__pooling": "mean"}
WITHOUT_EFFECT = [
    (
        {"model__backbone": SCRATCH | {"dtype": "bfloat16"}},
        "model.backbone.dtype has no effect: it is for pretrained weights",
    ),
    (
        {"model__backbone": SCRATCH | {"revision": "x"}},
        "model.backbone.revision has no effect: it is for a hub id",
    ),
    (
        {"model__backbone": {"path": QWEN, "tokenizer": TOKENIZER}},
        "model.backbone.tokenizer has no effect: it is for `scratch`",
    ),
    (
        {"model__layout": "own", **POOLED},
        "model.layout has no effect: pooling mean has no meta tokens",
    ),
    (
        {"model__optimizer": {"meta_token_lr": 1e-3}, **POOLED},
        "model.optimizer.meta_token_lr has no effect: pooling mean",
    ),
    (
        {"model__lora": {"targets": ".*q_proj"}, "model__train_vision": False},
        "model.train_vision has no effect: lora.targets chooses the layers",
    ),
    (
        {"model__optimizer": {"kind": "torch.optim.SGD", "betas": [0.9, 0.95]}},
        "model.optimizer.betas has no effect: torch.optim.SGD does not take it",
    ),
    (
        {"model__optimizer": {"options": {"weight_decay": 0.1}}},
        "model.optimizer.options.weight_decay has no effect",
    ),
    ({"model__headline": "ndcg@5"}, "model.headline has no effect: it selects the best"),
    ({"run__experiment": "x", "run__mlflow_uri": None}, "run.experiment has no effect: run.mlflow"),
    ({"trainer__default_root_dir": "x"}, "trainer.default_root_dir has no effect: the folder of"),
    ({"trainer__enable_model_summary": True}, "trainer.enable_model_summary has no effect"),
    (
        {"trainer__check_val_every_n_epoch": 2, "trainer__val_check_interval": 3},
        "trainer.check_val_every_n_epoch has no effect: an integer val_check_interval counts",
    ),
    (
        {"data__val": [{"path": "MODEL/../test", "where": {"l": "de"}}], "data__test": []},
        "/test: `where` chooses queries of retrieval sets, not of shards",
    ),
    (
        {
            "data__train": [
                {"path": "MODEL/metaembed.json", "columns": {"query": "q"}, "files": "x"}
            ]
        },
        "/metaembed.json: `files` chooses among several files, and this is one",
    ),
]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model__loss": {"widths": [8, 16]}},
            "model.loss.widths are nested, largest first and at least 1, such as [64, 32]; got "
            "[8, 16]",
        ),
        (
            {"model__loss": {"widths": [32, 8]}},
            "model.loss.widths [32, 8] must be below the 32 components",
        ),
        (
            {"model__groups": ["1x4"], "model__loss": {"query_spread": {}}},
            "query_spread keeps the vectors of a query apart: it needs at least 2 of them, and the "
            "largest group is 1x4",
        ),
        (
            {"model__groups": ["4x1"], "model__loss": {"candidate_spread": {}}},
            "candidate_spread keeps the vectors of a candidate apart: it needs at least 2",
        ),
        (
            {"model__loss": {"teacher": {}}},
            "train: model.loss.teacher learns from the `score` of each pair's positive and hard "
            "negatives, and 8 of 8 pairs looked at have none: let `mine` write them",
        ),
        (
            {"model__loss": {"teacher": {}}, "data__num_negatives": 0},
            "train: model.loss.teacher learns how far a positive scores above its hard negatives, "
            "and there are none: raise num_negatives, or mine them",
        ),
        (
            {"model__loss": {"teacher": {"model": "MODEL"}}},
            "/model has another tokenizer than the model in training: it reads the same tensors",
        ),
        (
            {"data__train": [{"path": "nowhere/emoji_scene_two"}]},
            "nowhere/emoji_scene_two",
        ),
        *WITHOUT_EFFECT,
    ],
    ids=[
        "widths that are not nested",
        "widths that are too large",
        "one query vector kept apart",
        "one candidate vector kept apart",
        "no scores",
        "no negatives",
        "another vocabulary",
        "data without queries for two things",
        *(next(iter(changes)) for changes, _ in WITHOUT_EFFECT),
    ],
)
def test_check_and_fit_refuse_options_that_do_not_fit_in_the_same_line(
    recipe, data, capsys, changes, message
):
    file = Path(recipe(**changes))
    file.write_text(file.read_text().replace("MODEL", str(data / "model")))
    assert check("--config", file) == 2
    faults = [line for line in capsys.readouterr().err.splitlines() if line.startswith("fault: ")]
    assert len(faults) == 1, faults
    assert message in faults[0]
    assert main(["fit", "--config", str(file)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_teacher_that_is_not_here_is_a_fault(recipe, capsys):
    file = recipe(model__loss={"teacher": {"model": "not/on/disk"}})
    assert check("--config", file) == 2
    with pytest.raises(UserError) as of_fit:
        refuse_other_inputs("not/on/disk", tiny.embedder())
    assert f"fault: {of_fit.value}\n" in capsys.readouterr().err
    assert str(of_fit.value).startswith("model.loss.teacher.model: not/on/disk does not exist")


def test_batches_that_are_accumulated_take_their_time_as_well():
    assert _num_batches({"max_steps": 6, "batches_a_step": 4}) == 24
    assert _num_batches({"max_steps": -1, "max_epochs": 2, "steps_an_epoch": 5}) == 10
    epochs = {"max_steps": -1, "max_epochs": 2, "steps_an_epoch": 5, "batches_a_step": 5}
    assert _num_batches(epochs) == 10  # an epoch is counted in batches


def test_a_run_of_that_name_is_a_fault(recipe, tmp_path, capsys):
    last = tmp_path / "runs" / "tiny" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    last.touch()
    assert check("--config", recipe()) == 2
    assert "contains a run already" in capsys.readouterr().err
    assert check("--config", recipe(run__overwrite=True)) == 0


def test_too_little_memory_is_a_fault_that_says_what_would_fit(recipe, capsys):
    file = recipe(trainer__accelerator="gpu")
    assert check("--config", file, "--gpus", 1, "--gpu-memory", "1GB") == 2
    assert "GiB per GPU, more than 1.0; what would make it fit: " in capsys.readouterr().err
    assert check("--config", file, "--gpus", 1, "--gpu-memory", "80GB") == 0
    assert "of 80.0 GiB" in capsys.readouterr().out


def test_settings_can_be_tried(recipe, capsys):
    arguments = ["--set", "data.global_batch_size=16", "--set=model.lora={r: 2}", "--json"]
    assert check("--config", recipe(), *arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["negatives"]["in_batch"] == 15
    assert 0 < found["parameters"]["adapters"]["trained"] < found["parameters"]["all"]["total"] / 2
    assert found["parameters"]["language model"]["trained"] == 0


@pytest.mark.parametrize("given", ["data.global_batch_size", "=1", "data=[", "run.name.x=1"])
def test_a_malformed_setting_is_refused(recipe, capsys, given):
    assert check("--config", recipe(), "--set", given) == 2
    assert "--set" in capsys.readouterr().err


def test_a_model_to_start_from_gives_groups_and_shape(recipe, data, capsys):
    file = Path(recipe())
    values = yaml.safe_load(file.read_text())
    values["model"] = {"start_from": str(data / "model"), "lora": {"r": 4}, "train_vision": False}
    file.write_text(yaml.safe_dump(values))
    assert check("--config", file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["meta tokens"]["total"] == 12 * 32
    assert found["parameters"]["vision tower"]["trained"] == 0
    assert found["parameters"]["adapters"]["trained"] > 0


def test_yaml_that_is_no_recipe_is_refused(tmp_path, capsys):
    file = tmp_path / "x.yaml"
    for text in ("[1, 2]", "a: [", "run: !!python/object/apply:os.system ['true']\n"):
        file.write_text(text)
        assert check("--config", file) == 2
        assert str(file) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "0"], "--gpus must be at least 1, got 0"),
        (["--gpu-memory", "lots"], "written 80GB, got 'lots'"),
    ],
)
def test_flags_are_checked(recipe, capsys, flags, message):
    assert check("--config", recipe(), *flags) == 2
    assert message in capsys.readouterr().err


HEADED = [path.stem for path in sorted(RECIPES.glob("*.yaml")) if "`check`" in path.read_text()]


@pytest.mark.parametrize("name", HEADED)
def test_the_papers_recipes_are_checked_without_weights(name, capsys, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    assert check("--config", name, "--gpu", "A100", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    # Only the data are missing here, and perhaps deepspeed.
    others = [fault for fault in found["faults"] if not fault.startswith("data.")]
    assert all("pip install metaembed-pl[deepspeed]" in fault for fault in others)
    assert found["tokens"]["query"]["longest"] > 512
    assert found["memory"]["total"] < 79 * 2**30
    assert found["parameters"]["adapters"]["trained"] > 10**7
    head = (RECIPES / f"{name}.yaml").read_text()
    assert f"about {found['memory']['total'] / 2**30:.0f} GiB per GPU (estimated by `check`" in head
    assert f"at most {found['compute']['hours']:.0f} (`check`)" in head


def test_the_papers_parameters_are_right_without_the_head():
    recipe = read_recipe(RECIPES / "qwen7b.yaml")
    assert recipe.faults == []
    faults: list[str] = []
    made = _weightless_model(recipe, faults)
    assert faults == []
    assert made is not None
    counts = count_parameters(made.model)
    assert counts["vision tower"]["total"] == 676_550_144
    assert counts["language model"]["total"] == 8_292_166_656 - 676_550_144 - 152_064 * 3584
    # r (in + out) of q, k, v, o, gate, up and down, in each of 28 layers.
    widths = 2 * (3584 + 3584) + 2 * (3584 + 512) + 2 * (3584 + 18944) + (18944 + 3584)
    assert counts["adapters"] == {"total": 28 * 32 * widths, "trained": 28 * 32 * widths}
    assert counts["meta tokens"]["total"] == 80 * 3584


def stated_sizes() -> dict[str, str]:
    rows = (CONFIGS / "README.md").read_text().splitlines()
    cells = [row.strip("| ").split(" | ") for row in rows if row.startswith("| ") and "/" in row]
    return {cell[0]: cell[1] for cell in cells}


def test_every_shape_is_in_the_table_and_the_other_way_round():
    kept = {file.parent.relative_to(CONFIGS).as_posix() for file in CONFIGS.rglob("config.json")}
    assert kept == set(stated_sizes())


@pytest.mark.parametrize(("name", "stated"), stated_sizes().items())
def test_a_shape_has_as_many_parameters_as_the_hub_states(name, stated):
    from transformers import AutoConfig

    place, source = _place(name, None, CONFIGS)
    assert source == "the shapes that come with the package"
    config = AutoConfig.from_pretrained(place)
    model = _on_meta(config, "float32")
    assert all(p.device == torch.device("meta") for p in model.parameters())
    text = config.get_text_config()
    tied = any(getattr(part, "tie_word_embeddings", False) for part in (config, text))
    head = 0 if tied else text.vocab_size * text.hidden_size
    found = sum(p.numel() for p in model.parameters()) + head
    if stated.endswith(" B"):
        assert round(found / 1e9) == int(stated.removesuffix(" B"))
    else:
        assert found == int(stated.replace(",", ""))


@pytest.mark.parametrize(
    "flags",
    [
        ["--set", "data.train={}"],
        ["--data.train={}"],
        ["--data.train", "{}"],
        ["--data.train=[{{path: {}}}]"],
        ["--set", "data.train=[]", "--data.train+={{path: {}}}"],
    ],
    ids=["set", "flag", "blank", "list", "added"],
)
def test_a_folder_is_tried_as_fit_would_take_it(recipe, data, capsys, flags):
    path = recipe(data__train=[{"path": "nowhere"}])
    assert check("--config", path, *(flag.format(data / "train") for flag in flags), "--json") == 0
    assert json.loads(capsys.readouterr().out)["steps"]["num_pairs"] == 40


def test_of_many_missing_folders_three_are_named(recipe, capsys):
    path = recipe(data__train=[{"path": f"no{i}", "weight": 1} for i in range(5)])
    assert check("--config", path) == 2
    said = "5 of 5 folders of shards are missing: no0, no1, no2 and 2 more; prepare"
    assert said in capsys.readouterr().err


def test_keys_are_changed_by_the_flags_of_fit(recipe, tmp_path, capsys):
    sources = tmp_path / "sources.yaml"
    sources.write_text(yaml.safe_dump([{"path": "nowhere"}]))
    flags = [f"--data.train={sources}", "--model.optimizer.lr", "1e-4", "--model.lora.r=2"]
    assert check("--config", recipe(), *flags, "--trainer.max_steps=9", "--json") == 2
    found = json.loads(capsys.readouterr().out)
    assert found["faults"] == [
        "data.train: 1 of 1 folders of shards are missing: nowhere; prepare the data first"
    ]
    assert found["steps"]["max_steps"] == 9
    assert found["parameters"]["adapters"]["trained"] > 0


def test_fit_takes_a_folder_for_its_sources(data):
    from metaembed_pl.cli.recipe_faults import recipe_parser
    from metaembed_pl.cli.recipe_path import with_recipes_found

    given = ["--data.train", str(data / "train"), f"--data.test={data / 'test'}"]
    parsed = recipe_parser().parse_args([*with_recipes_found(given), "--run.name=x"])
    assert [source.path for source in parsed.data.train] == [str(data / "train")]
    assert [source.path for source in parsed.data.test] == [str(data / "test")]


def test_the_earlier_of_two_limits_ends_the_run():
    steps = {"max_steps": 500, "steps_an_epoch": 20}
    assert _num_batches(steps) == 500
    assert _num_batches(steps | {"max_epochs": 3}) == 60
    assert _num_batches(steps | {"max_epochs": 3, "max_steps": 50}) == 50
    assert _num_batches({"max_steps": -1, "max_epochs": 3}) is None


def test_hours_are_those_of_the_named_gpu_at_the_stated_share(recipe, capsys):
    on_gpu = recipe(trainer__accelerator="gpu", trainer__devices=2)
    hours = {}
    for gpu, flags in (
        ("A100", []),
        ("h100", []),
        ("H200", ["--utilisation", "0.8"]),
    ):
        assert check("--config", on_gpu, "--gpu", gpu, *flags, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        hours[found["compute"]["gpu"]] = found["compute"]["hours"]
        assert found["compute"]["is_assumed"] == (not flags)
        assert found["memory"]["limit"] > 79 * 2**30
    step = found["compute"]["flops_a_step"]
    assert hours["A100"] == pytest.approx(6 * step / (2 * 312e12 * 0.4) / 3600)
    assert hours["H100"] == pytest.approx(2 * hours["H200"])
    assert check("--config", on_gpu, "--gpu", "H100") == 0
    assert "hours on 2 x H100 at 40% of its peak (assumed)" in capsys.readouterr().out


def test_the_rate_of_the_data_is_that_of_the_shards_and_workers_follow_from_it(
    recipe, capsys, monkeypatch
):
    def slow(pair, process):
        time.sleep(0.1)
        return len([pair.query, pair.positive, *pair.negatives])

    on_gpu = recipe(trainer__accelerator="gpu", trainer__devices=2)
    assert check("--config", on_gpu, "--gpu", "A100", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    step = found["compute"]["flops_a_step"]
    path = found["data_path"]
    assert path["pairs_a_gpu"] == pytest.approx(8 * 312e12 * 0.4 / step)
    assert path["pictures_a_worker"] == pytest.approx(2 * path["pairs_a_worker"])
    assert (path["workers_needed"] - 1) * path["pairs_a_worker"] < path["pairs_a_gpu"]
    assert path["workers_needed"] * path["pairs_a_worker"] >= path["pairs_a_gpu"]
    monkeypatch.setattr(check_rate, "_prepare", slow)
    assert check("--config", on_gpu, "--gpu", "A100", "--json") == 0
    slower = json.loads(capsys.readouterr().out)["data_path"]
    assert slower["pairs_a_worker"] < min(10, path["pairs_a_worker"])
    assert check("--config", on_gpu, "--gpu", "A100", "--data.num_workers=2") == 0
    out = capsys.readouterr().out
    assert "and it has 2: set data.num_workers, or the GPU waits for data" in out


def test_the_rate_is_measured_on_pairs_of_every_source(tmp_path):
    sources = [(ShardedPairs(tiny.shards(tmp_path / n, int(n))), 0) for n in ("90", "3")]
    places = [(shards.name, place) for shards, place, _ in check_rate._places(sources)]
    assert {name for name, _ in places} == {"90", "3"}
    assert max(place for name, place in places if name == "90") > 60
    assert {place for name, place in places if name == "3"} == {0, 1, 2}


def test_without_data_nothing_is_said_of_their_rate(capsys, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    assert check("--config", "qwen3b", "--json") == 2
    assert json.loads(capsys.readouterr().out)["data_path"] is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "T4"], "--gpu must be one of A100, H100, H200, got T4"),
        (["--gpu", "H100", "--utilisation", "40"], "a share above 0 and at most 1, got 40"),
        (["--utilisation", "0.4"], "--utilisation needs --gpu NAME"),
        (["--weights_only=false"], "weights_only has no effect: it is always true"),
    ],
)
def test_gpus_are_checked(recipe, capsys, flags, message):
    assert check("--config", recipe(), *flags) == 2
    assert message in capsys.readouterr().err


def test_a_gated_model_says_where_its_licence_is(recipe, capsys, monkeypatch):
    monkeypatch.chdir(RECIPES.parent)
    assert check("--config", "llama11b", "--json") == 2
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    page = "https://huggingface.co/meta-llama/Llama-3.2-11B-Vision-Instruct"
    assert f"accept the licence at {page}, then log in" in note


def test_a_table_here_becomes_shards_and_one_elsewhere_is_told(
    recipe, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("METAEMBED_CACHE", str(tmp_path / "cache"))
    pairs = [{"query": f"q {i}", "positive": f"p {i}"} for i in range(24)]
    (tmp_path / "mine.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    val = [{"path": "preset:flickr30k"}]
    file = recipe(data__train=[{"path": str(tmp_path / "mine.jsonl")}], data__val=val)
    assert check("--config", file, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"]["num_pairs"] == 24
    told = (
        f"lmms-lab/flickr30k: not looked at; the first fit reads it and makes shards in {tmp_path}"
    )
    assert any(told in note for note in found["notes"])
    assert check("--config", recipe(data__train=[{"path": "preset:coca"}])) == 2
    assert "fault: data: preset:coca: presets with a place" in capsys.readouterr().err
