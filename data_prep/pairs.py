"""Pairs of your own, in JSON Lines, CSV or Parquet -> shards to train on and shards to test on.

    python data_prep/pairs.py --pairs mine/pairs.jsonl --out data/mine

One object a line, image paths relative to the file (docs/data.md has the complete format):

    {"query": "ein roter Apfel", "positive": {"image": "pictures/apple.png", "id": "apple"}}

CSV and Parquet have a column each, of which only a query and a positive are needed:

    id, query, query_image, positive, positive_image, positive_id, negatives, negative_images,
    asks, answers

Or take a table as it is, and say which column is what:

    metaembed-pl prepare pairs --from ORG/NAME --columns query=query,positive_image=image --out ...

--from takes a dataset of the hub, Parquet (a file, a folder, an address), JSON Lines, CSV, or tars
as img2dataset and WebDataset write them, by default a caption (`txt`, or `caption` in the `json`)
as the query of its picture; --preset knows the columns of some published sets. See _mapped.py.

`negatives`, `negative_images` and `answers` are lists (in CSV a JSON list). Rows of one query are
all right answers to it. A picture is a path, bytes (as the hub's Parquet has
them, too), or base64 behind `data:image/png;base64,`; with --base64 every picture is bare base64.

What is held out follows from a hash of the positive's id, so pairs of one candidate stay on one
side and adding pairs later moves none. A held-out candidate is no hard negative in training either.
Pairs whose pictures do not decode are left out, named, and counted; too many stop the script.
"""

import argparse
import base64
import binascii
import csv
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pyarrow import ArrowException, parquet

from metaembed_pl.data.shard_index import sha256_of
from metaembed_pl.data.tables import parse_columns
from metaembed_pl.data_prep._mapped import KEYS, PRESETS, Mapped, Preset, open_rows
from metaembed_pl.data_prep._source import Draft, Product, run
from metaembed_pl.errors import UserError
from metaembed_pl.files import refuse_special_file
from metaembed_pl.item import Pair, parse_json, read_json_lines

ROWS_AT_A_TIME = 256  # of Parquet, pictures and all
CSV_FIELD_BYTES = 2**26  # of a picture as base64; Python's own limit is 128 kB


def drafts(read: Callable[[], Iterator[Pair]]) -> Iterator[Draft]:
    """Pairs, with all that is right for a question, and without hard negatives that are.

    Args:
        read: gives the pairs, the same each time.

    Raises:
        UserError: names file and line (or row) of what is no pair.
    """
    right: dict[str, list[str]] = defaultdict(list)
    for pair in read():
        with suppress(UserError):  # a missing picture is reported when its turn comes
            right[pair.question] += [*pair.asked_any, pair.positive.uid]
    for pair in read():
        with suppress(UserError):
            asked = tuple(dict.fromkeys((*pair.asked_any, *right[pair.question])))
            if len(asked) > 1:
                pair = replace(pair, asks=asked)
            wrong = tuple(n for n in pair.negatives if not set(n.answered) & set(asked))
            pair = replace(pair, negatives=wrong)
        yield vars(pair)


def read(path: Path, is_base64: bool) -> Iterator[Pair]:
    """The pairs of a file, as it has them.

    Raises:
        UserError: it is of no kind that is read here, or holds what is no pair.
    """
    if path.suffix.lower() not in READERS:
        raise UserError(f"{path}: expected one of {', '.join(READERS)}, not {path.suffix!r}")
    rows = READERS[path.suffix.lower()](path)
    named = ((f"{path}:{number}", f"{path.stem}:{number}", value) for number, value in rows)
    return _parsed(named, path.parent, is_base64)


def read_mapped(rows: Mapped, is_base64: bool) -> Iterator[Pair]:
    """The pairs of rows whose columns were told."""
    named = ((where, pair["id"], pair) for where, pair in rows.pairs())
    return _parsed(named, rows.folder, is_base64)


def _parsed(
    values: Iterable[tuple[str, str, Any]], folder: Path, is_base64: bool
) -> Iterator[Pair]:
    """Pairs of JSON values, each with where it is and its name if it has no id."""
    seen: dict[str, str] = {}
    for where, name, value in values:
        try:
            pair = Pair.parse(_with_pictures(value, is_base64), folder, default_id=name)
            first = seen.setdefault(pair.id, where)
            if first != where:
                line = first.rpartition(":")[2]
                raise UserError(f"id {pair.id!r} was used before, in line {line}")
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        yield pair


def read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    """The number of its last line, and each row as a pair."""
    csv.field_size_limit(CSV_FIELD_BYTES)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            _check_columns(path, rows.fieldnames or ())
            for row in rows:
                if None in row or None in row.values():
                    raise UserError(f"{path}:{rows.line_num}: not as many fields as columns")
                yield rows.line_num, from_columns(_with_lists(row, f"{path}:{rows.line_num}"))
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not CSV in UTF-8: {error}") from error


def read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    """The number, and each row as a pair."""
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names)
            rows = (row for some in file.iter_batches(ROWS_AT_A_TIME) for row in some.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield number, from_columns(_with_lists(row, f"{path}:{number}"))
    except (ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a complete Parquet file: {error}") from error


LISTS = ("negatives", "negative_images", "answers")
READERS: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
    ".jsonl": read_json_lines,
    ".json": read_json_lines,
    ".csv": read_csv,
    ".parquet": read_parquet,
}


def from_columns(row: dict[str, Any]) -> dict[str, Any]:
    """A pair, of a row with the columns above.

    >>> from_columns({"query": "a cat", "positive_image": "cat.png", "negatives": ["a dog"]})
    {'query': {'text': 'a cat'}, 'positive': {'image': 'cat.png'}, 'negatives': [{'text': 'a dog'}]}
    """
    negatives = zip_longest(row.get("negatives") or (), row.get("negative_images") or ())
    answers = row.get("answers") or None
    pair = {
        "id": row.get("id"),
        "query": _side(row.get("query"), row.get("query_image")),
        "positive": _side(
            row.get("positive"), row.get("positive_image"), row.get("positive_id"), answers
        ),
        "negatives": [_side(*negative) for negative in negatives],
        "asks": row.get("asks"),
    }
    return {key: value for key, value in pair.items() if value not in (None, "")}


def _side(text: Any, image: Any, id: Any = None, answers: Any = None) -> dict[str, Any]:
    fields = {"text": text, "image": image, "id": id, "answers": answers}
    return {key: value for key, value in fields.items() if value is not None and value != ""}


def _check_columns(path: Path, found: Any) -> None:
    unknown = [name for name in found if name not in KEYS]
    twice = [name for name in found if list(found).count(name) > 1]
    if twice:
        raise UserError(f"{path} has two columns {twice[0]!r}: which is meant?")
    if unknown:
        raise UserError(f"{path} has unknown column {unknown[0]!r}; known are {', '.join(KEYS)}")
    for side in ("query", "positive"):
        if not {side, f"{side}_image"} & set(found):
            raise UserError(f"{path} needs a column {side!r} or '{side}_image'")


def _with_lists(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row with its lists, which are JSON in CSV, and may be so in Parquet."""
    row = dict(row)
    for name in LISTS:
        text = row.get(name) or []
        try:
            row[name] = parse_json(text) if isinstance(text, str) else text
        except (ValueError, RecursionError):
            row[name] = None
        if not isinstance(row[name], list):
            raise UserError(
                f'{where}: {name}: expected a JSON list such as ["a", "b"], got {text!r:.80}'
            )
    return row


def _with_pictures(value: Any, is_base64: bool) -> Any:
    """A pair whose pictures are paths or bytes."""
    if not isinstance(value, dict):
        return value
    value = dict(value)
    for side in ("query", "positive"):
        if isinstance(value.get(side), dict):
            value[side] = _with_picture(value[side], is_base64)
    if isinstance(value.get("negatives"), list):
        value["negatives"] = [
            _with_picture(item, is_base64) if isinstance(item, dict) else item
            for item in value["negatives"]
        ]
    return value


def _with_picture(item: dict[str, Any], is_base64: bool) -> dict[str, Any]:
    image = item.get("image")
    if isinstance(image, dict):  # as the hub's Parquet files have pictures
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str) and (is_base64 or image.startswith("data:")):
        head, _, content = image.rpartition(",")
        if head and not head.endswith(";base64"):
            raise UserError(f"expected a picture as data:image/png;base64,..., got {head[:40]!r}")
        try:
            image = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError) as error:
            raise UserError(f"a picture is not base64: {error}") from error
    return {**item, "image": image}


def products(options: argparse.Namespace) -> Iterator[Product]:
    """One product, with the split that is asked for."""
    if (options.pairs is None) == (options.where is None and options.preset is None):
        raise UserError("give --pairs FILE, or --from or --preset, one of them")
    if options.pairs is None:
        yield _mapped(options)
        return
    if options.columns or options.files != "*":
        raise UserError("--columns and --files are for --from: a file of --pairs has its own names")
    if not options.pairs.exists():
        raise UserError(f"cannot read {options.pairs}: no such file")
    refuse_special_file(options.pairs)
    yield Product(
        name=options.name or options.out.resolve().name,
        folder=options.out,
        drafts=partial(drafts, partial(read, options.pairs, options.base64)),
        source=options.pairs.name,
        held_out=options.held_out,
        settings={
            "pairs": options.pairs.name,
            "sha256": sha256_of(options.pairs),
            "held_out": options.held_out,
        },
    )


def _mapped(options: argparse.Namespace) -> Product:
    preset = PRESETS[options.preset] if options.preset else Preset("", {})
    where = options.where or preset.where
    if not where:
        raise UserError(f"--preset {options.preset} is not on the hub as it is: {preset.note}")
    files = preset.files if options.files == "*" and not options.where else options.files
    columns = parse_columns(options.columns) or preset.columns or None
    rows = open_rows(where, columns, files)
    return Product(
        name=options.name or options.out.resolve().name,
        folder=options.out,
        drafts=partial(drafts, partial(read_mapped, rows, options.base64)),
        source=where,
        held_out=options.held_out,
        settings={
            "from": where,
            "files": files,
            "columns": ",".join(f"{key}={name}" for key, name in rows.columns.items()),
            "held_out": options.held_out,
            **rows.what,
        },
        note=preset.note,
    )


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    add = parser.add_argument
    add("--pairs", type=Path, metavar="FILE", help="JSON Lines, CSV or Parquet of pairs")
    add(
        "--from",
        dest="where",
        metavar="WHERE",
        help="or any table or tars: ORG/NAME of the hub, a file, a folder, an address",
    )
    add("--columns", metavar="KEY=COLUMN,...", help="of --from: which column is what")
    add("--files", default="*", metavar="PATTERN", help="of --from: such as data/train-*")
    add("--preset", choices=tuple(PRESETS), help="a published dataset, whose columns are known")
    add("--out", type=Path, required=True, help="folder to write train/ and test/ to")
    add("--name", help="the source's name in metrics and logs (default: the folder's)")
    add("--held-out", type=float, default=0.1, help="share of the candidates to test on (0.1)")
    add("--base64", action="store_true", help="pictures are base64, not paths")


def main(argv: list[str] | None = None) -> int:
    """Write the shards; return the exit status."""
    return run("pairs", __doc__, products, declare, argv)


if __name__ == "__main__":
    sys.exit(main())
