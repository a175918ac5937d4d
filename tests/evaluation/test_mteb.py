"""The model in mteb: its scores on tasks of its own classes are ours on the same data."""

import logging
import warnings

import pytest
import torch

import tiny

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402

from metaembed_pl.data.beir import RetrievalSetWriter  # noqa: E402
from metaembed_pl.errors import UserError  # noqa: E402
from metaembed_pl.evaluation.mteb import MtebEncoder  # noqa: E402
from metaembed_pl.evaluation.registry import open_benchmark  # noqa: E402
from metaembed_pl.evaluation.run import Settings, evaluate  # noqa: E402
from metaembed_pl.item import Item  # noqa: E402

pytestmark = pytest.mark.filterwarnings("default")  # mteb's own libraries warn

NUM_PAGES, NUM_QUERIES = 20, 12
PAGES = {f"page-{i}": tiny.picture(i, (56, 28 + 28 * (i % 3))) for i in range(NUM_PAGES)}
QUERIES = {f"query-{i}": tiny.text(i, 2 + i % 4) for i in range(NUM_QUERIES)}
QRELS = {
    f"query-{i}": {f"page-{(i + 7 * j) % NUM_PAGES}": 1 + j % 2 for j in range(1 + i % 4)}
    | {f"page-{(i + 3) % NUM_PAGES}": 0}
    for i in range(NUM_QUERIES)
}
LISTS = {
    id: [*[page for page, score in QRELS[id].items() if score], *list(PAGES)[i : i + 6]]
    for i, id in enumerate(QUERIES)
}


class LocalPages(AbsTaskRetrieval):
    """Questions to pages, made above: mteb's own class, and no hub."""

    metadata = TaskMetadata(
        name="LocalPages",
        dataset={"path": "local/pages", "revision": "1"},
        description="Pages made in code.",
        reference=None,
        type="DocumentUnderstanding",
        category="t2i",
        modalities=["text", "image"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_5",
        date=("2026-01-01", "2026-01-02"),
        domains=["Academic"],
        task_subtypes=[],
        license="cc0-1.0",
        annotations_creators="derived",
        dialect=[],
        sample_creation="created",
        bibtex_citation="",
        prompt={"query": "Find the page."},
    )

    def load_data(self, num_proc=None, **kwargs):
        corpus = {"id": list(PAGES), "image": list(PAGES.values())}
        features = datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()})
        queries = {"id": list(QUERIES), "text": list(QUERIES.values())}
        split = {
            "corpus": datasets.Dataset.from_dict(corpus, features=features),
            "queries": datasets.Dataset.from_dict(queries),
            "relevant_docs": QRELS,
            "top_ranked": self.top_ranked_documents(),
        }
        self.dataset = {"default": {"test": split}}
        self.data_loaded = True

    def top_ranked_documents(self):
        return None


class LocalLists(LocalPages):
    """The same with candidates of their own for each query: what mteb calls reranking."""

    metadata = LocalPages.metadata.model_copy(update={"name": "LocalLists"})

    def top_ranked_documents(self):
        return {id: list(dict.fromkeys(pages)) for id, pages in LISTS.items()}


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    """Our scores of both tasks: task -> metric -> value."""
    root = tmp_path_factory.mktemp("local")
    for name in ("LocalPages", "LocalLists"):
        with RetrievalSetWriter(root / "sets" / name, name) as writer:
            for id, image in PAGES.items():
                writer.add_candidate(Item(image=image, id=id))
            for id, text in QUERIES.items():
                writer.add_query(Item(text, id=id))
                for page, score in QRELS[id].items():
                    writer.judge(id, page, score)
                if name == "LocalLists":
                    writer.list_candidates(id, LISTS[id])
    model = tiny.embedder()
    benchmark = open_benchmark(f"beir:{root}/sets", root)
    found = evaluate(model, benchmark, model.groups, Settings(root, root / "out", dtype="fp32"))
    return found.metrics()


OURS = {
    "ndcg@5": "ndcg_at_5", "ndcg@10": "ndcg_at_10", "recall@1": "recall_at_1",
    "recall@5": "recall_at_5", "recall@10": "recall_at_10", "precision@1": "precision_at_1",
    "mrr": "mrr_at_1000",
}  # fmt: skip


@pytest.mark.parametrize("task", [LocalPages, LocalLists])
@pytest.mark.parametrize("budget", ["1x1", "4x1", "4x8"])
def test_scores_are_those_of_mteb_on_the_same_data(ours, task, budget):
    encoder = MtebEncoder(tiny.embedder(), budget=budget, name="local/tiny")
    logging.getLogger("mteb").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = mteb.evaluate(
            encoder, task(), cache=None, show_progress_bar=False, encode_kwargs={"batch_size": 3}
        )
    (scores,) = result.task_results[0].scores["test"]
    if budget == "4x1":  # not one of the groups, which is what `ours` has
        assert scores["ndcg_at_5"] != pytest.approx(ours[f"evaluate/{task.__name__}/ndcg@5/1x1"])
        return
    for name, theirs in OURS.items():
        value = ours[f"evaluate/{task.__name__}/{name}/{budget}"]
        # mteb rounds to five digits.
        assert scores[theirs] == pytest.approx(value, abs=1e-5), name


def test_the_model_meta_says_what_mteb_keeps():
    meta = MtebEncoder(tiny.embedder(), budget="2x4", name="local/tiny").mteb_model_meta
    assert meta.similarity_fn_name == "MaxSim"
    assert meta.model_type == ["late-interaction"]
    assert (meta.embed_dim, meta.experiment_kwargs) == (32, {"budget": "2x4"})
    assert meta.n_parameters == sum(p.numel() for p in tiny.embedder().parameters())


def test_a_budget_above_the_models_and_a_task_without_sides_are_refused():
    with pytest.raises(UserError, match="not trained at 16 query vectors"):
        MtebEncoder(tiny.embedder(), budget="16x64")
    encoder = MtebEncoder(tiny.embedder())
    with pytest.raises(UserError, match=r"LocalPages: .* type DocumentUnderstanding"):
        encoder.encode([], task_metadata=LocalPages.metadata, hf_split="test", hf_subset="default")


def test_mteb_loads_a_model_folder_by_its_meta(tmp_path):
    tiny.embedder().save_pretrained(tmp_path / "tiny")
    meta = MtebEncoder(str(tmp_path / "tiny"), budget="2x4").mteb_model_meta
    assert meta.name.endswith("/tiny")
    loaded = meta.loader(str(tmp_path / "tiny"), **meta.loader_kwargs)
    assert str(loaded.budget) == "2x4"
    assert torch.equal(loaded.model.encode_query(["a"]), tiny.embedder().encode_query(["a"]))
