"""The space that `tune` searches: keys of a recipe, each with a list of choices or a range."""

import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from metaembed_pl.cli.recipe_path import find_recipe, read_yaml
from metaembed_pl.errors import UserError, did_you_mean
from metaembed_pl.files import as_on_disk

Space = dict[str, Any]
RANGE_KEYS = ("low", "high", "log", "step")
EXAMPLE = "model.optimizer.lr: {low: 3.0e-4, high: 3.0e-3, log: true}"
REFUSED = {
    "run.name": "each trial has its own",
    "run.folder": "it is --out",
    "run.overwrite": "an interrupted trial continues",
    "ckpt_path": "an interrupted trial continues",
    "model.headline": "trials are compared by it",
    "data.val": "trials are compared on it",
}
EXPONENT = re.compile(r"[-+]?\d+\.?\d*[eE][-+]?\d+")
"""A number that YAML reads as a text, unless it has a dot and a sign: 1e-3."""


def read_space(file: Path) -> Space:
    """The keys to search, each with a list of choices or a range.

    Raises:
        UserError: the file cannot be read, or a key has no valid values; names the key.
    """
    file = as_on_disk(file)
    if not file.exists():
        raise UserError(
            f"there is no {file}: --space names a YAML file with lines such as {EXAMPLE}"
        )
    space = read_yaml(file)
    if not isinstance(space, dict) or not space:
        raise UserError(f"{file} must map keys of a recipe to their values, such as {EXAMPLE}")
    space = {str(key): _numbers_read(values) for key, values in space.items()}
    for key, values in space.items():
        if why := _fault(key, values):
            raise UserError(f"{file}: {key}: {why}, got {values!r}")
        for other in space:
            if key.startswith(f"{other}."):
                raise UserError(f"{file}: {key} is part of {other}: search one of them")
    return space


def _numbers_read(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _numbers_read(value) for key, value in values.items()}
    if isinstance(values, list):
        return [*map(_numbers_read, values)]
    is_number = isinstance(values, str) and EXPONENT.fullmatch(values)
    return float(values) if is_number else values


def _fault(key: str, values: Any) -> str | None:
    for refused, why in REFUSED.items():
        if key == refused or key.startswith(f"{refused}."):
            return f"it cannot be searched, because {why}"
    if isinstance(values, list):
        return _fault_of_choices(values)
    if isinstance(values, dict):
        return _fault_of_range(values)
    return "expected a list of choices, or a range such as {low: 1, high: 4}"


def _fault_of_choices(values: list[Any]) -> str | None:
    try:
        texts = [*map(json.dumps, values)]
    except TypeError:
        return "choices are numbers, texts, true, false, null, or lists and keys of these"
    if len(values) < 2:
        return "expected at least two choices, or a range such as {low: 1, high: 4}"
    return None if len({*texts}) == len(texts) else "a choice occurs twice"


def _fault_of_range(values: dict[str, Any]) -> str | None:
    for key in values:
        if key not in RANGE_KEYS:
            hint = did_you_mean(str(key), RANGE_KEYS)
            return f"a range has low, high, and perhaps log or step, and no {key!r}{hint}"
    numbers = [values[name] for name in ("low", "high", "step") if name in values]
    if "low" not in values or "high" not in values or not all(map(_is_number, numbers)):
        return "a range needs numbers for low and high, such as {low: 1, high: 4}"
    low, high, step = values["low"], values["high"], values.get("step")
    log = values.get("log", False)
    if not low < high:
        return "low must be below high"
    if not isinstance(log, bool):
        return "log is true or false"
    if log and (low <= 0 or step is not None):
        return "a range with log: true needs low above 0, and has no step"
    if step is not None and not 0 < step <= high - low:
        return "step must be above 0, and at most high - low"
    if is_whole(values) and isinstance(step, float):
        return "step must be an integer if low and high are"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def is_whole(values: dict[str, Any]) -> bool:
    """Whether a range has integers only."""
    return all(isinstance(values[name], int) for name in ("low", "high"))


def refuse_faulty(file: Path, space: Space, configs: Sequence[str], given: Sequence[str]) -> int:
    """Refuse, before the first trial, what `fit` would refuse in one of them.

    Every choice and both ends of every range are laid over the recipe once; not all combinations.

    Args:
        file: of the space.
        space: its content.
        configs: of the recipe.
        given: its keys that are changed in all trials, as KEY=VALUE.

    Returns:
        The steps of the recipe; 0 if it has no limit.
    """
    from metaembed_pl.cli.recipe_faults import read_recipe

    paths = [Path(find_recipe(config)) for config in configs]
    num_steps = 0
    for where, settings in (("", {}), *((f"{file}: ", settings) for settings in _corners(space))):
        changed = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
        recipe = read_recipe(paths, [*given, *changed])
        if recipe.faults_of_fit:
            raise UserError(f"{where}{recipe.faults_of_fit[0]}")
        if recipe.data is not None and not recipe.data.eval_sources["val"]:
            raise UserError("data.val: tune compares trials on validation sets, and there are none")
        trainer = recipe.config.trainer
        every, last = trainer.val_check_interval, trainer.max_steps
        last *= trainer.accumulate_grad_batches  # validations are counted in batches
        if not settings:
            num_steps = max(trainer.max_steps, 0)
        if settings and isinstance(every, int) and 0 < last < every:
            raise UserError(
                f"trainer.val_check_interval: {every} is above trainer.max_steps, {last}: "
                "tune compares validations, and there would be none"
            )
    return num_steps


def _corners(space: Space) -> Iterator[dict[str, Any]]:
    """Settings in which each choice, and each end of a range, occurs at least once."""
    values = {
        key: of_key if isinstance(of_key, list) else [of_key["low"], of_key["high"]]
        for key, of_key in space.items()
    }
    for number in range(max(map(len, values.values()))):
        yield {key: of_key[number % len(of_key)] for key, of_key in values.items()}
