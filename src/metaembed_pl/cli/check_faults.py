"""Faults of a recipe that its keys alone do not show: run folder, strategy, devices, loss."""

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import StrategyRegistry

from metaembed_pl.cli.check_data import Data
from metaembed_pl.cli.recipe_effects import keys_without_effect
from metaembed_pl.cli.recipe_faults import Recipe
from metaembed_pl.errors import UserError, did_you_mean
from metaembed_pl.model.weightless import WeightlessModel
from metaembed_pl.training.module import MetaEmbedModule
from metaembed_pl.training.objective import check_widths
from metaembed_pl.training.optimizer import NO_MUON
from metaembed_pl.training.teacher import refuse_other_inputs, refuse_unscored


def run_faults(recipe: Recipe) -> list[str]:
    """Keys without an effect, an existing run of the same name, a strategy that cannot be used."""
    faults = keys_without_effect(recipe.config)
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
        optimizer = recipe.config.model.optimizer
        if "deepspeed" in strategy and optimizer and optimizer.muon_lr:
            faults.append(NO_MUON)
    return faults


def hardware(trainer: Any, num_gpus: int | None, faults: list[str]) -> tuple[int, bool]:
    """The number of ranks, and whether they are GPUs."""
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


def loss_faults(
    module: MetaEmbedModule, made: WeightlessModel | None, data: Data | None
) -> Iterator[str]:
    """What `fit` would refuse, one line each; `made` and `data` are None if they are faulty."""
    teacher, checks = module.loss.config.teacher, []
    if made is not None:
        checks.append(partial(check_widths, module.loss.widths, made.model.width))
    folder = teacher and teacher.model
    if teacher and not folder:
        checks += [partial(refuse_unscored, *source) for source in (data.sources if data else [])]
    elif folder and not Path(folder).exists():  # a hub id would be downloaded
        yield (f"model.loss.teacher.model: {folder} does not exist: train or download it first")
    elif folder and made is not None:
        unknown = () if made.counts_tokens else ("tokenizer",)
        checks.append(partial(refuse_other_inputs, folder, made.model, unknown))
    for check in checks:
        try:
            check()
        except UserError as error:
            yield str(error)
