"""A run without memory, without room on the disk, without its data: it ends in one clear line."""

import copy
import os
import random
import re
import resource
import shutil
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

import faults
import tiny
from metaembed_pl.cli.failures import failures_in_one_line
from metaembed_pl.cli.main import main
from metaembed_pl.errors import UserError
from metaembed_pl.training.checkpoints import AtomicCheckpointIO
from metaembed_pl.training.watchdog import Watch
from ranks import command_line


@pytest.fixture
def recipe(tmp_path) -> dict:
    """Four steps of a tiny model, a checkpoint after each."""
    train = str(tiny.shards(tmp_path / "train", 40))
    return {
        "run": {"name": "tiny", "folder": str(tmp_path / "runs"), "checkpoint_every_n_steps": 1},
        "model": {
            "backbone": {
                "scratch": copy.deepcopy(tiny.QWEN25_VL),
                "tokenizer": {"vocab_size": 300, "sources": [train]},
                "max_pixels": 56 * 56,
            },
            "groups": ["1x1", "2x4"],
            "layout": "own",
        },
        "data": {"train": [{"path": train}], "global_batch_size": 8, "num_workers": 0},
        "trainer": {"max_steps": 4, "accelerator": "cpu", "logger": False},
    }


def written(recipe: dict) -> str:
    folder = Path(recipe["run"]["folder"])
    folder.mkdir(exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return str(folder / "recipe.yaml")


def fit(recipe: dict, *flags: str) -> int:
    return main(["fit", "--config", written(recipe), *flags])


def ask_for(recipe: dict, **fault: object) -> None:
    recipe["trainer"]["callbacks"] = [{"class_path": "faults.Fault", "init_args": fault}]


def last(recipe: dict) -> Path:
    return Path(recipe["run"]["folder"]) / "tiny" / "checkpoints" / "last.ckpt"


def steps_done(recipe: dict) -> int:
    return torch.load(last(recipe), weights_only=True)["global_step"]


def test_a_step_without_memory_names_the_keys_to_lower(recipe, tmp_path):
    """One product of the MLP alone is larger than what is left when the second step starts."""
    width = 60_000
    recipe["model"]["backbone"]["scratch"]["text_config"]["intermediate_size"] = width
    ask_for(recipe, what="starve", step=1)
    [(status, error)] = command_line(1, tmp_path, "fit", "--config", written(recipe)).end()
    assert status == 2, error
    line = error.strip().splitlines()[-1]
    assert line.startswith("metaembed-pl: out of memory: ")
    found = re.search(
        r"step 1 of source train, 8 pairs on this rank, rows of (\d+) and (\d+) tokens", line
    )
    of_queries, of_candidates = map(int, found.groups())
    assert of_queries > 2
    # Two calls of two layers, each of which keeps at least three states of that width in fp32.
    kept = 2 * 3 * 4 * width * (8 * of_queries + 16 * of_candidates) / 2**30
    estimated = float(re.search(r"estimated (\S+) GiB \(activations", line)[1])
    assert kept < estimated < 3 * kept
    keys = [
        "model.backbone.gradient_checkpointing: true",
        "trainer.precision: bf16-true",
        f"model.gradient_cache.max_tokens: {16 * of_candidates // 4} ",
        "data.global_batch_size: ",
        "data.num_negatives",
        "model.backbone.max_pixels",
    ]
    places = [line.find(key) for key in keys]
    assert -1 not in places
    assert places == sorted(places)
    assert steps_done(recipe) == 1


def test_a_cached_step_without_memory_names_the_chunk_to_lower(recipe, tmp_path):
    recipe["model"]["backbone"]["scratch"]["text_config"]["intermediate_size"] = 60_000
    recipe["model"]["gradient_cache"] = {"max_tokens": 5000}
    ask_for(recipe, what="starve", step=0)
    [(status, error)] = command_line(1, tmp_path, "fit", "--config", written(recipe)).end()
    assert status == 2, error
    line = error.strip().splitlines()[-1]
    assert line.startswith("metaembed-pl: out of memory: ")
    assert "cheapest first: model.gradient_cache.max_tokens: 2500 (smaller chunks" in line


def test_a_model_that_is_too_large_names_what_makes_it_smaller(recipe, tmp_path):
    recipe["model"]["backbone"]["scratch"]["text_config"]["intermediate_size"] = 2_000_000
    flags = "fit", "--config", written(recipe)
    [(status, error)] = command_line(1, tmp_path, *flags, first=faults.starve).end()
    assert status == 2, error
    line = error.strip().splitlines()[-1]
    assert line.startswith("metaembed-pl: out of memory: ")
    assert "you tried to allocate 256000000 bytes" in line
    for key in ("trainer.precision", "trainer.strategy: deepspeed_stage_3", "model.backbone.path"):
        assert key in line


def test_a_validation_without_memory_names_its_batch_size():
    watch = Watch()
    watch.note("validation, batch 0 of train")
    said = r"^out of memory, validation, batch 0 of train: .*; in validation, lower data.eval_batch"
    with pytest.raises(UserError, match=said), failures_in_one_line(watch):
        torch.empty(2**50)


@contextmanager
def largest_file(num_bytes: int):
    """As a full disk does, the system refuses to write more than this into a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_last_checkpoint_which_resumes(recipe, capsys):
    assert fit(recipe, "--trainer.max_steps=2") == 0
    before = last(recipe).read_bytes()
    with largest_file(len(before) // 2):
        assert fit(recipe, "--ckpt_path", "last") == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"{last(recipe)} could not be written: [Errno 27] File too large" in error
    assert "--ckpt_path last" in error
    assert last(recipe).read_bytes() == before
    assert {file.name for file in last(recipe).parent.iterdir()} <= {"last.ckpt", "best.ckpt"}
    assert fit(recipe, "--ckpt_path", "last") == 0
    assert steps_done(recipe) == 4


def test_a_kill_while_a_checkpoint_is_written_leaves_one_that_reads(tmp_path):
    """SIGKILL at random moments of a process that writes one checkpoint after the other."""
    path = tmp_path / "last.ckpt"
    state = {"weights": torch.zeros(1_000_000)}
    AtomicCheckpointIO().save_checkpoint(state | {"global_step": -1}, path)
    chance = random.Random(0)
    cut_off = 0
    for kill in range(20):
        child = os.fork()
        if child == 0:
            step = 1000 * kill
            while True:
                state["weights"].fill_(step)
                AtomicCheckpointIO().save_checkpoint(state | {"global_step": step}, path)
                step += 1
        time.sleep(chance.uniform(0.02, 0.08))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        cut_off += (tmp_path / ".last.ckpt.tmp").exists()
        found = torch.load(path, weights_only=True)
        assert (found["weights"] == max(0, found["global_step"])).all()
    assert cut_off > 0, "no kill came while a file was written"
    assert found["global_step"] >= 0


def test_pairs_of_a_shard_that_disappears_are_replaced_and_counted(recipe, caplog):
    train = Path(recipe["data"]["train"][0]["path"])
    shards = sorted(train.glob("*.tar"))
    ask_for(recipe, what="unlink", step=1, files=[str(shards[0])])
    assert fit(recipe) == 0
    lost = {r.getMessage() for r in caplog.records if "replaced a bad sample" in r.getMessage()}
    assert lost
    assert all(f"train/{shards[0].name}" in line and "No such file" in line for line in lost)
    saved = torch.load(last(recipe), weights_only=True)["RetrievalDataModule"]["bad_samples"]
    assert len(saved) == len(lost)


def test_a_run_that_loses_more_pairs_than_allowed_ends(recipe, capsys):
    train = Path(recipe["data"]["train"][0]["path"])
    ask_for(recipe, what="unlink", step=1, files=[str(f) for f in sorted(train.glob("*.tar"))[:3]])
    recipe["data"]["max_bad_samples"] = 4
    assert fit(recipe) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "more than data.max_bad_samples (4); the last one: train/" in error
    assert "No such file" in error
    shutil.rmtree(train)
    tiny.shards(train, 40)  # brought back
    del recipe["trainer"]["callbacks"]
    assert fit(recipe, "--ckpt_path", "last") == 0
    assert steps_done(recipe) == 4
