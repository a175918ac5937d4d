"""PDFs: what the author says of the pages is what is asked, and the right page is the right one."""

import json

import pytest

from metaembed_pl.data.beir import read_retrieval_set
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.data_prep import pdf as script
from metaembed_pl.data_prep._pdf import parse_entry, read_document
from metaembed_pl.item import read_items
from tiny_pdf import make_pdf

BIRDS = [f"bird{number:02d}" for number in range(1, 31)]


def bird_book(shift=2):
    """Two pages of front matter, 30 pages of birds numbered from 1, two pages of index.

    Each bird is on its own page; "feather" is on pages 3, 7 and 8; "wing" on all pages' text, but
    the index names page 5 alone.
    """
    front = [
        ["The Book of Birds"],
        ["Contents", *(f"{b} . . . . {n}" for n, b in enumerate(BIRDS, 1))],
    ]
    pages = [
        [f"On birds {number}", f"A page about {bird} and its wing.", "It sings in the morning."]
        for number, bird in enumerate(BIRDS, start=1)
    ]
    entries = [f"{bird}, {number}" for number, bird in enumerate(BIRDS, start=1)]
    entries += ["feather, 3, 7-8", "wing . . . . . . . . 5", "the year 2019"]
    index = [["Index 31", *entries[:17]], [*entries[17:], "32 Index"]]
    outline = [
        ("Contents", 1),
        ("1 Small birds", shift),
        ("2 Large birds", shift + 15),
        ("Index", 32),
    ]
    return make_pdf([*front, *pages, *index], outline)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    root = tmp_path_factory.mktemp("pdf")
    (root / "books").mkdir()
    (root / "books" / "birds.pdf").write_bytes(bird_book())
    (root / "books" / "copy of birds.pdf").write_bytes(bird_book())
    assert run(root / "books", root / "out", "--held-out", "0.2") == 0
    return root / "out"


def run(where, out, *options):
    arguments = ["--from", str(where), "--out", str(out), "--num-workers", "0", "--side", "200"]
    return script.main([*arguments, *options])


def records(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_index_terms_lead_to_the_pages_with_their_printed_numbers(tmp_path):
    (tmp_path / "birds.pdf").write_bytes(bird_book())
    book = read_document(tmp_path / "birds.pdf")
    assert book.listings == {1, 32, 33}
    assert book.terms == {
        **{bird: [number + 1] for number, bird in enumerate(BIRDS, start=1)},
        "feather": [4, 8, 9],
        "wing": [6],
    }
    for bird in BIRDS:
        assert bird in book.texts[book.terms[bird][0]]
    assert book.titles == {"Small birds": [2], "Large birds": [17]}
    assert book.section(20) == range(17, 32)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("axes, tics, 12, 14\u201316", ("axes, tics", (12, 14, 15, 16))),
        ("closure . . . . . . . . 5", ("closure", (5,))),
        ("plot 7", ("plot", (7,))),
        ("gnuplot 5.4", None),
        ("since 2019", None),
        ("12", None),
        ("page 0", None),
        ("everywhere, " + ", ".join(map(str, range(1, 20))), None),
        ("backwards, 9-7", ("backwards", (9,))),
    ],
)
def test_a_line_of_an_index_is_a_term_and_pages_that_are_there(line, expected):
    entry = parse_entry(line, 300)
    assert (entry and (entry.term, entry.numbers)) == expected


def test_every_page_but_contents_and_index_is_drawn_and_searched(made):
    items = read_items(made / "items.jsonl")
    assert [item.id for item in items] == [f"birds/{n:04d}.png" for n in (1, *range(3, 33))]
    assert read_items(made / "pages")[0].id == "birds/0001.png"
    assert max(items[0].load_image().size) == 200
    assert all(item.text is None for item in items)


def test_queries_are_held_out_with_all_their_pages_and_answers_are_known(made):
    pairs = {split: list(ShardedPairs(made / split)) for split in ("train", "test")}
    asked = {split: {pair.asks for pair in some} for split, some in pairs.items()}
    assert asked["train"].isdisjoint(asked["test"])
    assert asked["train"] | asked["test"] == {
        *BIRDS,
        "feather",
        "wing",
        "small birds",
        "large birds",
    }
    assert len(asked["test"]) > 2
    every = [pair for some in pairs.values() for pair in some]
    feathers = {pair.positive.id for pair in every if pair.asks == "feather"}
    assert feathers == {"birds/0005.png", "birds/0009.png", "birds/0010.png"}
    for pair in every:
        assert pair.asks in pair.positive.answers
        for negative in pair.negatives:
            assert pair.asks not in negative.answers


def test_hard_negatives_are_near_and_lack_the_querys_words(made):
    for split in ("train", "test"):
        for pair in ShardedPairs(made / split):
            if pair.asks == "wing":  # stands on all pages: whatever the index says, they may answer
                near = {item.id for item in pair.negatives}
                assert near <= {"birds/0001.png"}
            else:
                assert len(pair.negatives) == 2
                own = int(pair.positive.id[-8:-4])
                assert min(abs(int(item.id[-8:-4]) - own) for item in pair.negatives) <= 2


def test_the_retrieval_set_asks_the_held_out_queries_of_all_pages(made):
    found = read_retrieval_set(made / "retrieval")
    asked = {pair.asks for pair in ShardedPairs(made / "test")}
    assert {query.id for query in found.queries} == asked
    assert len(found.candidates) == 31
    lines = records(made / "retrieval" / "corpus.jsonl")
    assert "A page about bird01" in lines[1]["text_layer"]
    assert "text" not in lines[1]
    kinds = {query["kind"] for query in records(made / "retrieval" / "queries.jsonl")}
    assert kinds <= {"title", "term"}


def test_a_limit_is_for_the_retrieval_set_too(made, tmp_path):
    assert run(made.parent / "books", tmp_path, "--held-out", "0.2", "--limit", "2") == 0
    first = [query.id for query in read_retrieval_set(made / "retrieval").queries[:2]]
    assert [query.id for query in read_retrieval_set(tmp_path / "retrieval").queries] == first


def test_what_is_made_is_kept_and_lost_pages_are_drawn_again(made, capsys):
    page = made / "pages" / "birds" / "0003.png"
    before = page.read_bytes()
    page.unlink()
    assert run(made.parent / "books", made, "--held-out", "0.2") == 0
    printed = capsys.readouterr()
    assert printed.out.count("kept") == 3
    assert "copy of birds.pdf is a copy of birds.pdf: read once" in printed.err
    assert page.read_bytes() == before
    assert run(made.parent / "books", made, "--held-out", "0.2", "--side", "100") == 2
    assert "contains other pages: choose another --out, or use --force" in capsys.readouterr().err


def test_words_of_a_page_that_are_its_own_go_with_its_picture(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "birds.pdf").write_bytes(bird_book())
    assert run(tmp_path / "books", tmp_path / "out", "--words", "2") == 0
    texts = {item.id: item.text for item in read_items(tmp_path / "out" / "items.jsonl")}
    assert texts["birds/0003.png"].split()[-1] == "bird01"
    (pair,) = (p for p in ShardedPairs(tmp_path / "out" / "train") if p.asks == "bird02")
    assert "bird02" in pair.positive.text


def test_a_pdf_that_does_not_open_is_left_out_and_said(tmp_path, capsys):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "birds.pdf").write_bytes(bird_book())
    (tmp_path / "books" / "broken.pdf").write_bytes(bird_book()[:300])
    (tmp_path / "books" / "not.pdf").write_bytes(b"<html>")
    assert run(tmp_path / "books", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "dropped broken: PDF cannot be opened: broken.pdf (" in error
    assert "2 pages and PDFs cannot be used, more than --max-dropped 0.01 (PDF cannot be" in error
    assert run(tmp_path / "books", tmp_path / "out", "--max-dropped", "0.1") == 0
    assert len(read_items(tmp_path / "out" / "items.jsonl")) == 31


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({}, (), "holds no PDFs"),
        ({"a.pdf": b"<html>"}, (), "none of 1 PDFs can be read (PDF cannot be opened: 1)"),
        (
            {"a.pdf": make_pdf([["no outline"], ["no index"]])},
            (),
            "1 PDFs have neither an outline nor an index: there are no queries.",
        ),
        ({"a.pdf": bird_book()}, ("--side", "9"), "--side must be 64 to 8192 pixels, not 9"),
    ],
)
def test_a_folder_that_will_not_do_is_said_in_one_line(tmp_path, capsys, files, options, message):
    (tmp_path / "books").mkdir()
    for name, content in files.items():
        (tmp_path / "books" / name).write_bytes(content)
    assert run(tmp_path / "books", tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
