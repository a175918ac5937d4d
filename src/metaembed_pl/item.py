"""User data: items (text, image or both) and pairs (query, positive, hard negatives).

    >>> pair = Pair.parse({"id": "1", "query": "a red apple", "positive": {"text": "fruit"}})
    >>> pair.query.text, pair.target_id == pair.positive.uid
    ('a red apple', True)

They are validated only here; the rest of the package relies on it.
"""

import hashlib
import json
import math
import unicodedata
from collections.abc import Iterable, Iterator
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from numbers import Integral
from pathlib import Path
from typing import Any

from PIL import Image

from metaembed_pl.errors import UserError
from metaembed_pl.files import as_on_disk, read_lines, refuse_special_file
from metaembed_pl.picture import PICTURE_SUFFIXES, files_below, open_picture

ITEM_KEYS = ("text", "image", "id", "answers", "instruction", "score")
_PAIR_KEYS = ("id", "asks", "query", "positive", "negatives")


@dataclass(frozen=True)
class Item:
    """A text, an image, or both: a query or a candidate.

    Args:
        text: a text that is not blank.
        image: a file, an encoded image (bytes), or a PIL image.
        id: identifies the item; items with the same id are one candidate in an evaluation.
        answers: ids of everything this candidate answers; empty: only itself.
        instruction: the task, such as "Find the page that answers:". It is placed before the text,
            and does not change the item's identity.
        score: the score with its pair's query, written by `mine`.

    Raises:
        UserError: there is neither text nor image, or a value has the wrong type.

    Examples:
        >>> Item("flag of Japan", id="1F1EF-1F1F5").answer_ids
        ('1F1EF-1F1F5',)
    """

    text: str | None = None
    image: Path | bytes | Image.Image | None = None
    id: str | None = None
    answers: tuple[str, ...] = ()
    instruction: str | None = None
    score: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", as_id(self.id))
        for name in ("text", "id", "instruction"):
            _check_string(getattr(self, name), f"an item's {name}")
        if isinstance(self.image, (str, Path)):
            if str(self.image) in ("", "."):
                raise UserError("an item's image is an empty path: leave it out, or name a file")
            object.__setattr__(self, "image", Path(self.image))
        if self.image is not None and not isinstance(self.image, (Path, bytes, Image.Image)):
            raise UserError(
                "an item's image must be a path, bytes or a PIL image, "
                f"not {type(self.image).__name__}"
            )
        if self.text is None and self.image is None:
            raise UserError('an item needs a "text" or an "image"; it has neither')
        if not isinstance(self.answers, (list, tuple)):
            raise UserError(f"an item's answers must be a list of ids, not {self.answers!r}")
        object.__setattr__(self, "answers", tuple(map(as_id, self.answers)))
        for answer in self.answers:
            _check_string("" if answer is None else answer, "each of an item's answers")
        is_number = isinstance(self.score, (int, float)) and not isinstance(self.score, bool)
        if self.score is not None and not (is_number and math.isfinite(self.score)):
            raise UserError(f"an item's score must be a finite number, not {self.score!r}")

    @classmethod
    def parse(cls, value: "str | dict | Item", folder: Path | None = None) -> "Item":
        """Make an item from JSON or Python values; a bare string is a text.

        Args:
            value: a string, a dict with keys of `Item`, or an item (returned as it is).
            folder: image paths are relative to it, and must stay below it. None: paths are used
                as given, for trusted callers.

        Raises:
            UserError: an unknown key, neither text nor image, or a path that leaves `folder`.
        """
        if isinstance(value, Item):
            return value
        if isinstance(value, str):
            return cls(text=value)
        value = _checked_keys(value, ITEM_KEYS, "an item")
        if isinstance(value.get("image"), str) and folder is not None:
            value["image"] = _path_below(value["image"], folder)
        return cls(**value)

    @property
    def words(self) -> str | None:
        """The text that a model reads: the instruction, if any, and the text."""
        return " ".join(filter(None, (self.instruction, self.text))) or None

    def load_image(self) -> Image.Image | None:
        """Decode the image, upright, in RGB and over white; None: the item has no image.

        Raises:
            UserError: the file is missing, does not decode or is too large.
        """
        if self.image is None:
            return None
        return self.__dict__.get("decoded_image") or open_picture(self.image)

    def decoded(self) -> "Item":
        """The item with its picture decoded, so that a broken picture raises its error now.

        Raises:
            UserError: as `load_image`.
        """
        if self.image is None:
            return self
        # Hash the file, not its pixels: cheaper, and the same before and after.
        content, found = self.content, copy(self)
        picture = self.load_image()
        found.__dict__.update(image=picture, content=content, decoded_image=picture)
        return found

    def answering(self, answers: tuple[str, ...], score: float | None = None) -> "Item":
        """A copy of the item, with the answers and the score of another pair."""
        found = copy(self)
        found.__dict__.update(answers=answers, score=score)
        return found

    @property
    def uid(self) -> str:
        """The id, or else `content`: equal items have equal uids."""
        return self.content if self.id is None else self.id

    @cached_property
    def content(self) -> str:
        """A hash of text and picture, independent of the id."""
        digest = hashlib.sha256()
        # Lengths keep text and image apart: "ab" + "c" must differ from "a" + "bc".
        text = unicodedata.normalize("NFC", self.text or "")
        for part in (text.encode(), self.image_content()):
            digest.update(len(part).to_bytes(8, "big") + part)
        return f"sha256:{digest.hexdigest()}"

    @property
    def answer_ids(self) -> tuple[str, ...]:
        """`answers`, or the item's own uid if there are none."""
        return self.answers or (self.uid,)

    def to_json(self) -> dict:
        """The item as JSON, without empty fields and image bytes."""
        image = str(self.image) if isinstance(self.image, Path) else None
        fields = {"text": self.text, "image": image, "id": self.id, "answers": list(self.answers)}
        fields |= {"instruction": self.instruction, "score": self.score}
        return {key: value for key, value in fields.items() if value or value == 0}

    def image_content(self) -> bytes:
        """Return the image's encoded bytes (a PIL image: its mode, size and pixels), or none.

        Raises:
            UserError: the file cannot be read.
        """
        if isinstance(self.image, Path):
            refuse_special_file(self.image, "image")
            try:
                return self.image.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read the image {self.image}: {error.strerror}") from error
        if isinstance(self.image, Image.Image):
            return f"{self.image.mode} {self.image.size}".encode() + self.image.tobytes()
        return self.image or b""


@dataclass(frozen=True)
class Pair:
    """A query, the candidate that answers it, and hard negatives.

    Args:
        id: identifies the pair; unique in its source.
        query: the query.
        positive: the candidate that answers it.
        negatives: hard negatives.
        asks: the id that is asked for, or several, each a right answer. The loss does not use a
            candidate with one of them in its `answers` as a negative. None: the positive's first
            answer.
    """

    id: str
    query: Item
    positive: Item
    negatives: tuple[Item, ...] = ()
    asks: str | tuple[str, ...] | None = None

    @classmethod
    def parse(
        cls, value: dict, folder: Path | None = None, default_id: str | None = None
    ) -> "Pair":
        """Make a pair from JSON.

        Args:
            value: a dict with "query" and "positive", and optionally "id", "asks" and "negatives".
            folder: see `Item.parse`.
            default_id: the id if `value` has none.

        Raises:
            UserError: a key is unknown or missing, or an item is not valid.
        """
        value = _checked_keys(value, _PAIR_KEYS, "a pair")
        identifier, asks = as_id(value.get("id", default_id)), as_id(value.get("asks"))
        if isinstance(asks, (list, tuple)):
            asks = tuple(map(as_id, asks)) or None
        for name in ("query", "positive"):
            if name not in value:
                raise UserError(f'a pair needs a "{name}"; it has {", ".join(value) or "no keys"}')
        if identifier is None:
            raise UserError('a pair needs an "id"')
        _check_string(identifier, "a pair's id")
        for id in asks if isinstance(asks, tuple) else (asks,):
            _check_string("" if id is None and asks else id, "a pair's asks")
        negatives = value.get("negatives", [])
        if not isinstance(negatives, (list, tuple)):
            raise UserError(f'"negatives" must be a list of items, not {type(negatives).__name__}')
        query, positive = (Item.parse(value[side], folder) for side in ("query", "positive"))
        negatives = tuple(Item.parse(negative, folder) for negative in negatives)
        return cls(identifier, query, positive, negatives, asks)

    @property
    def target_id(self) -> str:
        """The id of the thing that the query asks for; the first, if there are several."""
        return self.relevant_ids[0]

    @property
    def relevant_ids(self) -> tuple[str, ...]:
        """The ids of the things that the query asks for; each is a right answer."""
        if self.asks is None:
            return self.positive.answer_ids[:1]
        return (self.asks,) if isinstance(self.asks, str) else self.asks

    @property
    def question(self) -> str:
        """The same for pairs with the same query, whose positives are all right answers."""
        return f"{self.query.content} {self.query.instruction or ''}"


def read_pairs(path: Path) -> Iterator[Pair]:
    """Read pairs from JSON Lines, one at a time; image paths are relative to the file's folder.

    A pair without an id is named after the file and its line.

    Raises:
        UserError: names file and line.
    """
    path = Path(path)
    lines: dict[str, int] = {}
    for number, value in read_json_lines(path):
        try:
            pair = Pair.parse(value, path.parent, default_id=f"{path.stem}:{number}")
            check_unique(pair.id, number, lines)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
        yield pair


def read_items(path: Path) -> list[Item]:
    """Read items from JSON Lines, or the pictures of a folder (sorted; id = path in the folder).

    Raises:
        UserError: there is nothing, or a line is not an item (names file and line).
    """
    path = Path(path)
    if path.is_dir():
        items = [
            Item(image=file, id=file.relative_to(path).as_posix()) for file in files_below(path)
        ]
        if not items:
            raise UserError(f"{path} contains no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
        return items
    items, lines = [], {}
    for number, value in read_json_lines(path):
        try:
            if isinstance(value, dict):
                value.pop("metadata", None)  # for stores
            items.append(Item.parse(value, path.parent))
            if items[-1].id is not None:
                check_unique(items[-1].id, number, lines)
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from error
    if not items:
        raise UserError(f"{path} contains no items: expected one JSON object or string per line")
    return items


@lru_cache(maxsize=2**14)  # few names recur often
def stable_hash(id: str) -> int:
    """An id as a number for tensors: the first 63 bits of its SHA-256, never negative.

    Python's own hash() differs between processes, and so between ranks.
    """
    return int.from_bytes(hashlib.sha256(id.encode()).digest()[:8], "big") >> 1


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Read the non-empty lines of a JSON Lines file with their numbers, one at a time.

    Raises:
        UserError: names file and line.
    """
    return ((number, value) for number, _, value in json_lines(path))


def json_lines(path: Path) -> Iterator[tuple[int, int, Any]]:
    """As `read_json_lines`, with the byte offset of each line between number and value."""
    for number, start, text in read_lines(path):
        if text.strip():
            try:
                yield number, start, parse_json(text)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not a line of JSON: {error}") from error


def parse_json(text: str | bytes) -> Any:
    """Read strict JSON: without NaN, and without repeated keys in an object.

    Raises:
        ValueError, RecursionError: the text is not strict JSON.
    """
    return json.loads(text, object_pairs_hook=_once, parse_constant=_no_number)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def as_id(value: Any) -> Any:
    """An id as text; tables and JSON may have integers.

    >>> as_id(7), as_id("007"), as_id(True)
    ('7', '007', True)
    """
    return str(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def several(values: Iterable, what: str) -> Iterable:
    """The values; refuses a single one, which would be read letter by letter or key by key.

    Raises:
        UserError: it is a text, an object or an item, or cannot be iterated over.
    """
    if isinstance(values, (str, bytes, dict, Item)):
        raise UserError(f"{what} must be a list: write [{values!r:.80}]")
    if not (hasattr(values, "__iter__") or hasattr(values, "__getitem__")):
        raise UserError(f"{what} must be a list, got {values!r:.80}")
    return values


def _checked_keys(value: object, known: tuple[str, ...], what: str) -> dict:
    """Return the dict without its nulls, after refusing anything but `known` keys."""
    if not isinstance(value, dict):
        raise UserError(f"{what} must be a JSON object, not {type(value).__name__}")
    unknown = [str(key) for key in value if key not in known]
    if unknown:
        raise UserError(f"{what} has unknown key {unknown[0]!r}; known are {', '.join(known)}")
    return {key: given for key, given in value.items() if given is not None}


def _check_string(value: object, what: str) -> None:
    if value is None:
        return
    if not isinstance(value, str):
        raise UserError(f"{what} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise UserError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{what} is not valid Unicode: a lone surrogate") from error


def check_unique(id: str, number: int, lines: dict[str, int]) -> None:
    """Refuse an id that an earlier line has; remember the line of a new one."""
    first = lines.setdefault(id, number)
    if first != number:
        raise UserError(f"id {id!r} was used before, in line {first}")


def _path_below(image: str, folder: Path) -> Path:
    """Return the path of an image named in data, which must stay below their folder."""
    where = "give a path relative to the data file and below its folder"
    if "://" in image:
        raise UserError(
            f"image {image!r} is an address, which is not fetched: {where}, or use "
            "`embed --fetch-images`"
        )
    if Path(image).is_absolute() or ".." in Path(image).parts or "\0" in image:
        raise UserError(f"image {image!r} leaves the data folder: {where}")
    path = as_on_disk(folder / image)
    # resolve() follows links: one inside the folder may point outside it.
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"image {image!r} leaves the data folder through a link: {where}")
    return path
