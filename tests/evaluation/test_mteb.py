"""The model in mteb: its scores on tasks of its own classes are ours on the same data."""

import json
import logging
import warnings

import pytest
import torch

import tiny

mteb = pytest.importorskip("mteb")
datasets = pytest.importorskip("datasets")

from mteb.abstasks.retrieval import AbsTaskRetrieval  # noqa: E402
from mteb.abstasks.task_metadata import TaskMetadata  # noqa: E402
from mteb.models import MultiVectorWrapper  # noqa: E402
from sentence_transformers import MultiVectorEncoder  # noqa: E402

from metaembed_pl.cli.main import main  # noqa: E402
from metaembed_pl.data.beir import RetrievalSetWriter  # noqa: E402
from metaembed_pl.errors import UserError  # noqa: E402
from metaembed_pl.evaluation import mteb_tasks  # noqa: E402
from metaembed_pl.evaluation.mteb import MtebEncoder  # noqa: E402
from metaembed_pl.evaluation.registry import open_benchmark  # noqa: E402
from metaembed_pl.evaluation.run import EvaluationOptions, evaluate  # noqa: E402
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
    found = evaluate(
        model, benchmark, model.groups, EvaluationOptions(root, root / "out", dtype="fp32")
    )
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


@pytest.mark.parametrize("kind", [LocalPages, LocalLists])
def test_a_task_that_mteb_reads_is_the_set_that_it_has(kind, tmp_path):
    parts = list(mteb_tasks._parts(kind()))
    assert [(part.name, part.metric) for part in parts] == [(kind.metadata.name, "ndcg@5")]
    found = parts[0].open(tmp_path)
    assert {item.id: item.text for item in found.queries} == QUERIES
    pictures = {item.id: item.load_image().tobytes() for item in found.candidates}
    assert pictures == {id: picture.tobytes() for id, picture in PAGES.items()}
    ids = list(pictures)
    for query, right, gains in zip(found.queries, found.relevant, found.gains, strict=True):
        judged = {ids[place]: gain for place, gain in zip(right, gains, strict=True) if gain}
        assert judged == {id: score for id, score in QRELS[query.id].items() if score}
    if kind is LocalLists:
        for query, places in zip(found.queries, found.lists, strict=True):
            assert {ids[place] for place in places} == set(LISTS[query.id])
    parts[0].task.dataset = None  # kept, not loaded again
    assert parts[0].open(tmp_path).queries[0].text == QUERIES["query-0"]


@pytest.mark.parametrize(("name", "at_least"), [("jina_vdr", 40), ("vidore_v3.1", 8)])
def test_benchmarks_of_mteb_are_known_by_name(name, at_least, tmp_path):
    found = open_benchmark(name, tmp_path)
    assert len(found.tasks) >= at_least
    assert {task.metric for task in found.tasks} <= {"ndcg@5", "ndcg@10"}
    assert len({task.folder for task in found.tasks}) == len(found.tasks)
    with pytest.raises(UserError, match="mteb could not load"):
        found.tasks[0].open(tmp_path)
    assert not list(tmp_path.rglob("corpus.jsonl"))


def test_an_unknown_benchmark_of_mteb_is_told_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match=r"no benchmark or task 'JinaVDRR'; did you mean mteb:Jina"):
        open_benchmark("mteb:JinaVDRR", tmp_path)


def test_mteb_itself_takes_texts_and_pictures_of_an_export(ours, tmp_path, monkeypatch):
    """Its own wrapper, with what stands in the folder alone."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tiny.embedder().save_pretrained(tmp_path / "model")
    where = ["--run", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert main(["export", *where, "--format", "sentence-transformers"]) == 0
    model = MultiVectorEncoder(str(tmp_path / "out"), trust_remote_code=True, device="cpu")
    settings = json.loads((tmp_path / "out" / "sentence_bert_config.json").read_text())
    wrapped = MultiVectorWrapper(model)
    taken = wrapped.mteb_model_meta._detect_modalities_from_sbert_config(settings)
    assert taken == ["image", "text"]
    wrapped.mteb_model_meta.modalities = taken
    found = mteb.evaluate(wrapped, LocalPages(), cache=None, show_progress_bar=False)
    theirs = found.task_results[0].scores["test"][0]
    assert theirs["ndcg_at_5"] == pytest.approx(ours["evaluate/LocalPages/ndcg@5/4x8"], abs=1e-4)
