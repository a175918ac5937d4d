"""MoCa-CL-Pairs, or mmE5's MMEB with hard negatives -> shards: all 27 sources of the paper.

    python data_prep/moca_pairs.py            # all, to where paper.yaml looks for them
    python data_prep/moca_pairs.py --subset CIRR --subset TAT-DQA
    python data_prep/moca_pairs.py --from ~/MoCa-CL-Pairs --images ~/images
    python data_prep/moca_pairs.py --from intfloat/mmE5-MMEB-hardneg --subset CIRR

Layout (MoCa's loader, training script and prepare_images.sh): MMEB-train's columns, in
NAME/train-*.parquet, with neg_text and neg_image_path as lists of equal meaning, place by place;
MoCa's loader takes them as strings that hold a Python list. Both are read (never with eval). An
empty hard negative is left out.

Pictures are elsewhere: for the 20 MMEB sets in TIGER-Lab/MMEB-train (images_zip/NAME.zip, read in
place); for TAT-DQA, ArxivQA, colpali and VisRAG in moca-embed/MoCa-CL-Pairs
(supplement_images_zip/NAME.tar.gz, one of them in parts); for InfoSeek in TIGER-Lab/M-BEIR
(mbeir_images.tar.gz in four parts of 48 GB, of which oven_images/ is unpacked). Gzipped tars are
unpacked once, to OUT/.images; delete it when the shards are finished. `--images` names a folder
with the archives or their contents; no pictures are downloaded then.

One query in 200 is held out (--hold-out), with all pairs of its picture. Once all subsets are done,
the first 40 of each form data/paper_val, the validation set of the paper's recipes.

Not yet verified on the hub's files: the names of the Parquet files, and the first folder of the
pictures' paths, of which several are tried.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from metaembed_pl.data.product import Draft, Product
from metaembed_pl.data_prep import infoseek as mbeir
from metaembed_pl.data_prep._mmeb import TRAIN_SUBSETS, item, places
from metaembed_pl.data_prep._rows import fetch, read_rows, unpack
from metaembed_pl.data_prep._source import declare_source, run
from metaembed_pl.errors import UserError
from metaembed_pl.item import stable_hash

HUB = "moca-embed/MoCa-CL-Pairs"
MMEB = "TIGER-Lab/MMEB-train"
VALIDATION = "paper_val"
NUM_VALIDATION = 40  # pairs of each subset: about 1,000 in all
COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")

# Subset -> where recipes/sources/paper.yaml expects it below --out.
FOLDERS = {name: f"mmeb_train/{name}" for name in TRAIN_SUBSETS} | {
    "ArxivQA": "arxivqa",
    "TAT-DQA": "tat_dqa",
    "InfoSeek_it2it": "infoseek_it2it",
    "InfoSeek_it2t": "infoseek_it2t",
    "tevatron_colpali": "colpali_train",
    "visrag_ind": "visrag_ind",
    "visrag_syn": "visrag_syn",
}
_MBEIR = (mbeir.HUB, mbeir.PARTS, mbeir.OVEN)
# Subset -> hub id, the archive or its parts, and the prefix of the members to unpack.
ARCHIVES = {
    "ArxivQA": (HUB, ["supplement_images_zip/ArxivQA.tar.gz"], ""),
    "TAT-DQA": (HUB, ["supplement_images_zip/TAT-DQA.tar.gz"], ""),
    "tevatron_colpali": (HUB, ["supplement_images_zip/colpali_tevatron.tar.gz"], ""),
    "visrag_ind": (HUB, ["supplement_images_zip/visrag_ind.tar.gz"], ""),
    "visrag_syn": (
        HUB,
        [f"supplement_images_zip/visrag_syn.tar.gz.part_a{letter}" for letter in "abcde"],
        "",
    ),
    "InfoSeek_it2it": _MBEIR,
    "InfoSeek_it2t": _MBEIR,
}


def drafts(
    where: str, subset: str, images: Path | None, cache: Path, hold_out: int, held_out: bool
) -> Iterator[Draft]:
    """The rows of a subset as pairs with their hard negatives.

    Args:
        where: an id on the hub, or a folder.
        subset: a key of `FOLDERS`.
        images: a folder with the pictures, if any.
        cache: where archives are unpacked.
        hold_out: one query in so many is held out; 0: none.
        held_out: only the pairs that are held out, instead of the others.
    """
    pictures = find_pictures(where, subset, images, cache)
    for number, row in enumerate(read_rows(where, f"{subset}/train-*.parquet", COLUMNS)):
        if is_held_out(row, hold_out) != held_out:
            continue
        texts, paths = (as_list(row[name], subset, number) for name in COLUMNS[-2:])
        negatives = (item(*pair, pictures) for pair in zip_longest(texts, paths, fillvalue=""))
        yield {
            "id": f"{subset}:{number}",
            "query": item(row["qry"], row["qry_image_path"], pictures),
            "positive": item(row["pos_text"], row["pos_image_path"], pictures),
            "negatives": [negative for negative in negatives if any(negative.values())],
        }


def is_held_out(row: dict[str, Any], hold_out: int) -> bool:
    """Whether a row is held out, by the picture of its query, or else by its text."""
    query = row["qry_image_path"] or row["qry"] or ""
    return hold_out > 0 and stable_hash(query) % hold_out == 0


def validation_drafts(
    where: str, images: Path | None, cache: Path, hold_out: int
) -> Iterator[Draft]:
    """The first held-out pairs of each subset."""
    for subset in FOLDERS:
        found = drafts(where, subset, images, cache, hold_out, held_out=True)
        yield from islice(found, NUM_VALIDATION)


def as_list(value: object, subset: str = "", number: int = 0) -> list[str]:
    """A column of hard negatives: a list, a string that holds one, or a single value.

    >>> as_list("['a cat', '']"), as_list(["a cat"]), as_list("a cat"), as_list(None)
    (['a cat', ''], ['a cat'], ['a cat'], [])
    """
    if isinstance(value, str) and value.startswith("[") and value.endswith("]"):
        try:
            value = ast.literal_eval(value)  # takes literals only: nothing in it is run
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            value = [value]  # a text in brackets
    if value is None or value == "":
        return []
    values: list[Any] = value if isinstance(value, list) else [value]
    if not all(isinstance(text, str | None) for text in values):
        raise UserError(
            f"{subset}: row {number}: hard negatives must be strings, not {value!r:.80}"
        )
    return [text or "" for text in values]


def find_pictures(where: str, subset: str, images: Path | None, cache: Path) -> tuple[Path, ...]:
    """Folders and zips with the pictures of a subset, downloaded or unpacked if necessary."""
    copy = images or (Path(where) if Path(where).is_dir() else None)
    folders = () if copy is None else (copy, copy / "images")
    if subset in TRAIN_SUBSETS:
        return (*folders, *places(str(copy or MMEB), f"images_zip/{subset}.zip"))
    hub, files, below = ARCHIVES[subset]
    parts = [path for file in files if (path := fetch(str(copy or hub), file))]
    if not parts:
        return folders
    if len(parts) < len(files):
        raise UserError(f"{subset}: {len(parts)} of {len(files)} parts of {files[0]} are there")
    name = Path(files[0]).name.partition(".")[0]
    return (*folders, unpack(parts, cache / name, below))


def products(options: argparse.Namespace) -> Iterator[Product]:
    """One folder of shards per subset."""
    cache = options.out / ".images"
    for subset in options.subset or FOLDERS:
        yield Product(
            name=subset if subset in TRAIN_SUBSETS else FOLDERS[subset],
            folder=options.out / FOLDERS[subset],
            drafts=partial(
                drafts, options.where, subset, options.images, cache, options.hold_out, False
            ),
            source=f"{options.where}, {subset}",
            settings={"from": options.where, "subset": subset, "hold_out": options.hold_out},
            note="The pictures keep the licences of the datasets that they come from.",
        )

    if not options.subset and options.hold_out:
        yield Product(
            name=VALIDATION,
            folder=options.out / VALIDATION,
            drafts=partial(
                validation_drafts, options.where, options.images, cache, options.hold_out
            ),
            source=f"{options.where}, held-out pairs of all subsets",
            settings={"from": options.where, "hold_out": options.hold_out},
            note="The pictures keep the licences of the datasets that they come from.",
        )


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    declare_source(parser, "data", HUB, FOLDERS)
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="pictures or their archives")
    parser.add_argument(
        "--hold-out",
        type=int,
        default=200,
        metavar="N",
        help="hold out one query in N for validation; 0: none (default: 200)",
    )


main = partial(run, "moca_pairs", __doc__, products, declare)

if __name__ == "__main__":
    sys.exit(main())
