"""`python -m metaembed_pl store`: merge, export and import stores.

    python -m metaembed_pl store merge parts/* --out shelf
    python -m metaembed_pl store export shelf --to shelf.parquet --vectors 8
    python -m metaembed_pl store import shelf.parquet --out other

The result is one line on standard output.
"""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verbs and their flags."""
    verbs = parser.add_subparsers(metavar="DO", required=True)
    does = "merge the parts written by `embed --part` into one store"
    merge = verbs.add_parser("merge", help=does, description=does)
    merge.add_argument("parts", nargs="+", type=Path, metavar="PART", help="stores of all parts")
    merge.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to create")
    merge.set_defaults(do=_merge)
    does = "write a store as a table for other programs: id, vectors, first, metadata"
    export = verbs.add_parser("export", help=does, description=does)
    add = export.add_argument
    add("store", type=Path, metavar="STORE", help="a folder made by `embed`")
    add("--to", type=Path, required=True, metavar="FILE", help="output file, .parquet or .lance")
    add("--vectors", type=int, metavar="R_C", help="vectors per item, such as 8 (default: all)")
    add("--previews", action="store_true", help="include the small pictures")
    export.set_defaults(do=_export)
    does = "make a store from a table written by `store export`"
    imported = verbs.add_parser("import", help=does, description=does)
    imported.add_argument("table", type=Path, metavar="FILE", help=".parquet or .lance")
    imported.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="folder to create"
    )
    imported.set_defaults(do=_import)


def run(args: argparse.Namespace) -> None:
    """Run the chosen command."""
    args.do(args)


def _merge(args: argparse.Namespace) -> None:
    from metaembed_pl.retrieval.parts import merge

    store = merge(args.parts, args.out)
    print(f"{len(store):,} items of {len(args.parts)} parts in {args.out}")


def _export(args: argparse.Namespace) -> None:
    from metaembed_pl.retrieval.exchange import export_store
    from metaembed_pl.retrieval.store import Store

    count = export_store(Store.open(args.store), args.to, args.vectors, args.previews)
    print(f"{count:,} items in {args.to}")


def _import(args: argparse.Namespace) -> None:
    from metaembed_pl.retrieval.exchange import import_store

    print(f"{len(import_store(args.table, args.out)):,} items in {args.out}")
