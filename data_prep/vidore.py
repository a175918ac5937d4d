"""ViDoRe v1, v2 and v3 -> retrieval sets of questions and the pages that answer.

    python data_prep/vidore.py --subset v2                    # four sets, to data/vidore/NAME
    python data_prep/vidore.py --subset vidore_v3_hr
    python data_prep/vidore.py --subset v1 --from ~/vidore    # copies in ~/vidore/NAME

Layout, three configurations with the split test (the hub's dataset cards of v1's BEIR versions and
mteb's of v2; of v3 a public loader with its features):

| | v1, v2 | v3 |
|---|---|---|
| queries/test-*.parquet | query-id, query, language | query_id, query, language, answer, ... |
| corpus/test-*.parquet | corpus-id, image | corpus_id, image, doc_id, markdown, ... |
| qrels/test-*.parquet | query-id, corpus-id, score | query_id, corpus_id, score, ... |

v1 has no languages. Scores are graded, and all are kept. Other columns become metadata; a page's
`markdown` becomes its `text_layer`, for BM25 and not for the model. English or multilingual is
then a choice of queries by language.

Not yet verified on the hub's files: all of v3's columns beside ids, query, language, image and
score.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from _retrieval import Benchmark, Record, run
from _rows import read_rows

from metaembed_pl.errors import UserError

SETS = {
    "v1": (
        "arxivqa_test_subsampled_beir",
        "docvqa_test_subsampled_beir",
        "infovqa_test_subsampled_beir",
        "tabfquad_test_subsampled_beir",
        "tatdqa_test_beir",
        "shiftproject_test_beir",
        "syntheticDocQA_artificial_intelligence_test_beir",
        "syntheticDocQA_energy_test_beir",
        "syntheticDocQA_government_reports_test_beir",
        "syntheticDocQA_healthcare_industry_test_beir",
    ),
    "v2": (
        "esg_reports_human_labeled_v2",
        "esg_reports_v2",
        "biomedical_lectures_v2",
        "economics_reports_v2",
    ),
    "v3": tuple(
        f"vidore_v3_{domain}"
        for domain in (
            "finance_en",
            "finance_fr",
            "computer_science",
            "hr",
            "energy",
            "industrial",
            "pharmaceuticals",
            "physics",
        )
    ),
}
NAMES = tuple(name for names in SETS.values() for name in names)
TEXT_LAYER = "markdown"


def read(where: str, part: str, *columns: str) -> Iterator[dict[str, Any]]:
    """Rows of a configuration with the columns' names of v3: v1 and v2 have hyphens in them."""
    for row in read_rows(where, f"{part}/test-*.parquet"):
        row = {name.replace("-", "_"): value for name, value in row.items()}
        missing = [name for name in columns if name not in row]
        if missing:
            raise UserError(
                f"{where}: {part} has no column {missing[0]!r}; it has {', '.join(row)}"
            )
        yield row


def queries(where: str, limit: int | None) -> Iterator[Record]:
    """The questions, with what else is known of them."""
    for row in islice(read(where, "queries", "query_id", "query"), limit):
        yield {"id": str(row.pop("query_id")), "text": row.pop("query"), **metadata(row)}


def candidates(where: str) -> Iterator[Record]:
    """The pages, with what else is known of them."""
    for row in read(where, "corpus", "corpus_id", "image"):
        image = (row.pop("image") or {}).get("bytes")
        text_layer = row.pop(TEXT_LAYER, None) or None
        yield {
            "id": str(row.pop("corpus_id")),
            "image": image,
            "text_layer": text_layer,
            **metadata(row),
        }


def judgements(where: str) -> Iterator[tuple[str, str, float]]:
    """How right pages are."""
    for row in read(where, "qrels", "query_id", "corpus_id", "score"):
        yield str(row["query_id"]), str(row["corpus_id"]), float(row["score"])


def metadata(row: dict[str, Any]) -> Record:
    """What JSON holds of a row; names with a meaning of their own are left out.

    >>> metadata({"language": "french", "thumbnail": b"..", "text": "no", "page": None})
    {'language': 'french'}
    """
    taken = ("id", "_id", "text", "title", "image", "text_layer")
    return {key: value for key, value in row.items() if key not in taken and _is_json(value)}


def _is_json(value: Any) -> bool:
    try:
        return value is not None and bool(json.dumps(value))
    except (TypeError, ValueError):
        return False


def benchmarks(options: argparse.Namespace) -> Iterator[Benchmark]:
    """One retrieval set a dataset."""
    wanted = [name for chosen in options.subset or SETS for name in SETS.get(chosen, (chosen,))]
    for name in wanted:
        where = f"{options.where}/{name}"
        yield Benchmark(
            name=name,
            folder=options.out / name,
            candidates=partial(candidates, where),
            queries=partial(queries, where, options.limit),
            judgements=partial(judgements, where),
            lists=None,
            source=where,
            settings={"from": where},
            note="For the licence see the hub's card of the dataset.",
        )


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    add = parser.add_argument
    add("--out", type=Path, default=Path("data/vidore"), help="default: data/vidore")
    add(
        "--from",
        dest="where",
        default="vidore",
        metavar="ORGANISATION_OR_FOLDER",
        help="what holds the datasets, on the hub or on disk (default: vidore)",
    )
    add(
        "--subset",
        action="append",
        choices=(*SETS, *NAMES),
        metavar="NAME",
        help=f"a version ({', '.join(SETS)}) or one set; may be given several times (default: all)",
    )


def main(argv: list[str] | None = None) -> int:
    """Write the sets; return the exit status."""
    return run("vidore.py", __doc__, benchmarks, declare, argv)


if __name__ == "__main__":
    sys.exit(main())
