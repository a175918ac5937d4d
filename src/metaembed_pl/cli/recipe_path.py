"""Recipes on a command line: where they are, and the flags that change their keys.

`fit` and `check` take the same flags: `--data.train=FOLDER`, `--trainer.max_steps=10`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from metaembed_pl.errors import UserError
from metaembed_pl.files import refuse_special_file

MAX_BYTES, MAX_NODES = 1_000_000, 10_000

OTHER_KEYS = ("seed_everything", "ckpt_path", "weights_only")
SOURCES = ("data.train", "data.val", "data.test")


def recipe_folder() -> Path:
    """The folder of the recipes that come with the package."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "recipes"
    return installed if installed.is_dir() else package.parents[1] / "recipes"


def with_recipes_found(argv: list[str]) -> list[str]:
    """Arguments of `fit` in which recipes are full paths and sources are lists.

    `--config NAME` of one of our recipes becomes its path; `--data.train=FOLDER`, and likewise
    `--data.val` and `--data.test`, become a list of that one source.
    """
    found = []
    for flag, value in _flags(argv):
        if flag in ("--config", "-c") and value is not None:
            value = find_recipe(value)
        elif value is not None:
            value = as_sources(flag.removeprefix("--"), value)
        found.append(flag if value is None else f"{flag}={value}")
    return found


def with_settings(argv: list[str]) -> list[str]:
    """Arguments of `check` in which flags that change a key, as `fit` has them, are `--set`.

    >>> with_settings(["check", "--config", "r.yaml", "--trainer.max_steps", "9", "--json"])
    ['check', '--config=r.yaml', '--set=trainer.max_steps=9', '--json']
    """
    found = []
    for flag, value in _flags(argv):
        name = flag.removeprefix("--")
        is_key = flag.startswith("--") and ("." in name or name in OTHER_KEYS)
        given = flag if value is None else f"{flag}={value}"
        found.append(f"--set={given.removeprefix('--')}" if is_key else given)
    return found


def _flags(argv: list[str]) -> Iterator[tuple[str, str | None]]:
    """Each argument with its value, in the form `--flag=value` or `--flag value`."""
    rest = list(argv)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        takes_next = "." in flag or flag in ("--config", "-c", *(f"--{key}" for key in OTHER_KEYS))
        if equals:
            yield flag, value
        elif flag.startswith("-") and takes_next and rest and not rest[0].startswith("--"):
            yield flag, rest.pop(0)
        else:
            yield flag, None


def as_sources(key: str, value: str) -> str:
    """A folder in the place of a list of sources, as that list; any other value as it is.

    >>> as_sources("data.train", "data/pets"), as_sources("data.seed", "1")
    ('[{"path": "data/pets"}]', '1')
    """
    is_plain = not value.startswith(("[", "{")) and Path(value).suffix not in (".yaml", ".yml")
    is_set = value not in ("", "null")
    return json.dumps([{"path": value}]) if key in SOURCES and is_plain and is_set else value


def read_yaml(path: Path) -> Any:
    """The content of a YAML file.

    Raises:
        UserError: it is not YAML, too large, repeats a key, or aliases expand to too many values.
    """
    import yaml  # not at the top: `recipes` and other light verbs do without

    refuse_special_file(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes, so it is not a recipe")
        text = path.read_text(encoding="utf-8")
        _count_nodes(path, yaml.compose(text, yaml.SafeLoader), {})
        return yaml.safe_load(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from error
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a readable YAML file: {reason}") from error


def _count_nodes(path: Path, node: Any, counted: dict[int, int | None]) -> int:
    """The number of nodes below a node; aliases are counted each time."""
    import yaml

    if id(node) not in counted:
        counted[id(node)] = None
        mapping = node.value if isinstance(node, yaml.MappingNode) else []
        keys: set[str] = set()
        for key, _ in mapping:
            if isinstance(key, yaml.ScalarNode) and key.value in keys and key.value != "<<":
                line = key.start_mark.line + 1
                raise UserError(f"{path}:{line}: the key {key.value!r} occurs twice")
            keys.add(str(key.value))
        below = [part for pair in mapping for part in pair]
        below += node.value if isinstance(node, yaml.SequenceNode) else []
        counted[id(node)] = 1 + sum(_count_nodes(path, part, counted) for part in below)
    count = counted[id(node)]
    if count is None or count > MAX_NODES:
        why = "an alias contains itself" if count is None else f"more than {MAX_NODES:,} values"
        raise UserError(f"{path}: {why}, so it is not a recipe")
    return count


def find_recipe(name: str) -> str:
    """The path of a recipe: a file, or one of ours by name, such as `emoji`."""
    if Path(name).is_file():  # a folder of data may have the name of a recipe
        read_yaml(Path(name))
        return name
    folder = recipe_folder()
    for candidate in (folder / Path(name).name, folder / f"{name}.yaml"):
        if candidate.is_file():
            return str(candidate)
    ours = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise UserError(f"no recipe at {name}; recipes that come with the package: {ours}")
