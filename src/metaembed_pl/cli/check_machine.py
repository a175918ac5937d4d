"""Checks of the machine and of the folder that a recipe runs in."""

from importlib.util import find_spec
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry

from metaembed_pl.cli.recipe_faults import Recipe
from metaembed_pl.errors import did_you_mean


def run_faults(recipe: Recipe) -> list[str]:
    """A run of that name, and packages that the recipe needs and that are not here."""
    faults = []
    run = recipe.run
    starts = run is not None and not run.overwrite and not recipe.config.ckpt_path
    if run is not None and starts and run.last_checkpoint.exists():
        faults.append(
            f"run: {run.path} contains a run already: choose another run.name, continue it with "
            "--ckpt_path last, or start over with --run.overwrite=true"
        )
    strategy = recipe.config.trainer.strategy
    if isinstance(strategy, str):
        known = {"auto", *StrategyRegistry.available_strategies()}
        if strategy not in known:
            hint = did_you_mean(strategy, known) or f"; known are {', '.join(sorted(known))}"
            faults.append(f"trainer.strategy: no strategy {strategy!r}{hint}")
        elif "deepspeed" in strategy and find_spec("deepspeed") is None:
            faults.append(
                f"trainer.strategy: {strategy} needs deepspeed: pip install metaembed-pl[deepspeed]"
            )
    return faults


def hardware(trainer: Any, num_gpus: int | None, faults: list[str]) -> tuple[int, bool]:
    """How many ranks there will be, and whether they are GPUs."""
    has_gpu = num_gpus is not None or torch.cuda.is_available()
    on_gpu = trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and has_gpu)
    if num_gpus is not None:
        return num_gpus, on_gpu
    devices = trainer.devices
    if devices in ("auto", -1, "-1"):
        devices = max(1, torch.cuda.device_count()) if on_gpu else 1
    if isinstance(devices, str) and not devices.isdecimal():
        devices = devices.split(",")
    count = (len(devices) if isinstance(devices, list) else int(devices)) * trainer.num_nodes
    if count < 1:
        faults.append(f"trainer.devices: expected at least 1, got {trainer.devices}")
    return max(1, count), on_gpu
