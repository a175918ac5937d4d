"""ViDoRe v1, v2, v3 and MMEB-V2's other visual documents -> retrieval sets of questions and pages.

    python data_prep/vidore.py --subset v2                    # four sets, to data/vidore/NAME
    python data_prep/vidore.py --subset visrag --subset visdoc_ood    # the rest of MMEB-V2
    python data_prep/vidore.py --subset vidore_v3_hr
    python data_prep/vidore.py --subset v1 --from ~/vidore    # copies in ~/vidore/NAME

Layout, three configurations with one split: test, in visrag train (the hub's dataset cards of v1's
BEIR versions, VisRAG and ViDoSeek; mteb's loaders of v2 and MMLongBench-doc; of v3 a public loader
with its features; of the two `page-fixed` that VLM2Vec's loader reads them like ViDoSeek):

| | v1, v2, visrag, visdoc_ood | v3 |
|---|---|---|
| queries/SPLIT-*.parquet | query-id, query, ... | query_id, query, language, answer, ... |
| corpus/SPLIT-*.parquet | corpus-id, image | corpus_id, image, doc_id, markdown, ... |
| qrels/SPLIT-*.parquet | query-id, corpus-id, score | query_id, corpus_id, score, ... |

Queries of v2 also have a language, those of visdoc_ood a corpus_range (the pages of the document in
question), but all pages are searched. All graded scores are kept: for document retrieval in
visdoc_ood, all pages of the right document have 2, those with the answer 3. For page retrieval the
sets are those with `page-fixed` in their names: earlier versions marked the page next to the right
one (VLM2Vec's issue 167), so their scores are not comparable.

Other columns become metadata; a page's `markdown` becomes its `text_layer`, used by BM25 but not by
the model. English and multilingual tasks select queries by language.

Not yet verified on the hub's files: visrag and visdoc_ood, and of v3 all columns beside ids, query,
language, image and score.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from metaembed_pl.data_prep._retrieval import Record, RetrievalDraft, run
from metaembed_pl.data_prep._rows import read_rows
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.mmeb import VISDOC_OOD, VISRAG
from metaembed_pl.evaluation.vidore import V1, V3, VIDORE_V2_SETS


@dataclass(frozen=True)
class Collection:
    """Datasets that are published together.

    Args:
        organisation: their owner on the hub.
        names: of the datasets there, and of their folders here.
        split: the only one that each of them has.
    """

    organisation: str
    names: tuple[str, ...]
    split: str = "test"


SETS = {
    "v1": Collection("vidore", tuple(V1)),
    "v2": Collection("vidore", tuple(VIDORE_V2_SETS)),
    "v3": Collection("vidore", tuple(f"vidore_v3_{domain}" for domain in V3)),
    "visrag": Collection("openbmb", tuple(f"VisRAG-Ret-Test-{name}" for name in VISRAG), "train"),
    "visdoc_ood": Collection("VLM2Vec", tuple(VISDOC_OOD)),
}
COLLECTION_OF = {name: collection for collection in SETS.values() for name in collection.names}
TEXT_LAYER = "markdown"


def read(where: str, part: str, split: str, *columns: str) -> Iterator[dict[str, Any]]:
    """Rows of a configuration, with column names as in v3: all others have hyphens in them."""
    for row in read_rows(where, f"{part}/{split}-*.parquet"):
        row = {name.replace("-", "_"): value for name, value in row.items()}
        missing = [name for name in columns if name not in row]
        if missing:
            raise UserError(
                f"{where}: {part} has no column {missing[0]!r}; it has {', '.join(row)}"
            )
        yield row


def queries(where: str, split: str, limit: int | None) -> Iterator[Record]:
    """The questions, with their metadata."""
    for row in islice(read(where, "queries", split, "query_id", "query"), limit):
        yield {"id": str(row.pop("query_id")), "text": row.pop("query"), **metadata(row)}


def candidates(where: str, split: str) -> Iterator[Record]:
    """The pages, with their metadata."""
    for row in read(where, "corpus", split, "corpus_id", "image"):
        image = (row.pop("image") or {}).get("bytes")
        text_layer = row.pop(TEXT_LAYER, None) or None
        yield {
            "id": str(row.pop("corpus_id")),
            "image": image,
            "text_layer": text_layer,
            **metadata(row),
        }


def judgements(where: str, split: str) -> Iterator[tuple[str, str, float]]:
    """The relevance of pages."""
    for row in read(where, "qrels", split, "query_id", "corpus_id", "score"):
        yield str(row["query_id"]), str(row["corpus_id"]), float(row["score"])


def metadata(row: dict[str, Any]) -> Record:
    """The values of a row that JSON can hold, except those with reserved names.

    >>> row = {"language": "french", "thumbnail": b"..", "page": None, "size": float("nan")}
    >>> metadata(row | {"text": "no"})
    {'language': 'french'}
    """
    taken = ("id", "_id", "text", "title", "image", "text_layer")
    return {key: value for key, value in row.items() if key not in taken and _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        return value is not None and bool(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return False


def benchmarks(options: argparse.Namespace) -> Iterator[RetrievalDraft]:
    """One retrieval set per dataset."""
    for name in wanted(options.subset or SETS):
        collection = COLLECTION_OF[name]
        where, split = f"{options.where or collection.organisation}/{name}", collection.split
        yield RetrievalDraft(
            name=name,
            folder=options.out / name,
            candidates=partial(candidates, where, split),
            queries=partial(queries, where, split, options.limit),
            judgements=partial(judgements, where, split),
            lists=None,
            source=where,
            settings={"from": where},
            note="For the licence see the hub's card of the dataset.",
        )


def wanted(chosen: Iterable[str]) -> list[str]:
    """The chosen datasets, each once.

    >>> wanted(["esg_reports_v2", "v2"])[:2]
    ['esg_reports_v2', 'esg_reports_human_labeled_v2']
    """
    names = [name for one in chosen for name in (SETS[one].names if one in SETS else (one,))]
    return list(dict.fromkeys(names))


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        default=Path("data/vidore"),
        help="folder to write to (default: data/vidore)",
    )
    add(
        "--from",
        dest="where",
        metavar="ORGANISATION_OR_FOLDER",
        help="organisation or folder of the datasets (default: the publishers: "
        + ", ".join(f"{name} {collection.organisation}" for name, collection in SETS.items())
        + ")",
    )
    add(
        "--subset",
        action="append",
        choices=(*SETS, *COLLECTION_OF),
        metavar="NAME",
        help=f"a collection ({', '.join(SETS)}) or one set; repeatable (default: all)",
    )


main = partial(run, "vidore", __doc__, benchmarks, declare)

if __name__ == "__main__":
    sys.exit(main())
