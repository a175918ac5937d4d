"""A whole run under ZeRO-3 from the command line, on two processes of the CPU.

LoRA on weights that are sharded as they are read, gradient caching, checkpoints, ends by SIGKILL in
the middle of them, the model folder.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import tiny
from faults import die_in_checkpoint, die_in_model_folder
from metaembed_pl.cli.main import main
from metaembed_pl.errors import UserError
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.training.strategy import _refuse_objects
from ranks import command_line

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
TIMEOUT_S = 400


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    pytest.importorskip("deepspeed")
    root = tmp_path_factory.mktemp("zero")
    tiny.shards(root / "train", 40)
    tiny.shards(root / "test", 12, first=500)
    tiny.embedder(groups=("1x1", "2x4")).save_pretrained(root / "base")
    return root


def recipe(root: Path, name: str, trainer: dict | None = None, **evaluation) -> str:
    values = {
        "run": {"name": name, "folder": str(root / "runs"), "checkpoint_every_n_steps": 2},
        "model": {
            "start_from": str(root / "base"),
            "lora": {"r": 4, "dropout": 0.1},
            "optimizer": {"lr": 1e-2, "warmup": 0.0},
            "gradient_cache": {"max_tokens": 600},
        },
        "data": {
            "train": [{"path": str(root / "train")}],
            "global_batch_size": 4,
            "num_workers": 0,
            **evaluation,
        },
        "trainer": {
            "max_steps": 6,
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "deepspeed_stage_3",
            "gradient_clip_val": 1.0,
            "log_every_n_steps": 1,
            "logger": False,
            **(trainer or {}),
        },
    }
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values))
    return str(file)


def run_killed(config: str, folder: Path, die: partial) -> None:
    """A run of which one rank dies in `die`, and the other with it."""
    ranks = command_line(2, folder, "fit", "--config", config, first=die)
    ended = ranks.end_with_the_first_killed()
    # A rank that has nothing to write may have come to its end.
    assert {-signal.SIGKILL} <= {status for status, _ in ended} <= {-signal.SIGKILL, 0}, ended


@pytest.fixture(scope="module")
def finished(root) -> Path:
    """As a user starts it: Lightning starts the second rank."""
    sets = {part: [{"path": str(root / "test"), "name": "pool"}] for part in ("val", "test")}
    config = recipe(root, "whole", **sets)
    process = subprocess.Popen(
        [sys.executable, "-m", "metaembed_pl", "fit", "--config", config],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        told = process.communicate(timeout=TIMEOUT_S)[0]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, told
    assert "step 6 of 6" in told
    return root / "runs" / "whole"


def adapter(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / "adapter" / "adapter_model.safetensors")


def test_the_model_folder_holds_whole_tensors_and_loads(root, finished):
    found = adapter(finished / "model")
    start_of = MetaEmbedder.from_pretrained(root / "base")
    layers = dict(start_of.backbone.named_modules())
    for name, tensor in found.items():
        layer = layers[name.removeprefix("base_model.model.").rpartition(".lora_")[0]]
        size = layer.in_features if ".lora_A." in name else layer.out_features
        assert sorted(tensor.shape) == sorted((4, size)), name
        assert tensor.any(), name
    model = MetaEmbedder.from_pretrained(finished / "model")
    before, after = (m.encode_query(["red moon"]) for m in (start_of, model))
    assert (before - after).abs().max() > 1e-3  # six steps have changed something


def test_the_report_is_there(finished):
    metrics = json.loads((finished / "report" / "metrics.json").read_text())
    assert 0 <= metrics["test/pool/recall@1/2x4"] <= 1


def test_a_checkpoint_is_tested_with_the_weights_it_holds(root, finished, tmp_path):
    report = finished / "report" / "metrics.json"
    trained = json.loads(report.read_text())
    arguments = ("test", "--config", str(root / "whole.yaml"), "--ckpt_path", "last")
    for status, said in command_line(2, tmp_path, *arguments).end():
        assert status == 0, said
    found = json.loads(report.read_text())
    scores = {name for name in trained if name.startswith("test/pool/recall@")}
    assert scores
    assert {name: found[name] for name in scores} == {name: trained[name] for name in scores}


def test_a_checkpoint_exports_to_the_same_model(finished, tmp_path):
    arguments = ["export", "--run", str(finished), "--checkpoint", "last"]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    one, other = adapter(finished / "model"), adapter(tmp_path / "out")
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_killed_in_a_checkpoint_and_resumed_it_ends_where_an_unbroken_run_does(
    root, finished, tmp_path
):
    config = recipe(root, "killed")
    # The second; the first is in .last.ckpt.a.
    run_killed(config, tmp_path, partial(die_in_checkpoint, ".last.ckpt.b/"))
    folder = root / "runs" / "killed"
    halves = [f for f in folder.rglob(".last.ckpt.b/**/*.pt") if f.read_bytes() == b"half of a"]
    assert halves, "it was killed elsewhere"
    assert (folder / "checkpoints" / "last.ckpt").resolve().name == ".last.ckpt.a"
    assert not (folder / "model").exists()
    for status, said in command_line(
        2, tmp_path, "fit", "--config", config, "--ckpt_path", "last"
    ).end():
        assert status == 0, said
    one, other = adapter(finished / "model"), adapter(folder / "model")
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_killed_in_the_consolidation_an_offloaded_run_exports_the_same_model(
    root, finished, tmp_path
):
    config = recipe(root, "offloaded", trainer={"strategy": "deepspeed_stage_3_offload"})
    run_killed(config, tmp_path, partial(die_in_model_folder, "/.model."))
    folder = root / "runs" / "offloaded"
    assert list(folder.glob(".model.*/**/adapter_model.safetensors")), "it was killed elsewhere"
    assert not (folder / "model").exists()
    out = str(root / "of_offloaded")
    assert main(["export", "--run", str(folder), "--checkpoint", "last", "--out", out]) == 0
    one, other = adapter(finished / "model"), adapter(Path(out))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        # Two implementations of Adam: what differs in the last digits is divided by small numbers.
        assert torch.allclose(tensor, other[name], rtol=0, atol=1e-4), name


def test_another_number_of_ranks_is_refused_with_the_way_on(root, finished, tmp_path):
    flags = ["--config", str(root / "whole.yaml"), "--ckpt_path", "last", "--trainer.devices=1"]
    [(status, told)] = command_line(1, tmp_path, "fit", *flags).end()
    assert status == 2
    assert "was written by 2 ranks and this run has 1" in told
    assert "model.start_from" in told
    assert "Traceback" not in told


def test_a_checkpoint_that_would_run_code_is_refused(finished, tmp_path):
    folder = tmp_path / "evil.ckpt"
    shutil.copytree(finished / "checkpoints" / "last.ckpt", folder)
    _refuse_objects(folder)
    file = next(folder.glob("checkpoint/*model_states.pt"))
    torch.save({"module": Path("anything")}, file)
    with pytest.raises(UserError, match=r"model_states.pt would run .*Path"):
        _refuse_objects(folder)
