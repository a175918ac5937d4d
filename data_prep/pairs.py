"""Your own pairs in JSON Lines, CSV or Parquet -> training and test shards.

    python data_prep/pairs.py --pairs mine/pairs.jsonl --out data/mine

One object per line, image paths relative to the file (docs/data.md has the complete format):

    {"query": "ein roter Apfel", "positive": {"image": "pictures/apple.png", "id": "apple"}}

CSV and Parquet have these columns; only a query and a positive are required:

    id, query, query_image, positive, positive_image, positive_id, negatives, negative_images,
    asks, answers

Other tables work with a mapping of columns:

    metaembed-pl prepare pairs --from ORG/NAME --columns query=query,positive_image=image --out ...

--from takes a dataset of the hub, Parquet (a file, a folder, an address), JSON Lines, CSV, or tars
as img2dataset and WebDataset write them, by default a caption (`txt`, or `caption` in the `json`)
as the query of its picture; --preset knows the columns of some published sets. docs/data.md has
the keys. A recipe can name such a table, too.

`negatives`, `negative_images` and `answers` are lists (in CSV a JSON list). If a query occurs in
several rows, all their positives are right answers. A picture is a path, bytes (as the hub's
Parquet has them, too), or base64 behind `data:image/png;base64,`; with --base64 every picture is
bare base64.

The split is a hash of the positive's id: all pairs of a candidate are on the same side, and adding
pairs later moves none. Held-out candidates are not used as hard negatives in training either. Pairs
whose pictures do not decode are dropped, logged and counted; too many stop the script.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from metaembed_pl.data.mapping import PRESETS, Preset, open_rows
from metaembed_pl.data.product import Product
from metaembed_pl.data.tables import parse_columns
from metaembed_pl.data_prep._source import declare_split, run
from metaembed_pl.errors import UserError
from metaembed_pl.files import refuse_special_file


def products(options: argparse.Namespace) -> Iterator[Product]:
    """One product, with the requested split."""
    if (options.pairs is None) == (options.where is None and options.preset is None):
        raise UserError("give exactly one of --pairs, --from and --preset")
    if options.pairs and not options.pairs.exists():
        raise UserError(f"cannot read {options.pairs}: no such file")
    if options.pairs:
        refuse_special_file(options.pairs)
    preset = PRESETS[options.preset] if options.preset else Preset("")
    where = str(options.pairs or options.where or preset.where)
    if not where:
        raise UserError(f"--preset {options.preset} cannot be read from the hub: {preset.note}")
    files = preset.files if options.files == "*" and not options.where else options.files
    columns = parse_columns(options.columns) or preset.columns
    rows = open_rows(where, columns, files)
    yield Product(
        name=options.name or options.out.resolve().name,
        folder=options.out,
        drafts=partial(rows.drafts, options.base64),
        source=options.pairs.name if options.pairs else where,
        held_out=options.held_out,
        settings={
            "from": where,
            "files": files,
            "columns": ",".join(f"{key}={name}" for key, name in (columns or {}).items()),
            "held_out": options.held_out,
            **rows.about,
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
        help="any table or tars: ORG/NAME on the hub, a file, folder or address",
    )
    add("--columns", metavar="KEY=COLUMN,...", help="with --from: maps the columns")
    add("--files", default="*", metavar="PATTERN", help="with --from: such as data/train-*")
    add("--preset", choices=tuple(PRESETS), help="a published dataset with known columns")
    add("--out", type=Path, required=True, help="folder to write train/ and test/ to")
    declare_split(parser, "candidates")
    add("--base64", action="store_true", help="pictures are base64, not paths")


main = partial(run, "pairs", __doc__, products, declare)

if __name__ == "__main__":
    sys.exit(main())
