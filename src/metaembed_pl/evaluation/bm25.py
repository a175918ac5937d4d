"""BM25, the keyword baseline, over a page's text layer or a candidate's text.

For documents with text it is cheap and hard to beat, so compare page models with it. Needs the
extra `bm25`.
"""

import logging
from collections.abc import Mapping
from importlib.util import find_spec

import torch

from metaembed_pl.data.beir import StoredItems
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.benchmarks import Reference
from metaembed_pl.ranking import ranking_metrics

TEXT_LAYER = "text_layer"


def bm25_metrics(task: RetrievalSet) -> dict[str, list[float]]:
    """The scores of each query with BM25, by the metrics of models: ties count against it.

    Words are separated by spaces and punctuation, in lower case; no stemming, no stop words.

    Raises:
        UserError: the extra is missing, or no candidate or no query has a text.
    """
    if find_spec("bm25s") is None:
        raise UserError("BM25 needs bm25s: pip install metaembed-pl[bm25]")
    import bm25s

    logging.getLogger("bm25s").setLevel(logging.WARNING)
    texts = _texts(task)
    queries = [query.text or "" for query in task.queries]
    if not any(texts) or not any(queries):
        side = "candidate" if any(queries) else "query"
        raise UserError(f"{task.name}: no {side} has a text for BM25")
    settings = {"stopwords": None, "show_progress": False}
    index = bm25s.BM25()
    index.index(bm25s.tokenize(texts, **settings), show_progress=False)
    words = bm25s.tokenize(queries, return_ids=False, **settings)
    known = index.vocab_dict
    rows = []
    for of_query in words:
        found = [str(word) for word in of_query if word in known]
        rows.append(
            torch.from_numpy(index.get_scores(found)).float() if found else torch.zeros(len(texts))
        )
    values = ranking_metrics(
        torch.stack(rows), task.relevant, gains=task.gains, lists=task.lists, itself=task.itself
    )
    return {name: of_queries.tolist() for name, of_queries in values.items()}


def bm25_reference(scores: Mapping[str, float]) -> Reference:
    """BM25 as a row beside models, from its score on each task."""
    points = {task: 100 * score for task, score in scores.items()}
    return Reference(
        "BM25 over the text layer (run here)", "", sum(points.values()) / len(points), points
    )


def _texts(task: RetrievalSet) -> list[str]:
    """The text of each candidate: its text layer, or else its title and text."""
    stored = task.candidates
    if isinstance(stored, StoredItems):
        records = (stored.record(i) for i in range(len(stored)))
        return [
            record.get(TEXT_LAYER)
            or f"{record.get('title') or ''} {record.get('text') or ''}".strip()
            for record in records
        ]
    return [item.text or "" for item in stored]
