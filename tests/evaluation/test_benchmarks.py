"""The tables of benchmarks: as published, as prepared, and as one has them on disk."""

import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

import tiny
from metaembed_pl.cli.evaluate import BENCHMARKS
from metaembed_pl.data.beir import RetrievalSetWriter
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.benchmarks import Reference
from metaembed_pl.evaluation.mmeb import IN, MMEB, MMEB_V2, OUT, VISRAG
from metaembed_pl.evaluation.outcome import Outcome, TaskOutcome
from metaembed_pl.evaluation.registry import NAMED, OF_MTEB, open_benchmark
from metaembed_pl.evaluation.tables import reference_table
from metaembed_pl.evaluation.vidore import VIDORE_V1, VIDORE_V2, VIDORE_V3
from metaembed_pl.item import Item


def prepared(name, what):
    """A constant of a script of data_prep."""
    return getattr(importlib.import_module(f"metaembed_pl.data_prep.{name}"), what)


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
    parts = Counter(task.labels[0] for task in documents)
    assert parts == {"ViDoRe v1": 10, "ViDoRe v2": 4, "VisRAG": 6, "visual documents, OOD": 4}
    assert {task.metric for task in documents} == {"ndcg@5"}


@pytest.mark.parametrize("benchmark", NAMED.values(), ids=lambda one: one.name)
def test_no_two_tasks_of_a_benchmark_have_one_name(benchmark):
    """Each is kept in a file of its name."""
    assert len({task.name for task in benchmark.tasks}) == len(benchmark.tasks)


def test_vidore_v2_has_seven_tasks_over_four_sets():
    assert len(VIDORE_V2.tasks) == 7
    assert len({task.folder for task in VIDORE_V2.tasks}) == 4
    assert len(VIDORE_V2.labelled("English")) == 3
    row = VIDORE_V2.references[0]
    assert set(row.tasks) == {task.name for task in VIDORE_V2.tasks}
    # The paper's mean is the plain mean of its seven numbers.
    assert sum(row.tasks.values()) / 7 == pytest.approx(row.score, abs=0.05)


def test_the_scripts_write_where_the_benchmarks_read():
    subsets = prepared("mmeb_eval", "SETS")
    assert {f"mmeb_eval/{name}" for name in subsets} == {task.folder for task in MMEB.tasks}
    collections = prepared("vidore", "SETS")
    for subset, collection in collections.items():
        command = f"metaembed-pl prepare vidore --subset {subset}"
        tasks = [task for one in NAMED.values() for task in one.tasks if task.prepare == command]
        assert {task.folder for task in tasks} == {f"vidore/{name}" for name in collection.names}
        sources = {f"{collection.organisation}/{name}" for name in collection.names}
        assert {task.source for task in tasks} == sources


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
SHIPPED = [
    *((f"VisRAG {name}", f"Retrieval/VisRAGRet{name.replace('-', '')}") for name in VISRAG),
    ("MMLongBench-doc", "Image/DocumentUnderstanding/MMLongBenchDocRetrieval"),
]


def shipped_with_mteb(file):
    """What it tells of a dataset's only split; not imported, which takes seconds."""
    mteb = importlib.util.find_spec("mteb")
    if mteb is None:
        pytest.skip("mteb is not installed")
    path = Path(mteb.origin).parent / "descriptive_stats" / f"{file}.json"
    [of_split] = json.loads(path.read_text()).values()
    return of_split


def counts_of_mteb(name):
    """Queries by language, or in all; and pages."""
    whole = shipped_with_mteb(f"Image/DocumentUnderstanding/{name}Retrieval")
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
    name = task.name.removesuffix(" English").removesuffix(" multilingual").removesuffix(",")
    name = task.name if task.name in MTEB_NAMES else name
    name = f"v3 {name}" if benchmark is VIDORE_V3 and name == "Energy" else name
    queries, pages = counts_of_mteb(MTEB_NAMES[name])
    expected = queries["english"] if task.where else sum(queries.values())
    assert (task.num_queries, task.num_candidates) == (expected, pages)


@pytest.mark.parametrize(("name", "file"), SHIPPED)
def test_counts_of_mmeb_v2s_other_documents_are_those_that_mteb_ships(name, file):
    [task] = [task for task in MMEB_V2.tasks if task.name == name]
    shipped = shipped_with_mteb(file)
    assert task.num_queries == shipped["num_queries"]
    assert task.num_candidates == shipped["num_documents"]


def small_set(folder, num_queries=2):
    with RetrievalSetWriter(folder, folder.name) as writer:
        writer.add_candidate(Item("a", id="a"))
        for i in range(num_queries):
            writer.add_query(Item(f"q{i}", id=f"q{i}"), language="english")
            writer.judge(f"q{i}", "a")


def test_the_help_names_every_benchmark():
    assert ", ".join([*NAMED, *OF_MTEB, "beir:DIR", "pairs:DIR", "mteb:NAME"]) == BENCHMARKS


def test_missing_files_are_named_with_their_ids_and_the_command(tmp_path):
    small_set(tmp_path / "vidore/esg_reports_v2")
    with pytest.raises(UserError) as raised:
        open_benchmark("vidore_v2", tmp_path)
    said = str(raised.value)
    assert "3 of 4 sets are not in" in said
    assert "vidore/economics_reports_v2" in said
    assert "vidore/esg_reports_v2" not in said
    command = f"metaembed-pl prepare vidore --subset v2 --out {tmp_path}/vidore"
    assert said.endswith(f"get them with `{command}`")


def test_only_the_commands_for_what_is_missing_are_told(tmp_path):
    missing = ("vidore/VisRAG-Ret-Test-PlotQA", "vidore/ViDoSeek", "mmeb_eval/CIRR")
    for task in MMEB_V2.tasks:
        if task.folder not in missing:
            (tmp_path / task.folder).mkdir(parents=True)
    with pytest.raises(UserError) as raised:
        open_benchmark("mmeb_v2", tmp_path)
    said = str(raised.value)
    assert (
        f"3 of 60 sets are not in {tmp_path}: mmeb_eval/CIRR, {missing[0]}, {missing[1]};" in said
    )
    assert "TIGER-Lab/MMEB-eval, openbmb/VisRAG-Ret-Test-PlotQA, VLM2Vec/ViDoSeek;" in said
    assert [part.split(" --out ")[0] for part in said.split("`")[1].split("; ")] == [
        "metaembed-pl prepare mmeb_eval",
        "metaembed-pl prepare vidore --subset visrag",
        "metaembed-pl prepare vidore --subset visdoc_ood",
    ]


def test_others_stand_beside_this_model_in_the_means_that_they_are_known_by():
    scores = {"CIRR": (("retrieval", "image"), 0.5), "ESG": (("visual documents",), 1.0)}
    tasks = [
        TaskOutcome(name, "", labels, "", ["q"], 1, 0, None, {"/1x1": [score]}, {})
        for name, (labels, score) in scores.items()
    ]
    others = (*MMEB_V2.references, Reference("weaker", "", 9.0), Reference("no mean", "", None))
    table = reference_table(Outcome("", "", ["1x1"], {}, tasks), others)
    assert table.head == ["model", "budget", "overall", "image", "visual documents"]
    assert table.rows == [
        ["Qwen3-VL-Embedding-8B", "", "81.0", "80.1", "82.4"],
        ["this model", "1x1", "75.0", "50.0", "100.0"],
        ["weaker", "", "9.0", "", ""],
    ]
    assert table.strong == {1}
    means = MMEB_V2.references[0].tasks
    parts = [len(MMEB_V2.labelled(label)) * mean for label, mean in means.items()]
    assert sum(parts) / len(MMEB_V2.tasks) == pytest.approx(81.0, abs=0.05)


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


def test_links_to_folders_of_one_name_are_told_apart(tmp_path):
    (tmp_path / "sets").mkdir()
    for name in ("one", "two"):
        small_set(tmp_path / name / "test")
        (tmp_path / "sets" / name).symlink_to(tmp_path / name / "test")
    found = open_benchmark(f"beir:{tmp_path}/sets", tmp_path)
    assert [task.name for task in found.tasks] == ["one", "two"]


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
