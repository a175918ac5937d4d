"""The keys of a recipe and their types, read from the signatures of its classes."""

import copy
import dataclasses
import inspect
import re
import types
import typing
from argparse import ArgumentError
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from lightning.pytorch import Trainer

from metaembed_pl.cli.recipe_path import OTHER_KEYS, read_yaml
from metaembed_pl.cli.train import RunConfig
from metaembed_pl.data.datamodule import RetrievalDataModule
from metaembed_pl.errors import UserError, did_you_mean
from metaembed_pl.training.module import MetaEmbedModule

PARTS: dict[str, type] = {
    "run": RunConfig,
    "model": MetaEmbedModule,
    "data": RetrievalDataModule,
    "trainer": Trainer,
}
Where = tuple[str | int, ...]
WORDS: dict[Any, str] = {
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    list: "a list",
    tuple: "a list",
    dict: "keys",
    type(None): "null",
}
PLURALS = {int: "integers", float: "numbers", str: "texts"}


def inlined(value: Any, kind: Any, folder: Path) -> Any:
    """The value with the files it names (`backbone: backbones/tiny.yaml`) in their place."""
    made_of, is_list = content_of(kind)
    if made_of is None:
        return value
    if isinstance(value, str) and (folder / value).is_file():
        value = read_yaml(folder / value)
    if is_list and isinstance(value, list):
        return [inlined(item, made_of, folder) for item in value]
    if not is_list and isinstance(value, dict):
        hints = keys_of(made_of)
        return {key: inlined(item, hints.get(key), folder) for key, item in value.items()}
    return value


def content_of(kind: Any) -> tuple[Any, bool]:
    """The class whose keys a value of this type has, and whether it is a list of such values."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        kinds = [content_of(one) for one in typing.get_args(kind)]
        return next((found for found in kinds if found[0] is not None), (None, False))
    if typing.get_origin(kind) is list:
        made_of, _ = content_of(typing.get_args(kind)[0])
        return made_of, True
    ours = kind in PARTS.values() or dataclasses.is_dataclass(kind)
    return (kind, False) if ours else (None, False)


def keys_of(kind: Any) -> dict[str, Any]:
    """The keys of a class with their types."""
    if kind is Trainer:  # its types are Lightning's own affair
        return dict.fromkeys(inspect.signature(Trainer).parameters)
    function: Callable = kind.__init__
    return {k: v for k, v in typing.get_type_hints(function).items() if k != "return"}


def made(value: Any, kind: Any, key: str) -> Any:
    """An object of this type from parsed values (dicts, lists).

    Args:
        value: of the key.
        kind: its type.
        key: for messages.

    Raises:
        UserError: a value is out of range; the message begins with its key.
    """
    made_of, is_list = content_of(kind)
    if made_of is None or value is None:
        return value
    if is_list:
        return [made(item, made_of, f"{key}[{n}]") for n, item in enumerate(value)]
    hints = keys_of(made_of)
    parts = {name: made(item, hints.get(name), f"{key}.{name}") for name, item in value.items()}
    try:
        return made_of(**parts)
    except UserError as error:
        raise UserError(_with_key(key, str(error), hints)) from error


def _with_key(key: str, message: str, names: Collection[str]) -> str:
    """A message that begins with the key it is about; many name a part of the key already.

    >>> _with_key("model.loss.query_spread", "margin is a cosine", ["weight", "margin"])
    'model.loss.query_spread.margin is a cosine'
    >>> _with_key("model.optimizer", "optimizer.lr must be positive", ["lr"])
    'model.optimizer.lr must be positive'
    >>> _with_key("data", "data/pets: held_out is a share", ["train"])
    'data: data/pets: held_out is a share'
    """
    for known in (key, key.rpartition(".")[2]):
        if re.match(rf"{re.escape(known)}[.:]", message):
            return key + message.removeprefix(known)
    between = "." if message.partition(" ")[0] in names else ": "
    return f"{key}{between}{message}"


@dataclass(frozen=True)
class Fault:
    """A faulty place in a recipe, and the reason."""

    path: Where
    why: str

    def __str__(self) -> str:
        return f"{dotted(self.path)}: {self.why}"


def faults_of(values: dict[str, Any]) -> Iterator[Fault]:
    """Unknown keys, each with the nearest valid one, and values of a wrong type.

    The types of the trainer's values are Lightning's.
    """
    for key in values:
        if key not in PARTS and key not in OTHER_KEYS:
            yield _unknown((key,), [*PARTS, *OTHER_KEYS])
    for part, kind in PARTS.items():
        yield from _faults_in(values.get(part, {}), kind, (part,))


def _faults_in(value: Any, kind: Any, path: Where) -> Iterator[Fault]:
    made_of, is_list = content_of(kind)
    if made_of is None or value is None:
        if kind is not None and not _accepts(kind, value):
            yield Fault(path, f"expected {in_words(kind)}, got {value!r}")
    elif is_list and isinstance(value, list):
        for number, item in enumerate(value):
            yield from _faults_in(item, made_of, (*path, number))
    elif is_list or not isinstance(value, dict):
        yield Fault(path, f"expected {'a list' if is_list else 'keys'}, got {value!r}")
    else:
        hints = keys_of(made_of)
        for name, parameter in inspect.signature(made_of).parameters.items():
            if parameter.default is parameter.empty and name not in value:
                yield Fault(path, f"it needs a {name!r}")
        for key, item in value.items():
            if key in hints:
                yield from _faults_in(item, hints[key], (*path, key))
            else:
                yield _unknown((*path, key), list(hints))


def _accepts(kind: Any, value: Any) -> bool:
    if isinstance(value, str) and "${" in value:  # taken from another key, later
        return True
    if value is None and content_of(kind)[0] is None:  # the parser takes it for "not given"
        return kind in (None, Any) or type(None) in typing.get_args(kind)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=kind)
    try:
        parser.parse_object({"value": copy.deepcopy(value)})
    except ArgumentError:
        return False
    return True


def in_words(kind: Any) -> str:
    """A type in words.

    >>> in_words(list[int] | None), in_words(typing.Literal["both", "own"])
    ('a list of integers or null', "'both' or 'own'")
    """
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return " or ".join(dict.fromkeys(map(in_words, typing.get_args(kind))))
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    plain = typing.get_origin(kind) or kind
    if plain is list and typing.get_args(kind)[0] in PLURALS:
        return f"a list of {PLURALS[typing.get_args(kind)[0]]}"
    return WORDS.get(plain, getattr(plain, "__name__", str(plain)))


def _unknown(path: Where, valid: list[str]) -> Fault:
    hint = did_you_mean(str(path[-1]), valid, 0.5) or f"; valid are {', '.join(sorted(valid))}"
    return Fault(path, f"no such key{hint}")


def dotted(path: Sequence[str | int]) -> str:
    """A path of keys with dots.

    >>> dotted(["data", "train", 0, "path"])
    'data.train[0].path'
    """
    text = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
    return text.removeprefix(".")
