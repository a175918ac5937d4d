"""Rows of tables and of captioned tars -> pairs, by a mapping of columns.

    --columns query=question,positive_image=page,negatives=neg_1+neg_2

A key is one of those of pairs.py, a column a name, a field of a struct or of JSON (`json.caption`),
or several joined by `+`. A cell may be a list. Several queries of a row are pairs of their own, and
so are several positives. Passages may be structs with `text`, `title` and `docid`, as MS MARCO's.
"""

import csv
import fnmatch
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product, zip_longest
from pathlib import Path
from typing import Any

from metaembed_pl.data.remote import is_remote
from metaembed_pl.data.tables import CONVERTED, SUFFIX, Table, picture_bytes
from metaembed_pl.data_prep._rows import CutOff
from metaembed_pl.errors import UserError
from metaembed_pl.item import parse_json, read_json_lines
from metaembed_pl.model.model_folder import HUB_ID

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
PICTURES = ("png", "jpg", "jpeg", "webp")
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
    columns: Columns
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
        "nlphuji/flickr30k",
        {"query": "caption", "positive_image": "image", "positive_id": "filename"},
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
"""Not yet verified on the hub's files: names and columns are those of the datasets' cards."""


@dataclass(frozen=True)
class Mapped:
    """Pairs of rows.

    Args:
        rows: gives them anew each time, each with what names it.
        columns: see the head of this file.
        folder: where paths of pictures start.
        what: what is read, and how much of it, for the manifest.
    """

    rows: Callable[[], Rows]
    columns: Columns
    folder: Path
    what: dict[str, Any]

    def pairs(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """What names each pair, and the pair as JSON has it; rows without one are passed over."""
        for where, row in self.rows():
            name = "/".join(Path(where).parts[-2:])  # files of two folders may have one name
            for number, pair in enumerate(pairs_of(row, self.columns)):
                pair.setdefault("id", f"{name}.{number}" if number else name)
                yield where, pair


def open_rows(where: str, columns: Columns | None, files: str = "*") -> Mapped:
    """What is read from a file, a folder, an address or the hub.

    Raises:
        UserError: nothing there that can be read, or a column that is not there.
        CutOff: the hub is out of reach.
    """
    path = Path(where)
    if path.suffix.lower() in (".jsonl", ".json", ".csv") and path.is_file():
        read = _csv_rows if path.suffix.lower() == ".csv" else _json_rows
        chosen = _checked(columns, next(read(path), ("", {}))[1].keys(), where)
        return Mapped(lambda: read(path), chosen, path.parent, {"bytes": path.stat().st_size})
    if path.suffix == ".tar" or (path.is_dir() and any(path.glob("*.tar"))):
        tars = [path] if path.is_file() else sorted(path.glob("*.tar"))
        tars = [tar for tar in tars if fnmatch.fnmatch(tar.name, files)]
        return _of_tars(tars, columns, where)
    if path.exists() or is_remote(where):
        table = Table.open(where, files)
    elif HUB_ID.fullmatch(where):
        table = _on_hub(where, files)
    else:
        raise UserError(f"no file and no folder {where}, and no id of the hub, which is ORG/NAME")
    chosen = _checked(columns, table.columns, where)
    needed = dict.fromkeys(base for name in _names(chosen) for base in [name.split(".")[0]])
    folder = Path("." if is_remote(table.files[0]) else table.files[0]).parent
    return Mapped(lambda: table.rows(list(needed)), chosen, folder, {"rows": table.num_rows})


def _on_hub(id: str, files: str) -> Table:
    """The Parquet files of a dataset, downloaded once; of one of another form, the hub's own."""
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
        raise UserError(f"the hub has no dataset {id}, or it is private") from error
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CutOff(f"cannot read {id}: the hub is out of reach: {reason}") from error
    raise UserError(f"{id} has no Parquet files that match {files}")


def _names(columns: Columns) -> list[str]:
    return [name for names in columns.values() for name in names.split("+")]


def _checked(columns: Columns | None, found: Any, where: str) -> dict[str, str]:
    """The mapping, or that of columns that are called like its keys."""
    found = list(found)
    chosen = dict(columns or {key: key for key in KEYS if key in found})
    unknown = [key for key in chosen if key not in KEYS]
    if unknown:
        raise UserError(f"--columns has unknown key {unknown[0]!r}; known are {', '.join(KEYS)}")
    missing = [name for name in _names(chosen) if name.split(".")[0] not in found]
    if missing:
        raise UserError(f"{where} has no column {missing[0]!r}; it has {', '.join(found)}")
    for side in ("query", "positive"):
        if not {side, f"{side}_image"} & chosen.keys():
            raise UserError(
                f"{where} has the columns {', '.join(found)}: say which is the {side}, as in "
                "--columns query=question,positive_image=page"
            )
    return chosen


def _json_rows(path: Path) -> Rows:
    for number, value in read_json_lines(path):
        if not isinstance(value, dict):
            raise UserError(f"{path}:{number}: expected an object, not {type(value).__name__}")
        yield f"{path}:{number}", value


def _csv_rows(path: Path) -> Rows:
    csv.field_size_limit(2**26)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for row in rows:
                yield f"{path}:{rows.line_num}", row
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV in UTF-8: {error}") from error


def _of_tars(tars: list[Path], columns: Columns | None, where: str) -> Mapped:
    def rows() -> Rows:
        for tar in tars:
            yield from _samples(tar)

    found = next(rows(), ("", {}))[1]
    if columns is None:
        caption = "txt" if "txt" in found else "json.caption"
        columns = {"query": caption, "positive_image": "image", "positive_id": "key"}
    size = sum(tar.stat().st_size for tar in tars)
    return Mapped(rows, _checked(columns, found, where), Path(where), {"bytes": size})


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
        raise UserError(f"{path} is not a whole, uncompressed tar: {error}") from error
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


def pairs_of(row: Mapping[str, Any], columns: Columns) -> Iterator[dict[str, Any]]:
    """The pairs of a row, each with as many hard negatives as it has.

    >>> row = {"q": ["a cat", "a pet"], "d": "fur", "n1": "a dog", "n2": ["a bird"]}
    >>> for pair in pairs_of(row, {"query": "q", "positive": "d", "negatives": "n1+n2"}):
    ...     print(pair["query"]["text"], [item["text"] for item in pair["negatives"]])
    a cat ['a dog', 'a bird']
    a pet ['a dog', 'a bird']
    """
    cells = {
        key: [value for name in names.split("+") for value in _values(_cell(row, name))]
        for key, names in columns.items()
    }
    queries = _items(cells, "query", "query_image")
    positives = _items(cells, "positive", "positive_image", "positive_id")
    negatives = _items(cells, "negatives", "negative_images")
    for number, (query, positive) in enumerate(product(queries, positives)):
        pair = {"query": query, "positive": positive, "negatives": negatives}
        if answers := cells.get("answers"):
            pair["positive"] = {**positive, "answers": answers}
        if asks := cells.get("asks"):
            pair["asks"] = asks
        if id := cells.get("id"):
            pair["id"] = f"{id[0]}.{number}" if number else id[0]
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


def _values(cell: Any) -> list[Any]:
    values = cell if isinstance(cell, list | tuple) else [cell]
    return [value for value in values if value not in (None, "", b"")]


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
    """A text, or a struct with a title, a text and an id."""
    if not isinstance(text, Mapping):
        return {} if text is None else {"text": text}
    words = " ".join(str(text[key]) for key in ("title", "text") if text.get(key))
    id = text.get("docid", text.get("id"))
    return {"text": words} | ({} if id is None else {"id": str(id)})
