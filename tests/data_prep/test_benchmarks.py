"""Published benchmarks in their layouts: written here, read by their scripts, the same sets."""

import importlib
import json

import pytest

import hub
from metaembed_pl.data.beir import read_retrieval_set
from metaembed_pl.evaluation.mmeb import MMEB_V2


def run(script, out, *options):
    module = importlib.import_module(f"metaembed_pl.data_prep.{script}")
    return module.main(["--out", str(out), "--num-workers", "0", *options])


def shown(item):
    """An item as (text, encoded picture)."""
    return (item.text, item.image_content() or None)


MMEB_ROWS = [
    {
        "qry_text": "<|image_1|>\nWhat is it?",
        "qry_img_path": "CIRR/a.png",
        "tgt_text": ["a cat", "a dog", "a cat", "a fox"],
        "tgt_img_path": ["", "", "", ""],
    },
    {
        "qry_text": "a dog",
        "qry_img_path": "",
        "tgt_text": ["<|image_1|>\nLook", "<|image_1|>\nLook", "a dog"],
        "tgt_img_path": ["CIRR/b.png", "CIRR/c.png", ""],
    },
]


@pytest.fixture
def mmeb(tmp_path):
    copy = tmp_path / "MMEB-eval"
    hub.write_parquet(copy / "CIRR" / "test-00000-of-00001.parquet", MMEB_ROWS)
    pictures = {f"CIRR/{name}.png": hub.png(i) for i, name in enumerate("abc")}
    hub.write_zip(copy / "images.zip", pictures)
    return copy


def test_mmeb_eval_keeps_each_querys_own_candidates(tmp_path, mmeb):
    assert run("mmeb_eval", tmp_path / "out", "--from", str(mmeb), "--subset", "CIRR") == 0
    found = read_retrieval_set(tmp_path / "out" / "CIRR")
    assert [shown(query) for query in found.queries] == [
        ("What is it?", hub.png(0)),
        ("a dog", None),
    ]
    lists = [[shown(found.candidates[i]) for i in some] for some in found.lists]
    assert lists == [
        [("a cat", None), ("a dog", None), ("a fox", None)],
        [("Look", hub.png(1)), ("Look", hub.png(2)), ("a dog", None)],
    ]
    right = [[shown(found.candidates[i]) for i in some] for some in found.relevant]
    assert right == [[("a cat", None)], [("Look", hub.png(1))]]
    assert len(found.candidates) == 5  # "a dog" is one candidate of both


def test_a_set_that_is_made_is_kept_and_an_unfinished_one_is_made_again(tmp_path, mmeb, capsys):
    options = ("--from", str(mmeb), "--subset", "CIRR")
    out = tmp_path / "out"
    assert run("mmeb_eval", out, *options) == 0
    assert run("mmeb_eval", out, *options) == 0
    assert "kept" in capsys.readouterr().out
    card = out / "CIRR" / "README.md"
    assert "2 queries over 5 candidates, 2 of them right" in card.read_text()
    card.unlink()  # as if a kill came before it
    assert run("mmeb_eval", out, *options) == 0
    assert "written" in capsys.readouterr().out
    assert run("mmeb_eval", out, *options, "--limit", "1") == 2
    assert "CIRR is not empty: choose another --out, or use --force" in capsys.readouterr().err
    assert run("mmeb_eval", out, *options, "--limit", "1", "--force") == 0
    assert len(read_retrieval_set(out / "CIRR").queries) == 1


def test_nothing_is_dropped_from_a_benchmark_unless_it_is_asked_for(tmp_path, mmeb, capsys):
    hub.write_zip(mmeb / "images.zip", {"CIRR/b.png": hub.png(1), "CIRR/a.png": b"no picture"})
    options = ("--from", str(mmeb), "--subset", "CIRR")
    assert run("mmeb_eval", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err
    assert "dropped from CIRR: picture not found: CIRR/c.png" in error
    assert "CIRR: 2 of 7 queries and candidates cannot be used, more than --max-dropped 0" in error
    assert not (tmp_path / "out" / "CIRR").exists()
    assert run("mmeb_eval", tmp_path / "out", *options, "--max-dropped", "0.5") == 0
    found = read_retrieval_set(tmp_path / "out" / "CIRR")
    assert [query.text for query in found.queries] == ["a dog"]
    assert [len(some) for some in found.lists] == [2]
    card = (tmp_path / "out" / "CIRR" / "README.md").read_text()
    assert "picture not found: 1" in card


def test_candidates_that_do_not_match_in_number_are_named(tmp_path, capsys):
    row = MMEB_ROWS[0] | {"tgt_img_path": [""]}
    hub.write_parquet(tmp_path / "CIRR" / "test-00000-of-00001.parquet", [row])
    assert run("mmeb_eval", tmp_path / "out", "--from", str(tmp_path), "--subset", "CIRR") == 2
    assert "CIRR: row 0: expected as many tgt_text as tgt_img_path" in capsys.readouterr().err


QUERIES = [
    {"query-id": 0, "query": "what purrs?", "language": "english"},
    {"query-id": 1, "query": "qu'est-ce qui ronronne ?", "language": "french"},
    {"query-id": 2, "query": "what is nowhere?", "language": "english"},
]
QRELS = [(0, 10, 2), (0, 11, 1), (1, 10, 1), (1, 10, 2), (2, 11, 0)]
# Of v3 beside ids, score and language: metadata, and what a page says.
MORE = {
    "corpus": {"doc_id": "cats.pdf", "markdown": "Cats purr.", "page_number_in_doc": 4},
    "queries": {"query_types": ["open-ended"], "answer": "a cat", "text": "a name that is taken"},
    "qrels": {"content_type": ["Text"], "bounding_boxes": [{"annotator": 1, "x1": 0}]},
}


def write_vidore(copy, version, qrels=QRELS):
    tables = {
        "queries": [dict(row) for row in QUERIES],
        "corpus": [{"corpus-id": 10 + i, "image": hub.png(i)} for i in range(3)],
        "qrels": [dict(zip(("query-id", "corpus-id", "score"), row, strict=True)) for row in qrels],
    }
    for name, rows in tables.items():
        if version not in ("v2", "v3"):
            rows = [{key: value for key, value in row.items() if key != "language"} for row in rows]
        if version == "v3":
            rows = [{k.replace("-", "_"): v for k, v in row.items()} | MORE[name] for row in rows]
        if version == "visrag":  # ids are names there
            rows = [
                {k: f"{v}.png" if k[-2:] == "id" else v for k, v in row.items()} for row in rows
            ]
        if version == "visdoc_ood" and name == "queries":
            rows = [row | {"corpus_range": [10, 11]} for row in rows]
        images = ("image",) if name == "corpus" else ()
        split = "train" if version == "visrag" else "test"
        hub.write_parquet(copy / name / f"{split}-00000-of-00001.parquet", rows, images)


@pytest.mark.parametrize(
    ("version", "name"),
    [("v1", "tatdqa_test_beir"), ("v2", "esg_reports_v2"), ("v3", "vidore_v3_hr")],
)
def test_vidore_reads_queries_corpus_and_graded_judgements(tmp_path, version, name):
    write_vidore(tmp_path / "vidore" / name, version)
    options = ("--from", str(tmp_path / "vidore"), "--subset", name)
    assert run("vidore", tmp_path / "out", *options) == 0
    found = read_retrieval_set(tmp_path / "out" / name)
    assert [query.text for query in found.queries] == [row["query"] for row in QUERIES[:2]]
    assert [shown(page) for page in found.candidates] == [(None, hub.png(i)) for i in range(3)]
    assert found.relevant == [[0, 1], [0]]
    assert found.gains == [[2, 1], [2]]  # the higher of two judgements
    if version != "v1":
        french = read_retrieval_set(tmp_path / "out" / name, where={"language": "french"})
        assert [query.text for query in french.queries] == [QUERIES[1]["query"]]
    lines = (tmp_path / "out" / name / "corpus.jsonl").read_text().splitlines()
    page = json.loads(lines[0])
    assert (page.get("text_layer"), page.get("doc_id"), page.get("text")) == (
        ("Cats purr.", "cats.pdf", None) if version == "v3" else (None, None, None)
    )


def test_a_version_of_vidore_is_all_of_its_sets(tmp_path, capsys):
    from metaembed_pl.data_prep import vidore

    names = vidore.SETS["v2"].names
    for name in names:
        write_vidore(tmp_path / "vidore" / name, "v2")
    assert (
        run("vidore", tmp_path / "out", "--from", str(tmp_path / "vidore"), "--subset", "v2") == 0
    )
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    assert [len(collection.names) for collection in vidore.SETS.values()] == [10, 4, 8, 6, 4]
    (tmp_path / "vidore" / "esg_reports_v2" / "qrels" / "test-00000-of-00001.parquet").unlink()
    options = ("--from", str(tmp_path / "vidore"), "--subset", "esg_reports_v2", "--force")
    assert run("vidore", tmp_path / "out", *options) == 2
    assert "esg_reports_v2 has no file qrels/test-*.parquet" in capsys.readouterr().err
    assert len(read_retrieval_set(tmp_path / "out" / "esg_reports_v2").queries) == 2  # the old one


def test_mmeb_v2_evaluates_what_the_script_writes_of_its_other_documents(tmp_path):
    from metaembed_pl.data_prep import vidore

    # In ViDoSeek and MMLongBench pages of the right document have 2, those with the answer 3 too.
    qrels = [(0, 10, 2), (0, 11, 2), (0, 11, 3), (1, 12, 2)]
    for part in ("visrag", "visdoc_ood"):
        for name in vidore.SETS[part].names:
            write_vidore(tmp_path / "hub" / name, part, qrels)
    options = ("--subset", "visrag", "--subset", "visdoc_ood", "--from", str(tmp_path / "hub"))
    assert run("vidore", tmp_path / "data" / "vidore", *options) == 0
    tasks = [*MMEB_V2.labelled("VisRAG"), *MMEB_V2.labelled("visual documents, OOD")]
    assert len(tasks) == 10
    for task in tasks:
        found = task.open(tmp_path / "data")
        assert [query.text for query in found.queries] == [row["query"] for row in QUERIES[:2]]
        assert [shown(page) for page in found.candidates] == [(None, hub.png(i)) for i in range(3)]
        assert (found.relevant, found.gains) == ([[0, 1], [2]], [[2, 3], [2]])
        assert task.deviation(found).startswith(f"2 queries instead of {task.num_queries:,}")
