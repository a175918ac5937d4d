"""Retrieval sets on disk, in BEIR's layout with images: reader and writer.

    corpus.jsonl           {"_id": "page-3", "image": "images/1f/1f83.png", "language": "en"}
    queries.jsonl          {"_id": "q-1", "text": "line styles", "language": "en"}
    qrels/test.tsv         query-id, corpus-id and score under a header, with tabs between
    candidates/test.jsonl  {"query-id": "q-1", "corpus-ids": ["page-3", "page-9"]}: only where each
                           query has candidates of its own; without the file it searches them all
    manifest.json          name, licence, counts; optional when reading

A model reads `text` (after `instruction` and `title`, where there are any) and `image`. All other
keys are metadata: a `language` to choose queries by, the `text_layer` of a page, which is for BM25
and not for the model.

    with RetrievalSetWriter(Path("sets/manuals"), "manuals", licence="GPL-2.0") as writer:
        writer.add_candidate(Item(image=Path("p3.png"), id="page-3"), text_layer="Line styles ...")
        writer.add_query(Item("line styles", id="q-1"), language="en")
        writer.judge("q-1", "page-3")
    manuals = read_retrieval_set(Path("sets/manuals"))
"""

from metaembed_pl.data.beir_reader import StoredItems, is_retrieval_set, read_retrieval_set
from metaembed_pl.data.beir_writer import RetrievalSetWriter

__all__ = ["RetrievalSetWriter", "StoredItems", "is_retrieval_set", "read_retrieval_set"]
