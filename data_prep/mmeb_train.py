"""MMEB-train, the 20 training sets of VLM2Vec -> shards, one folder per set.

    python data_prep/mmeb_train.py                                  # all, to data/mmeb_train/NAME
    python data_prep/mmeb_train.py --subset CIRR --limit 1000       # a look at one
    python data_prep/mmeb_train.py --from ~/MMEB-train              # a copy on disk

Layout (the hub's file listing of TIGER-Lab/MMEB-train and VLM2Vec's loader):
NAME/original-*.parquet and NAME/diverse_instruction-*.parquet with the columns qry, qry_image_path,
pos_text, pos_image_path and, where there are any, neg_text and neg_image_path; the pictures in
images_zip/NAME.zip. Texts have `<|image_1|>` in place of the picture; it is removed, because the
model's prompt places pictures itself. Zips are read in place; unpacked files are read, too. The
hard negatives of the paper are in MoCa's version: moca_pairs.py.

Not yet verified on the hub's files: whether paths in the rows begin with images/. Both are tried.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial

from metaembed_pl.data.product import Draft, Product
from metaembed_pl.data_prep._mmeb import TRAIN_SUBSETS, item, places
from metaembed_pl.data_prep._rows import read_rows
from metaembed_pl.data_prep._source import declare_source, run

HUB = "TIGER-Lab/MMEB-train"
SPLITS = ("original", "diverse_instruction")
COLUMNS = ("qry", "qry_image_path", "pos_text", "pos_image_path")


def drafts(where: str, subset: str, split: str) -> Iterator[Draft]:
    """The rows of a subset as pairs."""
    pictures = places(where, f"images_zip/{subset}.zip")
    for number, row in enumerate(read_rows(where, f"{subset}/{split}-*.parquet", COLUMNS)):
        negative = item(row.get("neg_text"), row.get("neg_image_path"), pictures)
        yield {
            "id": f"{subset}:{number}",
            "query": item(row["qry"], row["qry_image_path"], pictures),
            "positive": item(row["pos_text"], row["pos_image_path"], pictures),
            "negatives": [negative] if any(negative.values()) else [],
        }


def products(options: argparse.Namespace) -> Iterator[Product]:
    """One folder of shards per subset."""
    for subset in options.subset or TRAIN_SUBSETS:
        yield Product(
            name=subset,
            folder=options.out / subset,
            drafts=partial(drafts, options.where, subset, options.split),
            source=f"{options.where}, {subset}, split {options.split}",
            settings={"from": options.where, "subset": subset, "split": options.split},
            licence="Apache-2.0",  # the hub's card; the pictures keep those of the 20 datasets
            note="The licence is the collection's; each dataset's pictures have their own.",
        )


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    declare_source(parser, "data/mmeb_train", HUB, TRAIN_SUBSETS)
    parser.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="(default: original)")


main = partial(run, "mmeb_train", __doc__, products, declare)

if __name__ == "__main__":
    sys.exit(main())
