"""BM25 as a baseline: the formula, over what may be read, with ties against it."""

import math

import pytest

import tiny

pytest.importorskip("bm25s")

import torch

from metaembed_pl.data.beir import RetrievalSetWriter, read_retrieval_set
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.bm25 import bm25_metrics
from metaembed_pl.item import Item
from metaembed_pl.ranking import ranking_metrics

TEXTS = [
    "red cat on a mat",
    "a red dog",
    "blue fish and a red fish",
    "the sun the moon",
    "a cat a cat",
]
ASKED = ["red cat", "fish", "moon tree", "unheard of"]


def by_the_formula(asked, texts, k1=1.5, b=0.75):
    """Scores of Lucene's BM25, which bm25s has as its default."""
    words = [[word for word in text.split() if len(word) > 1] for text in texts]
    mean = sum(map(len, words)) / len(words)
    rows = []
    for query in asked:
        row = []
        for document in words:
            score = 0.0
            for word in query.split():
                df = sum(word in other for other in words)
                tf = document.count(word)
                idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
                score += idf * tf / (tf + k1 * (1 - b + b * len(document) / mean)) if df else 0
            row.append(score)
        rows.append(row)
    return torch.tensor(rows)


def test_ranks_are_those_of_the_formula():
    task = RetrievalSet(
        "x", [Item(a) for a in ASKED], [Item(t) for t in TEXTS], [[0], [2], [3], [1]]
    )
    expected = ranking_metrics(by_the_formula(ASKED, TEXTS), task.relevant)
    found = bm25_metrics(task)
    assert {name: values.tolist() for name, values in expected.items()} == found
    assert found["mrr"][3] == pytest.approx(
        1 / 5
    )  # a query without a known word ties with everything


def test_a_page_is_read_by_its_text_layer(tmp_path):
    with RetrievalSetWriter(tmp_path / "set", "pages") as writer:
        for i, text in enumerate(TEXTS):
            page = Item("words for the model", tiny.picture(i), id=f"p{i}")
            writer.add_candidate(page, text_layer=text)
        writer.add_query(Item("moon", id="q"))
        writer.judge("q", "p3")
    assert bm25_metrics(read_retrieval_set(tmp_path / "set"))["precision@1"] == [1.0]


def test_pictures_without_words_are_refused():
    task = RetrievalSet("x", [Item("q")], [Item(image=tiny.picture(0))], [[0]])
    with pytest.raises(UserError, match="x: no candidate has a text for BM25"):
        bm25_metrics(task)
