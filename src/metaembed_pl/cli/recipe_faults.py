"""Find all faults of a recipe at once; training would stop at the first.

Unknown keys and wrong types are found by comparing the recipe with the signatures of its classes.
Faults that only Lightning's parser finds: parse repeatedly, each time without the key that was
refused last. Values out of range: construct each part separately.
"""

import copy
import inspect
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from metaembed_pl.cli.recipe_keys import (
    PARTS,
    content_of,
    faults_of,
    in_words,
    inlined,
    keys_of,
    made,
)
from metaembed_pl.cli.recipe_path import (
    as_sources,
    read_yaml,
    with_recipes_found,
    with_settings,
)
from metaembed_pl.cli.train import PARSING, RecipeParser, RunConfig
from metaembed_pl.data.datamodule import RetrievalDataModule
from metaembed_pl.errors import UserError
from metaembed_pl.training.module import MetaEmbedModule


@dataclass
class Recipe:
    """A recipe, as far as it could be read.

    Args:
        faults: one line each.
        config: the parsed recipe without its faulty keys; None if nothing could be parsed.
        model: the module, not yet configured; None if its settings are faulty.
        data: the data module; likewise.
        run: likewise.
    """

    faults: list[str] = field(default_factory=list)
    config: Any = None
    model: MetaEmbedModule | None = None
    data: RetrievalDataModule | None = None
    run: RunConfig | None = None

    @property
    def faults_of_fit(self) -> list[str]:
        """Without models that are not on this machine: `fit` looks for them on the hub."""
        return [fault for fault in self.faults if not fault.startswith("model.start_from")]


def read_recipe(paths: Path | Sequence[Path], overrides: Sequence[str] = ()) -> Recipe:
    """Parses a recipe; faulty keys are recorded and left out.

    Args:
        paths: one file or several: keys of later ones replace those of earlier ones, as in `fit`.
        overrides: `key=value`, as the flags of `fit`.
    """
    paths = [paths] if isinstance(paths, Path) else paths
    values: dict[str, Any] = {}
    for path in paths:
        values = _laid_over(values, _load(path))
    for override in overrides:
        _set(values, override, paths[0].parent)
    faults = list(faults_of(values))
    found = Recipe([str(fault) for fault in faults])
    for fault in reversed(faults):  # so that a list's later elements keep their places
        _remove(values, fault.path)
    values.setdefault("run", {}).setdefault("name", "unnamed")
    parser = recipe_parser()
    found.config = _parse(parser, values, found.faults)
    if found.config is None:
        return found
    if _drop_out_of_range(values, found):
        found.config = _parse(parser, values, found.faults)
    if found.config is not None:
        _make_parts(found)
    return found


def first_fault(argv: Sequence[str]) -> str | None:
    """What `check` says first about the recipe and the flags of a `fit`; None: nothing."""
    flags = [flag.partition("=") for flag in with_settings(with_recipes_found([*argv]))]
    configs = [Path(value) for name, _, value in flags if name in ("--config", "-c")]
    settings = [value for name, _, value in flags if name == "--set"]
    return next(iter(read_recipe(configs, settings).faults_of_fit), None) if configs else None


def recipe_parser() -> RecipeParser:
    """The parser of `fit`, without its verbs."""
    parser = RecipeParser(**PARSING)
    parser.add_argument("--seed_everything", type=bool | int, default=0)
    parser.add_argument("--ckpt_path", type=str | None, default=None)
    parser.add_argument("--weights_only", type=bool | None, default=None)
    for key, kind in PARTS.items():
        if kind is RunConfig:
            parser.add_class_arguments(kind, key)
        else:
            parser.add_lightning_class_args(kind, key)
    return parser


def _load(path: Path) -> dict[str, Any]:
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected a recipe with keys such as run, model, data and trainer")
    for part, kind in PARTS.items():
        if isinstance(values.get(part), dict):
            values[part] = inlined(values[part], kind, path.parent)
    return values


def _laid_over(values: Any, others: Any) -> Any:
    """Merges two recipes: keys of the second one replace those of the first; lists as a unit.

    >>> _laid_over({"a": {"b": 1, "c": [1, 2]}}, {"a": {"c": [3]}, "d": 4})
    {'a': {'b': 1, 'c': [3]}, 'd': 4}
    """
    if not isinstance(values, dict) or not isinstance(others, dict):
        return others
    return values | {key: _laid_over(values.get(key), other) for key, other in others.items()}


def _set(values: dict[str, Any], override: str, folder: Path) -> None:
    """Changes a key, as a flag of `fit` does; `KEY+=VALUE` appends to a list.

    Files that a value names are relative to the working directory or the recipe.
    """
    name, equals, text = override.removeprefix("--").partition("=")
    if not equals or not name:
        raise UserError(
            f"--set takes KEY=VALUE such as data.global_batch_size=32, got {override!r}"
        )
    adds, name = name.endswith("+"), name.removesuffix("+")
    *parents, last = name.split(".")
    place = values
    for parent in parents:
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise UserError(f"--set {override}: {parent} has no keys in this recipe")
    try:
        value = yaml.safe_load(as_sources(name, text))
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: not a YAML value: {error}") from error
    kind = _kind_of(name.split("."))
    value = inlined(inlined(value, kind, Path()), kind, folder)
    if adds:
        value = [*(place.get(last) or []), *(value if isinstance(value, list) else [value])]
    place[last] = value


def _kind_of(path: Sequence[str]) -> Any:
    """The type of a key; None if unknown."""
    kind: Any = PARTS.get(path[0])
    for key in path[1:]:
        made_of, is_list = content_of(kind)
        kind = None if made_of is None or is_list else keys_of(made_of).get(key)
    return kind


def _remove(values: Any, path: Sequence[str | int]) -> None:
    with suppress(KeyError, IndexError):
        for key in path[:-1]:
            values = values[key]
        del values[path[-1]]


def _get(values: Any, path: Sequence[str]) -> Any:
    for key in path:
        if not isinstance(values, dict) or key not in values:
            raise KeyError(key)
        values = values[key]
    return values


def _parse(parser: RecipeParser, values: dict[str, Any], faults: list[str]) -> Any:
    """The parsed recipe without keys whose values are refused; None if that fails."""
    removed: set[str] = set()
    while True:
        try:
            return parser.parse_object(copy.deepcopy(values))
        except UserError as error:
            name = _refused(str(error), values)
            if name is None:
                if not any(key in str(error) for key in removed):
                    faults.append(str(error))
                return None
            value = _get(values, name.split("."))
            faults.append(f"{name}: {_why(str(error), name, value)}")
            removed.add(name)
            _remove(values, name.split("."))


def _refused(message: str, values: dict[str, Any]) -> str | None:
    """The key of the recipe that an error of the parser is about."""
    for name in re.findall(r"[\w.]+", message):
        while "." in name:
            try:
                _get(values, name.split("."))
            except KeyError:
                name = name.rpartition(".")[0]
            else:
                return name
    return None


def _why(message: str, name: str, value: Any) -> str:
    """The expected type, instead of the parser's list of everything it tried."""
    part, _, key = name.partition(".")
    kind = inspect.signature(PARTS[part]).parameters.get(key)
    if kind is None or isinstance(kind.annotation, str):
        return message if len(message) < 400 else f"{message[:400]} ..."
    return f"expected {in_words(kind.annotation)}, got {value!r}"


def _drop_out_of_range(values: dict[str, Any], found: Recipe) -> bool:
    """Builds each part of the model separately; faulty ones are recorded and left out."""
    dropped = False
    for key, kind in keys_of(MetaEmbedModule).items():
        if content_of(kind)[0] is None:
            continue
        try:
            made(found.config.model.as_dict().get(key), kind, f"model.{key}")
        except UserError as error:
            found.faults.append(str(error))
            values["model"].pop(key, None)
            dropped = True
    return dropped


def _make_parts(found: Recipe) -> None:
    """Builds run, data and model separately, to find the faults of each."""
    start_from = found.config.model.start_from
    is_there = start_from is None or Path(start_from).exists()
    if not is_there:  # a hub id would be downloaded, weights and all
        found.faults.append(
            f"model.start_from: {start_from} does not exist: train or download it first"
        )
    for key in ("run", "data", *(["model"] if is_there else [])):
        try:
            setattr(found, key, made(found.config[key].as_dict(), PARTS[key], key))
        except UserError as error:
            found.faults.append(str(error))
