"""The ColPali training set -> shards: questions and the page that answers.

    python data_prep/colpali_train.py                     # to data/colpali_train

Layout (the hub's file listing of vidore/colpali_train_set and VLM2Vec's loader):
data/train-*.parquet with the columns image, image_filename, query, answer, source, options, page,
model, prompt, answer_type; 118,195 rows, beside 500 rows of data/test-*. A pair is query -> image.
It has no hard negatives: the paper takes them from MoCa's version (moca_pairs.py).

A page answers several questions, so its id is a hash of its content: in a batch it is never a
negative of a question that it answers.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial

from metaembed_pl.data.product import Product
from metaembed_pl.data_prep._rows import page_drafts
from metaembed_pl.data_prep._source import declare_source, run

HUB = "vidore/colpali_train_set"
SPLITS = ("train", "test")


def products(options: argparse.Namespace) -> Iterator[Product]:
    """One folder of shards."""
    yield Product(
        name="colpali_train",
        folder=options.out,
        drafts=partial(page_drafts, options.where, f"data/{options.split}-*.parquet", "colpali"),
        source=f"{options.where}, split {options.split}",
        settings={"from": options.where, "split": options.split},
        note="Questions of DocVQA, InfographicsVQA, TAT-DQA, arXivQA and made ones; the pages "
        "keep the licences of their datasets.",
    )


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    declare_source(parser, "data/colpali_train", HUB, ())
    parser.add_argument("--split", choices=SPLITS, default=SPLITS[0], help="(default: train)")


main = partial(run, "colpali_train", __doc__, products, declare)

if __name__ == "__main__":
    sys.exit(main())
