"""A folder of pictures with their texts -> shards of text -> picture.

    python data_prep/folder.py --from ~/pictures --out data/pictures

| --text | texts of a picture |
|---|---|
| sidecar | the lines of `cat.txt` next to `cat.jpg`; one query per line |
| metadata | the `text` for its `file_name` in a `metadata.jsonl` or `metadata.csv` |
| name | its file name: the query for `red_apple-03.jpg` is "red apple" |
| folder | the name of its folder, as in `cats/0001.jpg` |
| auto | the first of sidecar, metadata and name that exists (the default) |

All pictures with the same text are right answers for it. One candidate in ten is held out, by a
hash of its path (--held-out). Linked folders are followed, each once. Skipped files, including
hidden ones, are counted.
"""

import argparse
import csv
import hashlib
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from metaembed_pl.data.product import Draft, Product
from metaembed_pl.data_prep._source import declare_split, run
from metaembed_pl.errors import UserError
from metaembed_pl.files import as_on_disk
from metaembed_pl.item import read_json_lines
from metaembed_pl.picture import PICTURE_SUFFIXES, files_below

TEXTS = ("auto", "sidecar", "metadata", "name", "folder")
METADATA = ("metadata.jsonl", "metadata.csv")


def drafts(root: Path, how: str) -> Iterator[Draft]:
    """A pair for each picture and each of its texts.

    Raises:
        UserError: no pictures, or none with a text.
    """
    pictures = list_pictures(root)
    metadata = read_metadata(root, set(pictures)) if how in ("auto", "metadata") else {}
    texts = {path: texts_of(path, root, how, metadata) for path in pictures}
    right = defaultdict(list)  # pictures by text
    for path, found in texts.items():
        for text in found:
            right[text].append(path)
    if not right:
        raise UserError(f"{root}: none of {len(pictures)} pictures has a text with --text {how}")
    for path, found in texts.items():
        id = path.relative_to(root).as_posix()
        if not found:
            yield {"id": id, "query": "", "positive": {"image": path, "id": id}}
        for number, text in enumerate(found):
            yield {
                "id": f"{id}#{number}",
                "query": {"text": text},
                "positive": {"image": path, "id": id, "answers": found},
                "asks": text,
            }


def list_pictures(root: Path) -> list[Path]:
    """Pictures below a folder, sorted."""
    if not root.is_dir():
        raise UserError(f"no folder {root}: give --from a folder of pictures")
    found = files_below(root, beside=(".txt", ".jsonl", ".csv"))
    if not found:
        raise UserError(f"{root} contains no pictures ({', '.join(sorted(PICTURE_SUFFIXES))})")
    return found


def texts_of(path: Path, root: Path, how: str, metadata: dict[Path, list[str]]) -> list[str]:
    """The distinct texts of a picture; empty if there are none."""
    found: list[str] = []
    if how in ("auto", "sidecar"):
        found = read_sidecar(path)
    if how in ("auto", "metadata") and not found and path in metadata:
        found = metadata[path]
    if how == "name" or (how == "auto" and not found):
        found = [words(path.stem)]
    if how == "folder" and path.parent != root:
        found = [words(path.parent.name)]
    # Composed, so that texts that look the same are the same.
    found = [unicodedata.normalize("NFC", text).strip() for text in found]
    return list(dict.fromkeys(text for text in found if text))


def words(name: str) -> str:
    """A file's name as words, without a number at its end, which only counts the files.

    >>> words("red_apple-03"), words("IMG_2041"), words("route66")
    ('red apple', 'IMG', 'route66')
    """
    spaced = re.sub(r"[\s_\-.]+", " ", name).strip()
    return re.sub(r" \(?\d+\)?$", "", spaced)


def read_sidecar(path: Path) -> list[str]:
    """The lines of the text file beside a picture."""
    for sidecar in map(as_on_disk, (path.with_suffix(".txt"), Path(f"{path}.txt"))):
        if sidecar.is_file():
            try:
                return sidecar.read_text(encoding="utf-8-sig").splitlines()
            except (UnicodeDecodeError, OSError) as error:
                raise UserError(f"{sidecar} is not text in UTF-8: {error}") from error
    return []


def read_metadata(root: Path, pictures: set[Path]) -> dict[Path, list[str]]:
    """Texts by picture, from all metadata files below a folder (the hub's imagefolder layout)."""
    found: dict[Path, list[str]] = defaultdict(list)
    missing = []
    for path in files_below(root, lambda file: file.name in METADATA, beside=None):
        for number, line in read_csv(path) if path.suffix == ".csv" else read_json_lines(path):
            fields = line if isinstance(line, dict) else {}
            name, text = fields.get("file_name"), fields.get("text")
            if not isinstance(name, str) or not isinstance(text, str):
                raise UserError(f"{path}:{number}: needs a file_name and a text")
            picture = as_on_disk(path.parent / name)
            if picture in pictures:
                found[picture].append(text)
            else:
                missing.append(f"{path}:{number}: {name}")
    if missing:
        print(f"{len(missing):,} texts have no picture here, such as {missing[0]}", file=sys.stderr)
    return found


def read_csv(path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Each row, with the number of its last line."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.DictReader(file)
            for row in rows:
                yield rows.line_num, row
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def fingerprint(root: Path) -> str:
    """A hash of the names and sizes of a folder's files, to detect changes."""
    digest = hashlib.sha256()
    for path in files_below(root, lambda file: True, beside=None):
        digest.update(f"{path.relative_to(root)} {path.stat().st_size}\n".encode())
    return digest.hexdigest()


def products(options: argparse.Namespace) -> Iterator[Product]:
    """One product, with the requested split."""
    root = options.where
    yield Product(
        name=options.name or options.out.resolve().name,
        folder=options.out,
        drafts=partial(drafts, root, options.text),
        source=root.resolve().name,
        held_out=options.held_out,
        settings={
            "folder": root.resolve().name,
            "sha256": fingerprint(root),
            "text": options.text,
            "held_out": options.held_out,
        },
    )


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    add = parser.add_argument
    add("--from", dest="where", type=Path, required=True, help="folder of pictures")
    add("--out", type=Path, required=True, help="folder to write train/ and test/ to")
    add("--text", choices=TEXTS, default="auto", help="where texts come from (default: auto)")
    declare_split(parser, "the pictures")


main = partial(run, "folder", __doc__, products, declare)

if __name__ == "__main__":
    sys.exit(main())
