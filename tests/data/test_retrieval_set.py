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


def lettered(lists=None):
    candidates = [Item(letter) for letter in "abcdef"]
    gains = [[2.0, 1.0], [1.0], [3.0]]
    return RetrievalSet(
        "x", [Item(q) for q in "pqr"], candidates, [[1, 5], [0], [4]], gains, lists, 7
    )


def texts(items):
    return "".join(item.text for item in items)


def test_a_subset_keeps_what_its_queries_need_and_the_first_others():
    small = lettered().subset(2, 4)
    assert (texts(small.queries), texts(small.candidates)) == ("pq", "abcf")
    assert (small.relevant, small.gains) == ([[1, 3], [0]], [[2.0, 1.0], [1.0]])
    assert texts(lettered().subset(1, 1).candidates) == "bf"
    assert lettered().subset(9, 9) == lettered().subset() == lettered()


def test_a_subset_of_lists_shortens_each_and_drops_candidates_nobody_searches():
    small = lettered(lists=[[5, 3, 1], [0, 1, 2], [4, 3]]).subset(2, 2)
    assert texts(small.candidates) == "abf"
    assert [texts(small.candidates[i] for i in small.searched(q)) for q in (0, 1)] == ["fb", "ab"]
    assert [small.gains_of(q) for q in (0, 1)] == [{1: 2.0, 2: 1.0}, {0: 1.0}]


def test_every_right_one_of_an_ungraded_set_gains_one():
    plain = RetrievalSet("x", [Item("q")], [Item("a"), Item("b")], [[0, 1]])
    assert plain.gains_of(0) == {0: 1.0, 1: 1.0}
    assert list(plain.searched(0)) == [0, 1]
