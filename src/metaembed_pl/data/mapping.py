"""Pairs from tables, JSON Lines, CSV and captioned tars, by a mapping of columns.

    rows = open_rows("mine.parquet", {"query": "question", "positive_image": "page"})
    for pair in rows.pairs():
        ...

A key of the mapping is one of `KEYS`; a column is a name, a field of a struct or of JSON
(`json.caption`), or several joined by `+`. A cell may be a list: several queries of a row are pairs
of their own, and so are several positives. Passages may be structs with `text`, `title` and
`docid`, as in MS MARCO. Without a mapping, columns are called like the keys, and JSON Lines hold
pairs as docs/data.md describes them.
"""

import base64
import binascii
import csv
import fnmatch
import hashlib
import json
import os
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice, product, zip_longest
from pathlib import Path
from typing import Any

from metaembed_pl.data.remote import HUB_ID, is_remote
from metaembed_pl.data.shard_index import sha256_of
from metaembed_pl.data.tables import CONVERTED, SUFFIX, Table, picture_bytes
from metaembed_pl.errors import Unreachable, UserError, first_line
from metaembed_pl.files import refuse_special_file
from metaembed_pl.item import Pair, parse_json, read_json_lines

KEYS = (
    "id",
    "query",
    "query_image",
    "positive",
    "positive_image",
    "positive_id",
    "negatives",
    "negative_images",
    "asks",
    "answers",
)
LISTS = ("negatives", "negative_images", "answers")
FILES = (".jsonl", ".json", ".csv", ".parquet", ".tar")
PICTURES = ("png", "jpg", "jpeg", "webp")
CSV_FIELD_BYTES = 2**26  # of a picture as base64; Python's own limit is 128 kB
EXAMPLE = "columns query=question,positive_image=page"
Columns = Mapping[str, str]
Rows = Iterator[tuple[str, dict[str, Any]]]


@dataclass(frozen=True)
class Preset:
    """How a published dataset is read.

    Args:
        where: its id on the hub; empty: a copy on disk must be named.
        columns: its mapping.
        files: which of its files.
        note: for the card.
    """

    where: str
    columns: Columns | None = None
    files: str = "*"
    note: str = ""


PRESETS = {
    "colpali_train_set": Preset(
        "vidore/colpali_train_set",
        {"query": "query", "positive_image": "image", "positive_id": "image_filename"},
        "data/train-*",
    ),
    "vdr-multilingual-train": Preset(
        "llamaindex/vdr-multilingual-train",
        {"query": "query", "positive_image": "image", "positive_id": "id"},
        note="Its hard negatives are ids of other rows, which are not followed: use `mine`.",
    ),
    "flickr30k": Preset(
        "lmms-lab/flickr30k",
        {"query": "caption", "positive_image": "image"},
    ),
    "coco": Preset(
        "jxie/coco_captions",
        {"query": "caption", "positive_image": "image", "positive_id": "cocoid"},
        "*train*",
    ),
    "msmarco": Preset(
        "Tevatron/msmarco-passage",
        {
            "id": "query_id",
            "query": "query",
            "positive": "positive_passages",
            "negatives": "negative_passages",
        },
        "*train*",
    ),
    "megapairs": Preset(
        "",
        {
            "query": "q_text",
            "query_image": "q_img",
            "positive_image": "t_img",
            "negative_images": "hns",
        },
        note="Give its JSON Lines, beside the unpacked pictures, by --from.",
    ),
}
"""Not yet verified on the hub's own files. The columns are those that public code reads, but for
MegaPairs, whose columns are from memory."""


@dataclass(frozen=True)
class MappedRows:
    """Rows of a table as pairs.

    Args:
        rows: iterates over the rows, each with its place; may be called several times.
        columns: the mapping; None: the rows are pairs already.
        is_own: the columns are called like the keys, so lists are known by their names.
        folder: paths of pictures are relative to it.
        about: checksum or number of rows, for the manifest.
    """

    rows: Callable[[], Rows]
    columns: Columns | None
    is_own: bool
    folder: Path
    about: dict[str, Any]

    def pairs(self, is_base64: bool = False) -> Iterator[Pair]:
        """The pairs, in order; rows without a pair are skipped.

        Args:
            is_base64: pictures are bare base64, not paths.

        Raises:
            UserError: a row is not valid; names its file and line (or row).
        """
        seen: dict[str, str] = {}
        for where, row in self.rows():
            name = "/".join(Path(where).parts[-2:])  # files of two folders may have one name
            try:
                values = [row] if self.columns is None else pairs_of(row, self.columns, self.is_own)
                for number, value in enumerate(values):
                    default = f"{name}.{number}" if number else name
                    pair = Pair.parse(_with_pictures(value, is_base64), self.folder, default)
                    first = seen.setdefault(pair.id, where)
                    if first != where:
                        line = first.rpartition(":")[2]
                        raise UserError(f"id {pair.id!r} was used before, in line {line}")
                    yield pair
            except UserError as error:
                raise UserError(f"{where}: {error}") from error

    def drafts(self, is_base64: bool = False) -> Iterator[dict[str, Any]]:
        """The pairs with all right answers to their query, and no hard negative among them."""
        right: dict[str, list[str]] = defaultdict(list)
        for pair in self.pairs(is_base64):
            with suppress(UserError):  # a missing picture is reported when its turn comes
                right[pair.question] += [*pair.relevant_ids, pair.positive.uid]
        for pair in self.pairs(is_base64):
            with suppress(UserError):
                relevant = tuple(dict.fromkeys((*pair.relevant_ids, *right[pair.question])))
                if len(relevant) > 1:
                    pair = replace(pair, asks=relevant)
                wrong = tuple(n for n in pair.negatives if not set(n.answer_ids) & set(relevant))
                pair = replace(pair, negatives=wrong)
            yield vars(pair)


def open_rows(where: str, columns: Columns | None = None, files: str = "*") -> MappedRows:
    """Open a table as pairs.

    Args:
        where: JSON Lines, CSV, Parquet or a tar, a folder of the last two, an address, or ORG/NAME.
        columns: the mapping; None: see the head of this file.
        files: pattern of the files to read, if there are several.

    Raises:
        UserError: there is nothing that can be read, or a column is missing.
        Unreachable: the hub cannot be reached.
    """
    path, is_own = Path(where), columns is None
    suffix = path.suffix.lower()
    if path.exists():
        if not path.is_dir():
            refuse_special_file(path)
        if path.is_file() and suffix not in FILES:
            raise UserError(f"{path}: expected one of {', '.join(FILES)}, not {path.suffix!r}")
    if files != "*" and path.is_file() and suffix in (".jsonl", ".json", ".csv"):
        raise UserError(f"{path}: `files` chooses among several files, and this is one")
    if suffix in (".jsonl", ".json") and path.is_file():
        chosen = columns and _checked(columns, _json_keys(path), where)
        rows = (lambda: _objects(path)) if chosen else (lambda: _json_rows(path))
        return MappedRows(rows, chosen, is_own, path.parent, digest(where, files))
    if suffix == ".csv" and path.is_file():
        with _opened_csv(path) as file:
            chosen = _checked(columns, file.fieldnames or (), where)
        about = digest(where, files)
        return MappedRows(lambda: _csv_rows(path), chosen, is_own, path.parent, about)
    if tars := _tars(path, files):
        return _of_tars(tars, columns, path, digest(where, files))
    if path.exists() or is_remote(where):
        table = Table.open(where, files)
    elif HUB_ID.fullmatch(where) and suffix not in FILES:
        table = _on_hub(where, files)
    else:
        raise UserError(f"{where} is neither a file, a folder nor a hub id ORG/NAME")
    chosen = _checked(columns, table.columns, where)
    needed = list(dict.fromkeys(name.split(".")[0] for name in _names(chosen)))
    folder = Path("." if is_remote(table.files[0]) else table.files[0]).parent
    about = digest(where, files) or {"rows": table.num_rows}
    return MappedRows(lambda: table.rows(needed), chosen, is_own, folder, about)


def digest(where: str, files: str = "*") -> dict[str, str]:
    """The checksum of the files on this machine that would be read; empty if they are remote."""
    path = Path(where)
    if is_remote(where) or not path.exists():
        return {}
    found = [path] if path.is_file() else _tars(path, files) or Table.open(where, files).files
    digests = [sha256_of(Path(file)) for file in found]
    if len(digests) > 1:
        digests = [hashlib.sha256("".join(digests).encode()).hexdigest()]
    return {"sha256": digests[0]}


def _on_hub(id: str, files: str) -> Table:
    """The Parquet files of a dataset, downloaded once; else the hub's conversion to Parquet."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        for revision in (None, CONVERTED.removeprefix("@").replace("%2F", "/")):
            names = HfApi().list_repo_files(id, repo_type="dataset", revision=revision)
            chosen = [n for n in sorted(names) if n.endswith(SUFFIX) and fnmatch.fnmatch(n, files)]
            if chosen:
                get = {"repo_type": "dataset", "revision": revision}
                return Table(tuple(hf_hub_download(id, name, **get) for name in chosen))
    except RepositoryNotFoundError as error:
        raise UserError(f"the dataset {id} does not exist on the hub, or is private") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = first_line(error)
        raise Unreachable(f"cannot read {id}: the hub cannot be reached: {reason}") from error
    raise UserError(f"{id} has no Parquet files that match {files}")


def _names(columns: Columns) -> list[str]:
    return [name for names in columns.values() for name in names.split("+")]


def _checked(columns: Columns | None, found: Iterable[str], where: str) -> Columns:
    """The mapping, checked; without one, columns are called like its keys."""
    found = list(found)
    twice = [name for name in found if found.count(name) > 1]
    if twice:
        raise UserError(f"{where} has two columns {twice[0]!r}: which is meant?")
    chosen = dict(columns or {name: name for name in found})
    known = f"known are {', '.join(KEYS)}"
    unknown = [key for key in chosen if key not in KEYS]
    if unknown and columns is None:
        raise UserError(
            f"{where} has unknown column {unknown[0]!r}; {known}; or say which is what: {EXAMPLE}"
        )
    if unknown:
        raise UserError(f"columns has unknown key {unknown[0]!r}; {known}")
    missing = [name for name in _names(chosen) if name.split(".")[0] not in found]
    if missing:
        raise UserError(f"{where} has no column {missing[0]!r}; it has {', '.join(found)}")
    for side in ("query", "positive"):
        if not {side, f"{side}_image"} & chosen.keys():
            raise UserError(
                f"{where} needs a column {side!r} or '{side}_image', or say which it is: {EXAMPLE}"
            )
    return chosen


def _json_rows(path: Path) -> Rows:
    for number, value in read_json_lines(path):
        yield f"{path}:{number}", value


def _objects(path: Path) -> Rows:
    for where, value in _json_rows(path):
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object, not {type(value).__name__}")
        yield where, value


def _json_keys(path: Path) -> list[str]:
    return list(dict.fromkeys(key for _, row in islice(_objects(path), 1000) for key in row))


def _csv_rows(path: Path) -> Rows:
    with _opened_csv(path) as rows:
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if None in row or None in row.values():
                raise UserError(f"{where}: number of fields differs from the header")
            yield where, row


@contextmanager
def _opened_csv(path: Path) -> Iterator[csv.DictReader]:
    csv.field_size_limit(CSV_FIELD_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            yield csv.DictReader(file)
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV in UTF-8: {error}") from error


def _tars(path: Path, files: str) -> list[Path]:
    if path.is_dir():
        return [tar for tar in sorted(path.glob("*.tar")) if fnmatch.fnmatch(tar.name, files)]
    return [path] if path.suffix.lower() == ".tar" and path.is_file() else []


def _of_tars(tars: list[Path], columns: Columns | None, where: Path, about: dict) -> MappedRows:
    def rows() -> Rows:
        for tar in tars:
            yield from _samples(tar)

    found = next(rows(), ("", {}))[1]
    if columns is None:
        caption = "txt" if "txt" in found else "json.caption"
        columns = {"query": caption, "positive_image": "image", "positive_id": "key"}
    return MappedRows(rows, _checked(columns, found, str(where)), False, where, about)


def _samples(path: Path) -> Rows:
    """The samples of a WebDataset tar: members by suffix, `key`, and the picture as `image`."""
    key, sample = None, {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, name = os.path.split(member.name)
                base, _, suffix = name.partition(".")
                if not member.isreg() or not suffix:
                    continue
                found = f"{folder}/{base}".lstrip("./")
                if found != key and sample:
                    yield f"{path}:{key}", sample
                if found != key:
                    key, sample = found, {"key": found}
                file = tar.extractfile(member)
                sample |= _member(suffix.lower(), file.read() if file else b"", f"{path}:{found}")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{path} is not a complete, uncompressed tar: {error}") from error
    if sample:
        yield f"{path}:{key}", sample


def _member(suffix: str, content: bytes, where: str) -> dict[str, Any]:
    if suffix in PICTURES:
        return {suffix: content, "image": content}
    try:
        text = content.decode().strip()
        return {suffix: parse_json(text) if suffix == "json" else text}
    except UnicodeDecodeError:
        return {suffix: content}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}.{suffix} is not JSON: {error}") from error


def pairs_of(
    row: Mapping[str, Any], columns: Columns, is_own: bool = False
) -> Iterator[dict[str, Any]]:
    """The pairs of a row, each with as many hard negatives as it has.

    >>> row = {"q": ["a cat", "a pet"], "d": "fur", "n1": "a dog", "n2": ["a bird"]}
    >>> for pair in pairs_of(row, {"query": "q", "positive": "d", "negatives": "n1+n2"}):
    ...     print(pair["query"]["text"], [item["text"] for item in pair["negatives"]])
    a cat ['a dog', 'a bird']
    a pet ['a dog', 'a bird']
    """
    cells = {
        key: [
            value for name in names.split("+") for value in _values(key, _cell(row, name), is_own)
        ]
        for key, names in columns.items()
    }
    queries = _items(cells, "query", "query_image")
    positives = _items(cells, "positive", "positive_image", "positive_id")
    negatives = _items(cells, "negatives", "negative_images")
    for side, items in (("query", queries), ("positive", positives)):
        if is_own and not items:
            raise UserError(f"no {side}")
    given = {
        key: [value for value in cells.get(key, ()) if value is not None]
        for key in ("id", "asks", "answers")
    }
    for number, (query, positive) in enumerate(product(queries, positives)):
        pair: dict[str, Any] = {"query": query, "positive": positive, "negatives": negatives}
        if given["answers"]:
            pair["positive"] = {**positive, "answers": given["answers"]}
        if given["asks"]:
            pair["asks"] = given["asks"]
        for id in given["id"][:1]:
            pair["id"] = f"{id}.{number}" if number else id
        yield pair


def _cell(row: Mapping[str, Any], name: str) -> Any:
    base, _, rest = name.partition(".")
    value = row.get(name, row.get(base))
    for part in rest.split(".") if rest and name not in row else ():
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                return None
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _values(key: str, cell: Any, is_own: bool) -> list[Any]:
    """The values of a cell; empty ones are None, so that texts and pictures stay aligned."""
    if key in LISTS and isinstance(cell, str) and (is_own or cell.startswith("[")):
        cell = _json_list(key, cell, is_own)
    values = cell if isinstance(cell, list | tuple) else [cell]
    return [None if value in ("", b"") else value for value in values]


def _json_list(key: str, text: str, is_own: bool) -> Any:
    """The list in a string of CSV; the string itself if it need not be a list."""
    with suppress(ValueError, RecursionError):
        value = parse_json(text or "[]")
        if isinstance(value, list):
            return value
    if is_own:
        raise UserError(f'{key}: expected a JSON list such as ["a", "b"], got {text!r:.80}')
    return text


def _items(cells: Mapping[str, list], texts: str, images: str, ids: str = "") -> list[dict]:
    parts = cells.get(texts, []), cells.get(images, []), cells.get(ids, [])
    found = []
    for text, image, id in zip_longest(*parts):
        given = {"image": picture_bytes(image), "id": id}
        item = _passage(text) | {key: v for key, v in given.items() if v is not None}
        if item.keys() & {"text", "image"}:
            found.append(item)
    return found


def _passage(text: Any) -> dict[str, Any]:
    """A text, or a struct with a title, a text, a picture and an id."""
    if not isinstance(text, Mapping):
        return {} if text is None else {"text": text}
    words = " ".join(str(text[key]) for key in ("title", "text") if text.get(key))
    id = text.get("docid", text.get("id"))
    found = {"text": words or None, "image": picture_bytes(text.get("image"))}
    found |= {"id": None if id is None else str(id), "answers": text.get("answers")}
    return {key: value for key, value in found.items() if value is not None}


def _with_pictures(value: Any, is_base64: bool) -> Any:
    """A pair with its pictures as paths or bytes."""
    if not isinstance(value, dict):
        return value
    value = {key: _with_picture(part, is_base64) for key, part in value.items()}
    if isinstance(value.get("negatives"), list):
        value["negatives"] = [_with_picture(item, is_base64) for item in value["negatives"]]
    return value


def _with_picture(item: Any, is_base64: bool) -> Any:
    if not isinstance(item, dict) or "image" not in item:
        return item
    image = picture_bytes(item["image"])
    if isinstance(image, str) and (is_base64 or image.startswith("data:")):
        head, _, content = image.rpartition(",")
        if head and not head.endswith(";base64"):
            raise UserError(f"expected a picture as data:image/png;base64,..., got {head[:40]!r}")
        try:
            image = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"a picture is not base64: {error}") from error
    return {**item, "image": image}
