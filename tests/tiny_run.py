"""A whole `fit` of a tiny model: its recipe, and processes that run it."""

import os
import signal
import time
from pathlib import Path

import yaml

import tiny
from ranks import Ranks, command_line


def data(root: Path) -> Path:
    """Shards to train on and to test on."""
    tiny.shards(root / "train", 40)
    tiny.shards(root / "test", 12, first=500)
    return root


def recipe(root: Path, folder: Path, **changes: object) -> Path:
    """The file of a recipe on these shards, which trains below `folder`.

    Changes are dotted keys with `__` for the dots.
    """
    train, test = str(root / "train"), str(root / "test")
    values = {
        "run": {"name": "r", "folder": str(folder / "runs"), "checkpoint_every_n_steps": 1000},
        "model": {
            "backbone": {
                "scratch": tiny.QWEN25_VL,
                "tokenizer": {"vocab_size": 300, "sources": [train]},
                "max_pixels": 56 * 56,
            },
            "groups": ["1x1", "2x4"],
            "layout": "own",
            "optimizer": {"lr": 1e-3, "schedule": "constant_with_warmup", "warmup": 0.0},
        },
        "data": {
            "train": [{"path": train}],
            "val": [{"path": test}],
            "test": [{"path": test}],
            "global_batch_size": 8,
            "num_workers": 0,
        },
        "trainer": {
            "max_steps": 6,
            "val_check_interval": 1000,
            "accelerator": "cpu",
            "log_every_n_steps": 1,
            "logger": False,
        },
    }
    for key, value in changes.items():
        place, parts = values, key.split("__")
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        if value is None:
            place.pop(parts[-1], None)
        else:
            place[parts[-1]] = value
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def started(file: Path, *arguments: str, count: int = 1, said: str = "said") -> Ranks:
    """`fit` in processes of its own."""
    return command_line(count, file.parent / said, "fit", "--config", str(file), *arguments)


def wait_for(run: Ranks, words: str, timeout_s: float = 200) -> None:
    """Until rank 0 has said something."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and run.processes[0].exitcode is None:
        if run.files[0].exists() and words in run.files[0].read_text():
            return
        time.sleep(0.05)
    raise AssertionError(f"{words!r} was never said: {run._said()}")


def signalled(run: Ranks, number: signal.Signals, words: str) -> list[tuple[int, str]]:
    """How a run ends that gets a signal, on all its ranks, once it has said something."""
    wait_for(run, words)
    for process in run.processes:
        os.kill(process.pid, number)
    return run.end()
