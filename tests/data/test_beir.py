"""Retrieval sets on disk: what is written is read, and what is wrong is named."""

import json
import pickle

import pytest
from PIL import Image

from metaembed_pl.data.beir import RetrievalSetWriter, StoredItems, read_retrieval_set
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item

CORPUS = '{"_id": "a", "text": "A"}\n{"_id": "b", "text": "B"}\n{"_id": "c", "text": "C"}\n'
QUERIES = '{"_id": "1", "text": "one"}\n{"_id": "2", "text": "two"}\n'
QRELS = "query-id\tcorpus-id\tscore\n1\ta\t1\n2\tc\t2\n"


def picture(shade):
    return Image.new("RGB", (4, 4), (shade, 0, 0))


def folder(path, corpus=CORPUS, queries=QUERIES, qrels=QRELS, lists=None):
    """A retrieval set written by hand."""
    files = {
        "corpus.jsonl": corpus,
        "queries.jsonl": queries,
        "qrels/test.tsv": qrels,
        "candidates/test.jsonl": lists,
    }
    for name, content in files.items():
        if content is not None:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_what_is_written_is_read(tmp_path):
    pages = [Item(image=picture(i), id=f"page/{i}") for i in range(3)]
    with RetrievalSetWriter(tmp_path / "set", "pages", licence="CC0-1.0") as writer:
        for i, page in enumerate(pages):
            writer.add_candidate(page, text_layer=f"words of page {i}")
        writer.add_query(Item("wörds", image=picture(9), id="q"), language="de")
        writer.add_query(Item("more", id="r", instruction="Find the page."), language="en")
        writer.judge("q", "page/2", 2)
        writer.judge("q", "page/0")
        writer.judge("r", "page/1", 0.5)
    read = read_retrieval_set(tmp_path / "set")
    assert (read.name, len(read.candidates), read.lists) == ("pages", 3, None)
    assert (read.relevant, read.gains) == ([[0, 2], [1]], [[1.0, 2.0], [0.5]])
    assert read.gains_of(0) == {0: 1.0, 2: 2.0}
    assert [read.queries[0].text, read.queries[1].instruction] == ["wörds", "Find the page."]
    assert read.queries[0].load_image() == picture(9)
    assert [item.load_image() for item in read.candidates] == [page.image for page in pages]
    assert read.candidates.record(1)["text_layer"] == "words of page 1"
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert (manifest["num_candidates"], manifest["num_right"]) == (3, 3)
    assert manifest["licence"] == "CC0-1.0"


def test_candidate_lists_are_read_in_order_and_each_candidate_once(tmp_path):
    lists = '{"query-id": "2", "corpus-ids": ["c", "b", "c"]}\n' + (
        '{"query-id": "1", "corpus-ids": ["a", "c"]}\n'
    )
    read = read_retrieval_set(folder(tmp_path, lists=lists))
    assert read.lists == [[0, 2], [2, 1]]
    assert list(read.searched(1)) == [2, 1]


def test_a_picture_that_comes_twice_is_stored_once(tmp_path):
    with RetrievalSetWriter(tmp_path / "set", "x") as writer:
        for id in "ab":
            writer.add_candidate(Item(image=picture(1), id=id))
        writer.add_query(Item("q", id="q"))
        writer.judge("q", "a")
    assert len(list((tmp_path / "set").rglob("*.png"))) == 1


def test_the_highest_of_two_judgements_counts_and_zero_is_wrong(tmp_path):
    qrels = QRELS + "1\ta\t3\n1\ta\t2\n1\tb\t0\n2\tb\t-1\n"
    read = read_retrieval_set(folder(tmp_path, qrels=qrels))
    assert read.gains == [[3.0], [2.0]]


def test_a_query_without_a_right_candidate_is_left_out_and_counted(tmp_path):
    read = read_retrieval_set(folder(tmp_path, qrels=QRELS.replace("1\ta\t1", "1\ta\t0")))
    assert ([query.text for query in read.queries], read.num_left_out) == (["two"], 1)


def test_reads_a_plain_beir_download(tmp_path):
    corpus = (
        '\ufeff{"_id": "a", "title": "Ti", "text": "tle", "metadata": {}}\r\n\r\n'
        '{"_id": 7, "title": "", "text": "B", "metadata": {"url": "x"}}\n'
        '{"_id": "c", "text": "C"}'
    )
    read = read_retrieval_set(folder(tmp_path / "scifact", corpus, qrels=QRELS + "1\t7\t1\n"))
    assert [item.text for item in read.candidates] == ["Ti tle", "B", "C"]
    assert (read.name, read.relevant) == ("scifact", [[0, 1], [2]])


def test_an_empty_document_stays_in_the_pool_as_one_that_does_not_decode(tmp_path):
    read = read_retrieval_set(folder(tmp_path, CORPUS + '{"_id": "d", "title": "", "text": ""}\n'))
    with pytest.raises(UserError, match="does not decode"):
        read.candidates[3].load_image()


def test_queries_are_chosen_by_their_metadata(tmp_path):
    queries = QUERIES.replace('"two"', '"two", "language": "english"')
    path = folder(tmp_path, queries=queries)
    read = read_retrieval_set(path, "english", where={"language": "english"})
    assert (read.name, [query.text for query in read.queries]) == ("english", ["two"])
    assert len(read.candidates) == 3
    for where, there in (
        ({"language": "latin"}, "its values of 'language' are english"),
        ({"lang": "english"}, "no query has the key 'lang', but _id, language, text"),
        ({"_id": "1", "language": "english"}, "each value occurs, but not all in one query"),
    ):
        with pytest.raises(UserError, match=f"none of 2 queries has .*; {there}$"):
            read_retrieval_set(path, where=where)


def test_queries_are_chosen_by_numbers_as_well(tmp_path):
    queries = QUERIES.replace('"two"', '"two", "page": 3')
    read = read_retrieval_set(folder(tmp_path, queries=queries), where={"page": "3"})
    assert [query.text for query in read.queries] == ["two"]


def test_another_split_is_read_by_its_name(tmp_path):
    path = folder(tmp_path)
    (path / "qrels" / "dev.tsv").write_text("query-id\tcorpus-id\tscore\n2\tb\t1\n")
    assert read_retrieval_set(path, split="dev").relevant == [[1]]


def test_items_go_to_workers_without_their_content(tmp_path):
    big = "".join(json.dumps({"_id": f"{i}", "text": "word " * 1000}) + "\n" for i in range(50))
    items = StoredItems(folder(tmp_path, big, qrels=None) / "corpus.jsonl")
    sent = pickle.dumps(items)
    assert len(sent) < 5000
    assert pickle.loads(sent)[49].text == ("word " * 1000).strip()


LISTS = '{"query-id": "1", "corpus-ids": ["a"]}\n{"query-id": "2", "corpus-ids": ["c"]}\n'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"qrels": None}, r"qrels/test.tsv is missing: .* qrels/SPLIT.tsv"),
        ({"corpus": None}, r"corpus.jsonl is missing: .*there are qrels, queries.jsonl"),
        ({"corpus": ""}, "corpus.jsonl is empty"),
        ({"corpus": CORPUS + '{"_id": "a", "text": "again"}'}, r":4: _id 'a' .* line 1"),
        ({"corpus": '{"id": "a", "text": "A"}'}, r':1: expected an "_id", got the keys id, text'),
        ({"corpus": '{"_id": "a", "text": 3}'}, ":1: title and text must be strings, not int"),
        ({"corpus": '["a"]'}, ":1: expected a JSON object, got a list"),
        ({"corpus": '{"_id": "a"'}, ":1: not a line of JSON"),
        ({"corpus": b"\xff"}, "corpus.jsonl:1: not UTF-8"),
        ({"corpus": '{"_id": "a", "image": "../a.png"}'}, r"':? ?.*a.png' leaves the data folder"),
        ({"corpus": '{"_id": "a", "image": "/etc/a.png"}'}, "'/etc/a.png' leaves the data folder"),
        ({"corpus": '{"_id": "a", "image": "http://x/a.png"}'}, "'http://x/a.png' is an address"),
        ({"qrels": QRELS + "1\ta\n"}, "test.tsv:4: .* got 2 columns"),
        ({"qrels": QRELS + "1\ta\tyes\n"}, "test.tsv:4: the score must be a number, got 'yes'"),
        ({"qrels": QRELS + "1\ta\tnan\n"}, "test.tsv:4: the score must be a number, got 'nan'"),
        ({"qrels": "1\ta\t1\n"}, r"test.tsv:1: expected the header .* \['1', 'a', '1'\]"),
        ({"qrels": QRELS[:25] + "1\ta\t0\n"}, "not one of 2 queries has a candidate with a score"),
        ({"lists": LISTS.replace('"a"', '"b"')}, "list of query '1' does not contain 'a'"),
        ({"lists": LISTS.splitlines()[0]}, "no list for query '2'"),
        ({"lists": LISTS + LISTS}, ":3: query '1' has two lists"),
        ({"lists": LISTS.replace('"c"', '"z"')}, "list of query '2' does not contain 'c'"),
        ({"lists": LISTS.replace("corpus-ids", "ids")}, ':1: expected {"query-id": "...", "corpus'),
    ],
)
def test_refuses_what_does_not_fit(tmp_path, files, message):
    with pytest.raises(UserError, match=message):
        read_retrieval_set(folder(tmp_path, **files))


def test_refuses_a_picture_behind_a_link_out_of_the_folder(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"x")
    path = folder(tmp_path / "set", '{"_id": "a", "image": "a.png"}\n')
    (path / "a.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match=r"a\.png' leaves the data folder through a link"):
        read_retrieval_set(path)


def write_one(path, item, metadata, right="a"):
    with RetrievalSetWriter(path, "x") as writer:
        writer.add_candidate(Item("A", id="a"))
        writer.add_candidate(item, **metadata)
        writer.add_query(Item("Q", id="q"))
        writer.judge("q", right)


@pytest.mark.parametrize(
    ("item", "metadata", "message"),
    [
        (Item("A", id="a"), {}, "contains 'a' already"),
        (Item("B", id="b\t"), {}, r"'b\\t' contains a tab"),
        (Item("B", id="b"), {"title": "x"}, "metadata 'title' is a reserved name"),
        (Item(image=b"no picture", id="b"), {}, "does not decode"),
    ],
)
def test_refuses_what_could_not_be_read_and_leaves_nothing(tmp_path, item, metadata, message):
    with pytest.raises(UserError, match=message):
        write_one(tmp_path / "set", item, metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_set_that_reads_back_wrong_is_not_kept(tmp_path):
    with pytest.raises(UserError, match=r"test\.tsv:2: corpus\.jsonl has no _id 'z'"):
        write_one(tmp_path / "set", Item("B", id="b"), {}, right="z")
    assert list(tmp_path.iterdir()) == []


def test_a_set_is_replaced_only_on_demand_and_only_if_it_is_one(tmp_path):
    def write(overwrite):
        with RetrievalSetWriter(tmp_path / "set", "x", overwrite=overwrite) as writer:
            writer.add_candidate(Item("A", id="a"))
            writer.add_query(Item("Q", id="q"))
            writer.judge("q", "a")

    write(overwrite=False)
    with pytest.raises(UserError, match="exists already"):
        write(overwrite=False)
    write(overwrite=True)
    (tmp_path / "set" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"has no manifest\.json: not a retrieval set"):
        write(overwrite=True)
