"""What a survey counts, against shards whose pairs are known."""

import io

import pytest

import tiny
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.data.survey import Survey, shared
from metaembed_pl.item import Item, Pair


def encoded(seed, size=(56, 56), format="PNG"):
    buffer = io.BytesIO()
    tiny.picture(seed, size).save(buffer, format)
    return buffer.getvalue()


def write(folder, pairs):
    with ShardWriter(folder, folder.name, licence="CC0-1.0", pairs_per_shard=3) as writer:
        for pair in pairs:
            writer.write(pair)
    return ShardedPairs(folder)


PAIRS = [
    Pair("1", Item("a"), Item(image=encoded(0)), (Item("wrong"), Item("bad"))),
    Pair("2", Item("abc"), Item(image=encoded(1, (10, 40), "JPEG"))),
    Pair("3", Item("abc"), Item("x" * 99, image=encoded(0)), (Item("bad", id="7"),)),
    Pair("3", Item("a"), Item(image=encoded(0), id="same"), (Item(image=encoded(0)),)),
    Pair("4", Item("q"), Item(image=encoded(2)[:300])),
]


@pytest.fixture(scope="module")
def survey(tmp_path_factory):
    return Survey(write(tmp_path_factory.mktemp("s") / "train", PAIRS), decode=True)


def test_counts_pairs_negatives_and_what_cannot_be_used(survey):
    found = survey.summary()
    assert (found["name"], found["licence"]) == ("train", "CC0-1.0")
    assert (found["num_pairs"], found["num_shards"], found["num_bad"]) == (5, 2, 1)
    assert found["num_negatives"] == {"0": 1, "1": 2, "2": 1}
    assert "00001.tar/00000004: the image does not decode" in found["bad"][0]


def test_counts_questions_to_a_candidate_and_ids_that_stand_for_two(tmp_path):
    named = [Item(text, id=id) for text, id in (("x", "1"), ("y", "1"), ("z", "2"), ("z", "2"))]
    pairs = [Pair(str(n), Item(f"q{n}"), item) for n, item in enumerate((*named, *named[2:]))]
    found = Survey(write(tmp_path / "s", pairs)).summary()
    assert found["num_candidates"] == 2
    assert (found["questions"]["min"], found["questions"]["max"]) == (2, 4)
    assert found["differing_candidates"] == {"count": 1, "pairs": [["0", "1"]]}


def test_describes_texts_and_pictures(survey):
    found = survey.summary()
    assert found["queries"]["items"] == {"text": 4}
    assert found["queries"]["text_characters"]["min"] == 1
    assert found["queries"]["text_characters"]["max"] == 3
    assert found["queries"]["picture_width"] is None
    candidates = found["candidates"]
    assert candidates["items"] == {"image": 4, "text": 3, "text and image": 1}
    assert (candidates["picture_width"]["min"], candidates["picture_height"]["min"]) == (10, 40)
    assert candidates["text_characters"]["max"] == 99
    assert candidates["picture_formats"] == {"PNG": 4, "JPEG": 1}


def test_counts_what_comes_twice(survey):
    assert survey.summary()["repeated"] == {
        "ids": 1,
        "queries": 2,
        "pairs": 1,
        "own_positive_as_negative": 1,
    }


def test_finds_what_train_and_test_share(survey, tmp_path):
    test = write(
        tmp_path / "test",
        [
            Pair("t1", Item(image=encoded(1, (10, 40), "JPEG")), Item("abc")),
            Pair("t2", Item("bad"), Item(image=encoded(9)), (Item("a"), Item(image=encoded(0)))),
        ],
    )
    alone = write(tmp_path / "alone", [Pair("u", Item("other"), Item("else"))])
    [leak] = shared([survey, Survey(test), Survey(alone)])
    assert leak["folders"] == [str(survey.pairs.folder), str(test.folder)]
    assert (leak["num_texts"], leak["num_pictures"], leak["num_pairs"]) == (1, 0, 0)
    assert leak["num_negatives_asked"] == [1, 1]  # "bad" here, "a" there; pictures are not compared
    assert leak["examples"] == {"text": ["2", "3"]}
    [leak] = shared([Survey(survey.pairs), Survey(test)])  # files, not pixels, on both sides
    assert (leak["num_texts"], leak["num_pictures"]) == (1, 1)
    assert leak["num_negatives_asked"] == [1, 2]


def test_equal_pixels_in_different_files_are_found_by_decoding(tmp_path):
    one = write(tmp_path / "one", [Pair("1", Item("a"), Item(image=encoded(0)))])
    other = write(tmp_path / "other", [Pair("2", Item("b"), Item(image=encoded(0, format="WEBP")))])
    lossless = io.BytesIO()
    tiny.picture(0).save(lossless, "WEBP", lossless=True)
    same = write(tmp_path / "same", [Pair("3", Item("c"), Item(image=lossless.getvalue()))])
    assert not shared([Survey(one), Survey(same)])
    [leak] = shared([Survey(pairs, decode=True) for pairs in (one, other, same)])
    assert leak["folders"] == [str(one.folder), str(same.folder)]
    assert leak["num_pictures"] == 1
