"""Training checkpoints of LoRA and partly frozen models, by the command line on a tiny base."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import tiny
from metaembed_pl.cli.main import main

WAYS = {
    "gaussian": {"lora": {"r": 4, "alpha": 8}, "train_vision": False},
    "no_lora": {"train_vision": False},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Shards, and a tiny pretrained model in `base`."""
    folder = tmp_path_factory.mktemp("checkpoints")
    tiny.shards(folder / "train", 40)
    model = tiny.embedder()
    model.backbone.save_pretrained(folder / "base")
    model.processing.save(folder / "base")
    return folder


def fit(root: Path, folder: Path, way: str, max_steps: int, *flags: str) -> int:
    recipe = {
        "run": {"name": "tiny", "folder": str(folder)},
        "model": {
            "backbone": {"path": str(root / "base"), "max_pixels": 56 * 56},
            "groups": ["1x1", "2x4"],
            "layout": "own",
            "optimizer": {"lr": 1e-2, "schedule": "constant_with_warmup", "warmup": 0.0},
            **WAYS[way],
        },
        "data": {"train": [{"path": str(root / "train")}], "global_batch_size": 8},
        "trainer": {"max_steps": max_steps, "accelerator": "cpu", "logger": False},
    }
    recipe["data"]["num_workers"] = 0
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return main(["fit", "--config", str(folder / "recipe.yaml"), *flags])


def last(folder: Path) -> Path:
    return folder / "tiny" / "checkpoints" / "last.ckpt"


def read(folder: Path) -> dict:
    return torch.load(last(folder), weights_only=True)


@pytest.fixture(scope="module")
def broken_off(root, tmp_path_factory) -> dict[str, Path]:
    """Of every way, a run of two steps."""
    folders = {way: tmp_path_factory.mktemp(way) for way in WAYS}
    for way, folder in folders.items():
        assert fit(root, folder, way, 2) == 0
    return folders


@pytest.mark.parametrize("way", WAYS)
def test_resumed_without_its_frozen_weights_a_run_ends_with_the_same_numbers(root, tmp_path, way):
    assert fit(root, tmp_path / "whole", way, 4) == 0
    assert fit(root, tmp_path / "resumed", way, 2) == 0
    assert fit(root, tmp_path / "resumed", way, 4, "--ckpt_path", "last") == 0
    whole, resumed = read(tmp_path / "whole"), read(tmp_path / "resumed")
    assert whole["global_step"] == resumed["global_step"] == 4
    assert whole["state_dict"].keys() == resumed["state_dict"].keys()
    for name, tensor in whole["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    vectors = [load_file(f / "tiny/model/meta_tokens.safetensors") for f in tmp_path.iterdir()]
    assert torch.equal(vectors[0]["meta_tokens"], vectors[1]["meta_tokens"])


def test_a_checkpoint_holds_what_changes_and_nothing_else(root, broken_off):
    base = load_file(root / "base" / "model.safetensors")
    for way, folder in broken_off.items():
        state = read(folder)["state_dict"]
        plain = {name.replace(".base_layer.", "."): tensor for name, tensor in state.items()}
        kept = {name for name in base if f"embedder.backbone.{name}" in plain}
        same = {n for n in kept if torch.equal(base[n], plain[f"embedder.backbone.{n}"])}
        assert not same, f"{way} keeps weights that the base model has"
        assert "embedder.meta_tokens.embedding.weight" in state
        if way == "gaussian":
            assert not kept
        if way == "no_lora":
            assert kept == {name for name in base if not name.startswith("visual.")}


def test_another_base_model_is_refused_by_its_fingerprint(root, broken_off, tmp_path, capsys):
    shutil.copytree(broken_off["gaussian"], tmp_path / "run")
    file = root / "base" / "model.safetensors"
    weights, saved = load_file(file), read(tmp_path / "run")["base_fingerprint"]
    other = weights | {"visual.blocks.0.mlp.up_proj.weight": torch.zeros(48, 32)}
    try:
        save_file(other, file, metadata={"format": "pt"})
        assert fit(root, tmp_path / "run", "gaussian", 4, "--ckpt_path", "last") == 2
    finally:
        save_file(weights, file, metadata={"format": "pt"})
    error = capsys.readouterr().err
    assert re.search(rf"fingerprint {saved}, found (?!{saved})[0-9a-f]{{16}}", error), error
    assert read(tmp_path / "run")["global_step"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.popitem(), r"1 missing \(embedder\.\S+\)"),
        (lambda state: state.update(stray=torch.zeros(1)), r"1 unexpected \(stray\)"),
        (
            lambda state: state.update({"embedder.meta_tokens.embedding.weight": torch.zeros(1)}),
            r"1 mis-shaped \(embedder\.meta_tokens\.embedding\.weight\)",
        ),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    root, broken_off, tmp_path, capsys, change, message
):
    shutil.copytree(broken_off["gaussian"], tmp_path / "run")
    checkpoint = read(tmp_path / "run")
    change(checkpoint["state_dict"])
    torch.save(checkpoint, last(tmp_path / "run"))
    assert fit(root, tmp_path / "run", "gaussian", 4, "--ckpt_path", "last") == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
