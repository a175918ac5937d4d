"""Damaged model folders and checkpoints, recipes written to do harm: one line, and which file."""

import json
import os
import shutil
import time

import pytest
import torch

import tiny
import tiny_run
from metaembed_pl.cli.main import main
from metaembed_pl.data.datamodule import RetrievalDataModule
from metaembed_pl.data.recipe_sources import EvalSource, TrainSource
from metaembed_pl.data_prep import pairs as pairs_script
from metaembed_pl.errors import UserError
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.training.checkpoints import AtomicCheckpointIO
from metaembed_pl.training.module import MetaEmbedModule
from metaembed_pl.training.optimizer import OptimizerConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "model"
    tiny.embedder().save_pretrained(folder)
    return folder


JSON = ("metaembed.json", "processing/processing.json", "backbone/config.json")
TOKENIZER = ("processing/tokenizer.json", "processing/tokenizer_config.json")
WEIGHTS = ("backbone/model.safetensors", "meta_tokens.safetensors")


@pytest.mark.parametrize("name", [*JSON, *TOKENIZER, *WEIGHTS])
@pytest.mark.parametrize("how", ["cut", "empty", "number", "list", "noise", "gone", "folder"])
def test_a_damaged_model_folder_is_one_line_that_names_it(model, tmp_path, name, how):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    file = folder / name
    content = file.read_bytes()
    file.unlink()
    if how == "folder":
        file.mkdir()
    elif how != "gone":
        file.write_bytes(
            {
                "cut": content[: len(content) // 2],
                "empty": b"",
                "number": b"42",
                "list": b"[1, 2]",
                "noise": bytes(range(256)),
            }[how]
        )
    if (name, how) in ((TOKENIZER[1], "gone"), (TOKENIZER[1], "folder")):
        pytest.skip("transformers does without it")
    with pytest.raises(UserError) as refused:
        MetaEmbedder.from_pretrained(folder)
    # What the tokenizers library says does not name its file: the folder is named.
    by_folder = name in TOKENIZER or (name, how) == (WEIGHTS[0], "gone")
    named = file.parent if by_folder else file
    assert str(named) in str(refused.value) or (how in ("gone", "folder") and name == JSON[0])
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("change", [{"groups": []}, {"groups": 3}, {"layout": 1}, {"groups": None}])
def test_settings_of_a_wrong_kind_are_one_line(model, tmp_path, change):
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "metaembed.json").read_text())
    (folder / "metaembed.json").write_text(json.dumps(settings | change))
    with pytest.raises(UserError):
        MetaEmbedder.from_pretrained(folder)


@pytest.mark.parametrize("how", ["missing", "empty", "folder", "noise", "other", "list", "pipe"])
def test_a_checkpoint_that_is_none_is_one_line_that_names_it(tmp_path, how):
    file = tmp_path / "x.ckpt"
    {
        "missing": lambda: None,
        "empty": lambda: file.write_bytes(b""),
        "folder": file.mkdir,
        "noise": lambda: file.write_bytes(bytes(range(256)) * 9),
        "other": lambda: torch.save({"weights": torch.zeros(2)}, file),
        "list": lambda: torch.save([1, 2], file),
        "pipe": lambda: os.mkfifo(file),
    }[how]()
    with pytest.raises(UserError, match=r"x\.ckpt: not a checkpoint of this package"):
        AtomicCheckpointIO().load_checkpoint(file, weights_only=True)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 10)}]\n"
    for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (BOMB, "more than 10,000 values"),
        ("a: &a\n  b: *a\n", "an alias contains itself"),
        (b"run: {name: \xff}\n", "not UTF-8: invalid start byte at byte 12"),
        ("run: {name: a}\nmodel: {}\nrun: {name: b}\n", ":3: the key 'run' occurs twice"),
        ("model: {groups: [1x1], groups: [2x4]}\n", ":1: the key 'groups' occurs twice"),
        ("[" * 5000, "not a readable YAML file"),
        ("#" * 1_100_000, "larger than 1,000,000 bytes"),
    ],
)
@pytest.mark.parametrize("verb", ["fit", "check"])
def test_a_recipe_that_does_harm_is_refused_in_a_second(tmp_path, capsys, content, message, verb):
    file = tmp_path / "r.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.process_time()
    assert main([verb, "--config", str(file)]) == 2
    assert time.process_time() - started < 1.5
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_keys_that_take_their_values_from_each_other_are_refused(tmp_path, capsys):
    optimizer = {"lr": "${.weight_decay}", "weight_decay": "${.lr}"}
    file = tiny_run.recipe(tmp_path, tmp_path, model__optimizer=optimizer)
    assert main(["fit", "--config", str(file)]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", " ", "..", ".", "a/b", "/etc", "a\\b", "x" * 300, "a\0b"])
def test_a_name_that_is_no_folder_is_refused(tmp_path, name):
    from metaembed_pl.cli.train import RunConfig

    with pytest.raises(UserError, match=r"run\.name is the name of one folder"):
        RunConfig(name)


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_a_pairs_file_that_is_none_is_refused_at_once(tmp_path, capsys, kind, suffix):
    file = tmp_path / f"p{suffix}"
    if kind == "device":
        file.symlink_to("/dev/zero")
    else:
        (file.mkdir if kind == "folder" else lambda: os.mkfifo(file))()
    assert pairs_script.main(["--pairs", str(file), "--out", str(tmp_path / "out")]) == 2
    assert "not a plain file, but a" in capsys.readouterr().err


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "make",
    [
        lambda: OptimizerConfig(lr=NAN),
        lambda: OptimizerConfig(lr=INF),
        lambda: OptimizerConfig(weight_decay=-1),
        lambda: OptimizerConfig(weight_decay=NAN),
        lambda: OptimizerConfig(betas=(0.9, 1.0)),
        lambda: OptimizerConfig(warmup=NAN),
        lambda: MetaEmbedModule(groups=[]),
        lambda: MetaEmbedModule(projection=0),
        lambda: MetaEmbedModule(meta_token_std=NAN),
        lambda: RetrievalDataModule(eval_batch_size=0),
        lambda: RetrievalDataModule(num_workers=-1),
        lambda: RetrievalDataModule(steps_per_epoch=0),
        lambda: RetrievalDataModule(train=[TrainSource("x", num_negatives=-1)]),
        lambda: RetrievalDataModule(val=[EvalSource("x", max_queries=0)]),
    ],
)
def test_numbers_out_of_range_are_refused_by_name(make):
    with pytest.raises(UserError):
        make()
