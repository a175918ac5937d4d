"""VisRAG's training data -> shards: questions and the page, slide, chart or plot that answers.

    python data_prep/visrag.py                  # both, to data/visrag_ind and data/visrag_syn
    python data_prep/visrag.py --subset visrag_ind --from ~/VisRAG-Ret-Train-In-domain-data

Layout (the hub's dataset cards): openbmb/VisRAG-Ret-Train-In-domain-data has 122,752 rows in
data/train-*.parquet with the columns query, image, source; VisRAG-Ret-Train-Synthetic-data has the
rest of the 362,110 pairs. A pair is query -> image, without hard negatives: the paper takes those
from MoCa's version (moca_pairs.py).

Not yet verified on the hub's files: that the synthetic part has the same layout.
"""

import argparse
import sys
from collections.abc import Iterator
from functools import partial

from metaembed_pl.data.product import Product
from metaembed_pl.data_prep._rows import page_drafts
from metaembed_pl.data_prep._source import declare_source, run
from metaembed_pl.errors import UserError

HUBS = {
    "visrag_ind": "openbmb/VisRAG-Ret-Train-In-domain-data",
    "visrag_syn": "openbmb/VisRAG-Ret-Train-Synthetic-data",
}


def products(options: argparse.Namespace) -> Iterator[Product]:
    """One folder of shards per dataset."""
    subsets = options.subset or tuple(HUBS)
    if options.where and len(subsets) > 1:
        raise UserError(f"--from is a single dataset: name it with --subset ({', '.join(HUBS)})")
    for subset in subsets:
        where = options.where or HUBS[subset]
        yield Product(
            name=subset,
            folder=options.out / subset,
            drafts=partial(page_drafts, where, "data/train-*.parquet", subset),
            source=where,
            settings={"from": where},
            note="The pictures keep the licences of the datasets that they come from.",
        )


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    declare_source(parser, "data", "", HUBS)


main = partial(run, "visrag", __doc__, products, declare)

if __name__ == "__main__":
    sys.exit(main())
