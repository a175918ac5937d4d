"""Ranks that hang, are killed, or lose their launcher: real processes, real signals."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import tiny
from metaembed_pl.training.watchdog import STATUS
from ranks import command_line

WAITS = """
import sys, time
from metaembed_pl.training.watchdog import Watch

def wait_in_vain():
    print("up", flush=True)
    time.sleep(20)

with Watch() as watch:
    watch.timeout_s = float(sys.argv[1])
    watch.note("training step 7, source pets, pairs a, b")
    wait_in_vain()
"""
LAUNCHES = "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])"
MOVES = """
import time
from metaembed_pl.training.watchdog import Watch

with Watch() as watch:
    watch.timeout_s = 2
    print("up", flush=True)
    for step in range(20):
        watch.note(f"step {step}")
        time.sleep(0.1)
"""


def python(*arguments: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "LOCAL_RANK"} | environment,
    )


def test_a_stalled_process_names_its_place_and_ends():
    process = python(WAITS, "1")
    _, error = process.communicate(timeout=60)
    assert process.returncode == STATUS
    assert re.search(
        r"rank 0, training step 7, source pets, pairs a, b: no progress for 1 s", error
    )
    assert "it is waiting in wait_in_vain (" in error
    assert "time.sleep(20)" in error or "in wait_in_vain" in error


def test_a_rank_ends_when_its_launcher_is_killed():
    launcher = python(LAUNCHES, WAITS, "0", LOCAL_RANK="1")
    assert launcher.stdout.readline() == "up\n"
    start = time.monotonic()
    launcher.kill()
    error = launcher.communicate(timeout=60)[1]  # until the rank has closed its end as well
    assert time.monotonic() - start < 10
    assert "its launcher has exited or was killed" in error


def test_a_process_of_nobodys_outlives_the_shell_that_started_it():
    shell = python(LAUNCHES, MOVES)
    assert shell.stdout.readline() == "up\n"
    shell.kill()
    assert shell.communicate(timeout=60)[1] == ""


def test_the_time_for_which_a_process_was_suspended_does_not_count():
    process = python(MOVES)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGSTOP)
    time.sleep(4)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 0


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> dict:
    """Six steps of a tiny model on two ranks, a checkpoint after each."""
    root = tmp_path_factory.mktemp("watchdog")
    train = str(tiny.shards(root / "train", 48))
    return {
        "run": {
            "name": "tiny",
            "folder": str(root / "runs"),
            "checkpoint_every_n_steps": 1,
            "stall_timeout_s": 60,
        },
        "model": {
            "backbone": {
                "scratch": tiny.QWEN25_VL,
                "tokenizer": {"vocab_size": 300, "sources": [train]},
                "max_pixels": 56 * 56,
            },
            "groups": ["1x1", "2x4"],
            "layout": "own",
        },
        "data": {"train": [{"path": train}], "global_batch_size": 8, "num_workers": 0},
        "trainer": {
            "max_steps": 6,
            "accelerator": "cpu",
            "devices": 2,
            "strategy": "ddp",
            "logger": False,
        },
    }


def fit(recipe: dict, *flags: str, **fault: object) -> tuple[list[int], list[str], float]:
    """Each rank's exit status and what it said; seconds from the last checkpoint to the end."""
    folder = Path(recipe["run"]["folder"])
    folder.mkdir(exist_ok=True)
    callbacks = [{"class_path": "faults.Fault", "init_args": fault}] if fault else []
    values = recipe | {"trainer": recipe["trainer"] | {"callbacks": callbacks}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    arguments = ["fit", "--config", str(folder / "recipe.yaml"), *flags]
    status, said = zip(*command_line(2, folder, *arguments).end(), strict=True)
    return list(status), list(said), time.time() - last(recipe).stat().st_mtime


def last(recipe: dict) -> Path:
    return Path(recipe["run"]["folder"]) / "tiny" / "checkpoints" / "last.ckpt"


def steps_done(recipe: dict) -> int:
    return torch.load(last(recipe), weights_only=True)["global_step"]


@pytest.mark.slow
def test_a_run_of_two_ranks_survives_a_hang_and_kills(recipe):
    """Rank 1 never arrives; then it is killed; then both are; then the run goes on to its end."""
    status, said, took_s = fit(recipe, "--run.stall_timeout_s=8", what="sleep", step=2, rank=1)
    assert status == [STATUS, STATUS]
    assert took_s < 30
    for rank, error in enumerate(said):
        place = rf"rank {rank} of 2, training step 2, source train, pairs (pair-\d+, ){{3}}pair-\d+"
        assert re.search(rf"{place}: no progress for \d+ s", error), error
    assert "it is waiting in on_before_backward (faults.py" in said[1]  # this keeps rank 0 waiting
    assert steps_done(recipe) == 2

    status, said, took_s = fit(recipe, "--ckpt_path", "last", what="kill", step=3, rank=1)
    assert status == [2, -signal.SIGKILL]
    assert took_s < 20
    assert re.search(r"rank 0 of 2, training step 3, .*connection to other ranks failed", said[0])
    assert "Traceback" not in said[0]
    assert steps_done(recipe) == 3

    status, said, took_s = fit(recipe, "--ckpt_path", "last", what="kill", step=4)
    assert -signal.SIGKILL in status
    assert all(status)
    assert steps_done(recipe) == 4

    status, said, _ = fit(recipe, "--ckpt_path", "last")
    assert status == [0, 0], said
    assert steps_done(recipe) == 6
