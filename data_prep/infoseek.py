"""InfoSeek's training questions from M-BEIR -> shards of picture + question -> article.

    python data_prep/infoseek.py                     # to data/infoseek_it2t and data/infoseek_it2it
    python data_prep/infoseek.py --from ~/M-BEIR --subset infoseek_it2t

| source | query -> candidate |
|---|---|
| infoseek_it2t | picture + question -> passage of an article |
| infoseek_it2it | picture + question -> passage with the article's picture |

Layout (the hub's card of TIGER-Lab/M-BEIR and UniIR's loader):
query/train/mbeir_infoseek_train.jsonl has qid, query_txt, query_img_path, query_modality,
pos_cand_list and neg_cand_list, the last two of candidates' ids;
cand_pool/global/mbeir_union_train_cand_pool.jsonl has did, txt, img_path and modality (`text` or
`image,text`). A pair takes the first right candidate of the source's modality, and wrong ones of
the same kind as hard negatives. The paper takes its version from MoCa (moca_pairs.py), whose hard
negatives are mined.

Pictures are in mbeir_images.tar.gz, in four parts of 48 GB, of which oven_images/ is unpacked once
to OUT/.images; with --from, unpacked pictures are found there.

Not yet verified on the hub's files: whether the ids in the lists are strings; objects with a `did`,
as shown on the card, are read as well.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from metaembed_pl.data.product import Draft, Product
from metaembed_pl.data_prep._rows import Named, fetch, unpack
from metaembed_pl.data_prep._source import declare_source, run
from metaembed_pl.errors import UserError
from metaembed_pl.item import json_lines, read_json_lines

HUB = "TIGER-Lab/M-BEIR"
QUERIES = "query/train/mbeir_infoseek_train.jsonl"
POOL = "cand_pool/global/mbeir_union_train_cand_pool.jsonl"
PARTS = [f"mbeir_images.tar.gz.part-{n:02d}" for n in range(4)]
OVEN = "mbeir_images/oven_images"
MODALITIES = {"infoseek_it2t": "text", "infoseek_it2it": "image,text"}


def drafts(where: str, subset: str, num_negatives: int, cache: Path) -> Iterator[Draft]:
    """The questions with a right candidate of the subset's modality."""
    queries, places = needed(where, QUERIES), find_pictures(where, cache)
    pool = Pool(needed(where, POOL))

    def item(text: str | None, image: str | None, **more: Any) -> dict[str, Any]:
        return {"text": text, "image": Named(image, places) if image else None, **more}

    def candidates(row: dict[str, Any], which: str, number: int) -> list[dict[str, Any]]:
        found = (pool.get(id_of(value)) for value in row.get(which) or ())
        fitting = [c for c in found if c and c["modality"] == MODALITIES[subset]][:number]
        return [item(c.get("txt"), c.get("img_path"), id=c["did"]) for c in fitting]

    for _, row in read_json_lines(queries):
        positives = candidates(row, "pos_cand_list", 1)
        if positives:
            yield {
                "id": row["qid"],
                "query": item(row.get("query_txt"), row.get("query_img_path")),
                "positive": positives[0],
                "negatives": candidates(row, "neg_cand_list", num_negatives),
            }


class Pool:
    """Candidates by id, read from their file (half a gigabyte) when they are needed.

    Args:
        path: JSON Lines with a `did` each.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._starts = {value["did"]: start for _, start, value in json_lines(path)}

    def get(self, id: str) -> dict[str, Any] | None:
        """A candidate; None if the pool does not have it."""
        if id not in self._starts:
            return None
        with self._path.open("rb") as file:
            file.seek(self._starts[id])
            return json.loads(file.readline())


def id_of(value: "str | dict[str, Any]") -> str:
    """A candidate's id, as M-BEIR's lists have it."""
    return value["did"] if isinstance(value, dict) else value


def needed(where: str, file: str) -> Path:
    """The path of a file of the dataset, downloaded if necessary."""
    path = fetch(where, file)
    if path is None:
        raise UserError(f"{where} has no file {file}: is --from right?")
    return path


def find_pictures(where: str, cache: Path) -> tuple[Path, ...]:
    """The places of pictures: the copy, if it is unpacked, or else the unpacked archive."""
    if (Path(where) / OVEN).is_dir():
        return (Path(where),)
    return (unpack([needed(where, part) for part in PARTS], cache / "mbeir_images", OVEN),)


def products(options: argparse.Namespace) -> Iterator[Product]:
    """One folder of shards per modality."""
    for subset in options.subset or MODALITIES:
        yield Product(
            name=subset,
            folder=options.out / subset,
            drafts=partial(
                drafts, options.where, subset, options.num_negatives, options.out / ".images"
            ),
            source=f"{options.where}, {QUERIES}, candidates: {MODALITIES[subset]}",
            settings={"from": options.where, "num_negatives": options.num_negatives},
            licence="MIT",  # M-BEIR's card
            note="The licence is M-BEIR's; pictures and articles are Wikipedia's and OVEN's.",
        )


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    declare_source(parser, "data", HUB, MODALITIES)
    parser.add_argument(
        "--num-negatives",
        type=int,
        default=2,
        metavar="N",
        help="hard negatives per pair (default: 2)",
    )


main = partial(run, "infoseek", __doc__, products, declare)

if __name__ == "__main__":
    sys.exit(main())
