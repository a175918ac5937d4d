"""The tables of benchmarks: as published, as prepared, and as one has them on disk."""

import importlib.util
import json
from pathlib import Path

import pytest

import tiny
from metaembed_pl.data.beir import RetrievalSetWriter
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.benchmarks import open_benchmark
from metaembed_pl.evaluation.mmeb import IN, MMEB, MMEB_V2, OUT
from metaembed_pl.evaluation.vidore import VIDORE_V1, VIDORE_V2, VIDORE_V3
from metaembed_pl.item import Item

DATA_PREP = Path(__file__).parents[2] / "data_prep"


def prepared(name, what, monkeypatch):
    """A constant of a script of data_prep."""
    monkeypatch.syspath_prepend(str(DATA_PREP))
    spec = importlib.util.spec_from_file_location(f"_{name}_for_names", DATA_PREP / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, what)


def test_mmeb_has_its_36_sets_in_their_meta_tasks():
    assert len({task.name for task in MMEB.tasks}) == 36
    sizes = {label: len(MMEB.labelled(label)) for label in MMEB.labels}
    assert sizes == {
        "classification": 10, IN: 20, OUT: 16, "VQA": 10, "retrieval": 12, "grounding": 4,
        "overall": 36,
    }  # fmt: skip
    assert {task.metric for task in MMEB.tasks} == {"precision@1"}


def test_mmeb_v2_has_36_image_sets_and_24_of_documents():
    assert len(MMEB_V2.labelled("image")) == 36
    documents = MMEB_V2.labelled("visual documents")
    assert len({task.name for task in documents}) == 24
    assert {task.metric for task in documents} == {"ndcg@5"}


def test_vidore_v2_has_seven_tasks_over_four_sets():
    assert len(VIDORE_V2.tasks) == 7
    assert len({task.folder for task in VIDORE_V2.tasks}) == 4
    assert len(VIDORE_V2.labelled("English")) == 3
    row = VIDORE_V2.references[0]
    assert set(row.tasks) == {task.name for task in VIDORE_V2.tasks}
    # The paper's mean is the plain mean of its seven numbers.
    assert sum(row.tasks.values()) / 7 == pytest.approx(row.score, abs=0.05)


def test_the_scripts_write_where_the_benchmarks_read(monkeypatch):
    subsets = prepared("mmeb_eval", "SUBSETS", monkeypatch)
    assert {f"mmeb_eval/{name}" for name in subsets} == {task.folder for task in MMEB.tasks}
    sets = prepared("vidore", "SETS", monkeypatch)
    for version, benchmark in (("v1", VIDORE_V1), ("v2", VIDORE_V2), ("v3", VIDORE_V3)):
        folders = {task.folder for task in benchmark.tasks}
        assert {f"vidore/{name}" for name in sets[version]} == folders


MTEB_NAMES = {
    **{"ArxivQA": "VidoreArxivQA", "DocVQA": "VidoreDocVQA", "InfoVQA": "VidoreInfoVQA"},
    **{"TabFQuAD": "VidoreTabfquad", "TAT-DQA": "VidoreTatdqa"},
    "Shift Project": "VidoreShiftProject",
    "Artificial Intelligence": "VidoreSyntheticDocQAAI",
    "Energy": "VidoreSyntheticDocQAEnergy",
    "Government Reports": "VidoreSyntheticDocQAGovernmentReports",
    "Healthcare Industry": "VidoreSyntheticDocQAHealthcareIndustry",
    "ESG human": "Vidore2ESGReportsHL",
    "Economics": "Vidore2EconomicsReports",
    "Biomedical": "Vidore2BioMedicalLectures",
    "ESG synthetic": "Vidore2ESGReports",
    **{
        f"Finance, {language}": f"Vidore3Finance{language[:2]}"
        for language in ("English", "French")
    },
    "Computer science": "Vidore3ComputerScience",
    "HR": "Vidore3Hr",
    "v3 Energy": "Vidore3Energy",
    **{name: f"Vidore3{name}" for name in ("Industrial", "Pharmaceuticals", "Physics")},
}


def counts_of_mteb(name):
    """Queries by language, or in all; and pages."""
    mteb = importlib.util.find_spec("mteb")
    folder = Path(mteb.origin).parent / "descriptive_stats/Image/DocumentUnderstanding"
    whole = json.loads((folder / f"{name}Retrieval.json").read_text())["test"]
    parts = whole.get("hf_subset_descriptive_stats") or {"all": whole}
    queries = {}
    for language, part in parts.items():
        text = part["queries_text_statistics"]
        queries[language] = round(text["total_text_length"] / text["average_text_length"])
    pages = {part["num_samples"] - queries[language] for language, part in parts.items()}
    return queries, *pages


@pytest.mark.parametrize(
    ("benchmark", "task"),
    [(b, task) for b in (VIDORE_V1, VIDORE_V2, VIDORE_V3) for task in b.tasks],
    ids=lambda value: value.name,
)
def test_counts_are_those_that_mteb_ships(benchmark, task):
    pytest.importorskip("mteb")
    name = task.name.removesuffix(" English").removesuffix(" multilingual").removesuffix(",")
    name = task.name if task.name in MTEB_NAMES else name
    name = f"v3 {name}" if benchmark is VIDORE_V3 and name == "Energy" else name
    queries, pages = counts_of_mteb(MTEB_NAMES[name])
    expected = queries["english"] if task.where else sum(queries.values())
    assert (task.num_queries, task.num_candidates) == (expected, pages)


def small_set(folder, num_queries=2):
    with RetrievalSetWriter(folder, folder.name) as writer:
        writer.add_candidate(Item("a", id="a"))
        for i in range(num_queries):
            writer.add_query(Item(f"q{i}", id=f"q{i}"), language="english")
            writer.judge(f"q{i}", "a")


def test_missing_files_are_named_with_their_ids_and_the_command(tmp_path):
    small_set(tmp_path / "vidore/esg_reports_v2")
    with pytest.raises(UserError) as raised:
        open_benchmark("vidore_v2", tmp_path)
    said = str(raised.value)
    assert "3 of 4 sets are not in" in said
    assert "vidore/economics_reports_v2" in said
    assert "vidore/esg_reports_v2" not in said
    assert "`python data_prep/vidore.py --subset v2`" in said


def test_a_set_of_another_size_than_published_is_told():
    task = VIDORE_V2.tasks[0]
    pages = [Item("page")] * 1538
    found = RetrievalSet("esg", [Item("q")] * 51, pages, [[0]] * 51)
    assert task.deviation(found) == "51 queries instead of 52"
    assert task.deviation(RetrievalSet("esg", [Item("q")] * 52, pages, [[0]] * 52)) is None


def test_a_folder_of_ones_own_is_one_set_or_several(tmp_path):
    for name in ("one", "two"):
        small_set(tmp_path / "sets" / name)
        tiny.shards(tmp_path / "shards" / name, 2)
    several = open_benchmark(f"beir:{tmp_path}/sets", tmp_path)
    assert [(task.name, task.metric) for task in several.tasks] == [
        ("one", "ndcg@10"), ("two", "ndcg@10"),
    ]  # fmt: skip
    assert len(several.tasks[0].open(tmp_path / "elsewhere").queries) == 2
    pairs = open_benchmark(f"pairs:{tmp_path}/shards/one", tmp_path)
    assert [(task.name, task.metric) for task in pairs.tasks] == [("one", "recall@1")]
    assert len(pairs.tasks[0].open(tmp_path).candidates) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vidore_2", r"no benchmark 'vidore_2' \(did you mean vidore_v2\?\)"),
        ("bier:x", "no benchmark 'bier:x'"),
        ("beir:nowhere", r"expected corpus\.jsonl in nowhere"),
        ("pairs:nowhere", r"expected \*\.tar in nowhere"),
    ],
)
def test_refuses_a_benchmark_that_is_none(tmp_path, name, message):
    with pytest.raises(UserError, match=message):
        open_benchmark(name, tmp_path)
