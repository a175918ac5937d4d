"""`python -m metaembed_pl store`: what is done with whole stores.

python -m metaembed_pl store merge parts/* --out shelf
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs and their flags."""
    verbs = parser.add_subparsers(metavar="DO", required=True)
    does = "one store of the parts that `embed --part` made"
    merge = verbs.add_parser("merge", help=does, description=does)
    merge.add_argument("parts", nargs="+", type=Path, metavar="PART", help="all of them")
    merge.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="must be new")
    merge.set_defaults(do=_merge)


def run(args: argparse.Namespace) -> None:
    """Do what was asked for.

    Raises:
        UserError: a flag or a store is not valid.
    """
    args.do(args)


def _merge(args: argparse.Namespace) -> None:
    from metaembed_pl.retrieval.parts import merge

    store = merge(args.parts, args.out)
    print(f"{len(store):,} items of {len(args.parts)} parts in {args.out}")
