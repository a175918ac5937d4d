"""MMEB's 36 test sets -> retrieval sets in which each query has its own list of candidates.

    python data_prep/mmeb_eval.py                          # all, to data/mmeb_eval/NAME
    python data_prep/mmeb_eval.py --subset CIRR --limit 100 --from ~/MMEB-eval

Layout (the paper's description of TIGER-Lab/MMEB-eval; MoCa's prepare_images.sh for the zip):
NAME/test-*.parquet with qry_text and qry_img_path, and tgt_text and tgt_img_path as lists of equal
length: the candidates of this query, at most 1,000, of which the first is the right one; the
pictures in images.zip. Texts have `<|image_1|>` in place of the picture; it is removed.

A candidate that occurs in many lists is stored once, under a hash of its text and its picture's
path. A list keeps duplicate candidates once, or copies of the right one would count as wrong.

Not yet verified on the hub's files: the names of the Parquet files.
"""

import argparse
import hashlib
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

from metaembed_pl.data_prep._mmeb import SETS, item, places
from metaembed_pl.data_prep._retrieval import Record, RetrievalDraft, run
from metaembed_pl.data_prep._rows import read_rows
from metaembed_pl.data_prep._source import declare_source
from metaembed_pl.errors import UserError

HUB = "TIGER-Lab/MMEB-eval"
COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


def rows(where: str, subset: str, limit: int | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """The id and the row of each query."""
    found = read_rows(where, f"{subset}/test-*.parquet", COLUMNS)
    for number, row in enumerate(islice(found, limit)):
        num_texts, num_paths = (len(row[name] or ()) for name in COLUMNS[2:])
        if not num_texts == num_paths > 0:
            raise UserError(
                f"{subset}: row {number}: expected as many tgt_text as tgt_img_path, at least one "
                f"of each, got {num_texts} and {num_paths}"
            )
        yield f"{subset}:{number}", row


def targets(row: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The candidates of a row by id, each once, the right one first."""
    return {
        candidate_id(text or "", path or ""): (text or "", path or "")
        for text, path in zip(row["tgt_text"], row["tgt_img_path"], strict=True)
    }


def candidate_id(text: str, path: str) -> str:
    """An id for a candidate, from its content.

    >>> candidate_id("a cat", "") == candidate_id("a cat", "a.jpg")
    False
    """
    return hashlib.sha256(f"{len(text)} {text}{path}".encode("utf-8", "replace")).hexdigest()[:24]


def candidates(where: str, subset: str, limit: int | None, pictures: Any) -> Iterator[Record]:
    """All candidates of all rows, each once."""
    seen: set[str] = set()
    for _, row in rows(where, subset, limit):
        for id, (text, path) in targets(row).items():
            if id not in seen:
                seen.add(id)
                yield {"id": id, **item(text, path, pictures)}


def benchmarks(options: argparse.Namespace) -> Iterator[RetrievalDraft]:
    """One set per subset."""
    for subset in options.subset or SETS:
        where, limit = options.where, options.limit
        pictures = places(where, "images.zip")
        read = partial(rows, where, subset, limit)
        yield RetrievalDraft(
            name=subset,
            folder=options.out / subset,
            candidates=partial(candidates, where, subset, limit, pictures),
            queries=lambda read=read, pictures=pictures: (
                {"id": id, **item(row["qry_text"], row["qry_img_path"], pictures)}
                for id, row in read()
            ),
            judgements=lambda read=read: ((id, next(iter(targets(row))), 1) for id, row in read()),
            lists=lambda read=read: ((id, list(targets(row))) for id, row in read()),
            source=f"{where}, {subset}, split test",
            settings={"from": where, "subset": subset},
            licence="Apache-2.0",  # the hub's card
            note="The licence is the collection's; each dataset's pictures have their own.",
        )


def declare(parser: argparse.ArgumentParser) -> None:
    """The flags of this script."""
    declare_source(parser, "data/mmeb_eval", HUB, SETS)


main = partial(run, "mmeb_eval", __doc__, benchmarks, declare)

if __name__ == "__main__":
    sys.exit(main())
