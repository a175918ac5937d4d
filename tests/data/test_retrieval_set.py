"""Which candidates stand in the pool, and which of them are right."""

import pytest

from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item, Pair


def scene(id, *things):
    return Item(text=id, id=id, answers=things)


def test_a_scene_shared_by_queries_stands_in_the_pool_once():
    one, two = scene("one", "cat", "dog"), scene("two", "dog", "owl")
    pairs = [
        Pair("1", Item("cat"), one, asks="cat"),
        Pair("2", Item("dog"), one, asks="dog"),
        Pair("3", Item("owl"), two, asks="owl"),
    ]
    pool = RetrievalSet.from_pairs("scenes", pairs)
    assert [candidate.id for candidate in pool.candidates] == ["one", "two"]
    assert pool.relevant == [[0], [0, 1], [1]]


def test_equal_candidates_without_ids_are_one():
    pairs = [Pair(str(i), Item(f"q{i}"), Item("same")) for i in range(2)]
    pool = RetrievalSet.from_pairs("same", pairs)
    assert len(pool.candidates) == 1
    assert pool.relevant == [[0], [0]]


def test_hard_negatives_stay_out_of_the_pool():
    pair = Pair("1", Item("q"), Item("right"), (Item("wrong"),))
    assert RetrievalSet.from_pairs("x", [pair]).candidates == [Item("right")]


def test_max_queries_takes_the_first_pairs():
    pairs = (Pair(str(i), Item(f"q{i}"), Item(f"c{i}")) for i in range(9))
    pool = RetrievalSet.from_pairs("x", pairs, max_queries=2)
    assert [query.text for query in pool.queries] == ["q0", "q1"]
    assert len(pool.candidates) == 2


def test_refuses_no_pairs_and_a_positive_that_does_not_answer():
    with pytest.raises(UserError, match="pets: no pairs"):
        RetrievalSet.from_pairs("pets", [])
    with pytest.raises(UserError, match="asks 'dog', which its positive 'cat' does not answer"):
        RetrievalSet.from_pairs("pets", [Pair("1", Item("q"), Item("c", id="cat"), asks="dog")])
