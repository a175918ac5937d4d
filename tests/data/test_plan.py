from collections import Counter

import numpy as np
import pytest

from metaembed_pl.data.plan import Plan, PlannedSource
from metaembed_pl.errors import UserError

SOURCES = [
    PlannedSource("a", (10, 10, 7), weight=1),
    PlannedSource("b", (40, 13), weight=3),
]


def drawn(plan: Plan, steps: range) -> list[tuple[int, int]]:
    return [(b.source, int(i)) for step in steps for b in [plan.batch(step)] for i in b.positions]


def test_each_pair_comes_once_a_pass():
    plan = Plan([PlannedSource("a", (10, 10, 10))], global_batch_size=6)
    for turn in range(3):
        counts = Counter(drawn(plan, range(5 * turn, 5 * turn + 5)))
        assert counts == {(0, i): 1 for i in range(30)}


def test_a_pass_that_ends_within_a_batch_loses_no_pair():
    plan = Plan([PlannedSource("a", (10, 7))], global_batch_size=4)
    pairs = drawn(plan, range(17))  # 68 = four passes of 17
    for turn in range(4):
        assert len(set(pairs[17 * turn : 17 * turn + 17])) == 17


def test_passes_differ_in_order():
    plan = Plan([PlannedSource("a", (30,))], global_batch_size=30)
    assert drawn(plan, range(1)) != drawn(plan, range(1, 2))


def test_batches_are_of_one_source_and_follow_the_weights():
    plan = Plan(SOURCES, global_batch_size=8)
    turns = Counter(plan.batch(step).source for step in range(400))
    assert turns == {0: 100, 1: 300}


def test_no_source_waits_longer_than_its_share():
    plan = Plan(SOURCES, global_batch_size=8)
    order = [plan.batch(step).source for step in range(100)]
    for end in range(1, 101):
        assert abs(order[:end].count(0) - end / 4) <= 1


def test_a_source_joins_at_its_first_step():
    sources = [PlannedSource("a", (40,), 1), PlannedSource("b", (40,), 3, first_step=10)]
    order = [Plan(sources, 8).batch(step).source for step in range(50)]
    assert order[:10] == [0] * 10
    assert Counter(order[10:]) == {0: 10, 1: 30}


def test_a_source_leaves_at_its_last_step():
    sources = [
        PlannedSource("a", (40,), 1),
        PlannedSource("b", (40,), 2, first_step=5, last_step=9),
        PlannedSource("c", (40,), 3, first_step=9),
    ]
    order = [Plan(sources, 8).batch(step).source for step in range(49)]
    assert order[:5] == [0] * 5
    assert set(order[5:9]) == {0, 1}
    assert Counter(order[9:]) == {0: 10, 2: 30}


def test_without_weights_sources_share_by_size():
    sources = [PlannedSource("a", (30,)), PlannedSource("b", (90,))]
    plan = Plan(sources, global_batch_size=10)
    assert plan.steps_per_epoch == 12
    assert Counter(drawn(plan, range(12))) == (
        {(0, i): 1 for i in range(30)} | {(1, i): 1 for i in range(90)}
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_ranks_together_hold_the_same_global_batch(num_ranks):
    plan = Plan(SOURCES, global_batch_size=8)
    for step in (0, 5, 77):
        parts = [plan.rank_batch(step, rank, num_ranks) for rank in range(num_ranks)]
        found = np.concatenate([part.positions for part in parts])
        assert sorted(found) == sorted(plan.batch(step).positions)
        assert {len(part.positions) for part in parts} == {8 // num_ranks}


def test_ranks_get_about_as_much_to_do():
    plan = Plan([PlannedSource("a", (200,))], global_batch_size=64)
    costs = np.random.default_rng(0).lognormal(sigma=0.8, size=200)

    def costs_of(batch):
        return costs[batch.positions]

    for step in range(3):
        whole = plan.batch(step)
        parts = [plan.rank_batch(step, rank, 8, costs_of) for rank in range(8)]
        assert sorted(np.concatenate([p.positions for p in parts])) == sorted(whole.positions)
        assert all(part.candidates.tolist() == list(range(8)) for part in parts)
        loads = [costs_of(part).sum() for part in parts]
        in_turn = costs_of(whole).reshape(8, 8).sum(axis=1)
        mean, dearest = costs_of(whole).sum() / 8, costs_of(whole).max()
        assert max(loads) <= max(1.1 * mean, dearest + 1)
        assert max(loads) < in_turn.max()


def test_any_step_can_be_asked_for_first():
    in_order, jumped = Plan(SOURCES, 8), Plan(SOURCES, 8)
    steps = range(2000)
    expected = {step: in_order.batch(step) for step in steps}
    for step in (1999, 3, 1024, 0):
        found = jumped.batch(step)
        assert found.source == expected[step].source
        assert np.array_equal(found.positions, expected[step].positions)


def test_the_seed_decides():
    assert drawn(Plan(SOURCES, 8, seed=1), range(9)) == drawn(Plan(SOURCES, 8, seed=1), range(9))
    assert drawn(Plan(SOURCES, 8, seed=1), range(9)) != drawn(Plan(SOURCES, 8, seed=2), range(9))


def test_pairs_stay_within_the_open_shards():
    plan = Plan([PlannedSource("a", (10,) * 20)], global_batch_size=10, open_shards=3)
    for first in range(0, 18, 3):
        shards = {i // 10 for _, i in drawn(plan, range(first, first + 3))}
        assert len(shards) == 3


def test_a_capped_source_is_a_fixed_sample_of_all_its_shards():
    capped = PlannedSource("a", (100, 100, 100), max_pairs=30)
    plan = Plan([capped, PlannedSource("b", (30,))], global_batch_size=10)
    assert plan.steps_per_epoch == 6
    turns = drawn(plan, range(60))
    counts = Counter(i for source, i in turns if source == 0)
    assert len(counts) == 30
    assert set(counts.values()) == {10}
    assert {i // 100 for i in counts} == {0, 1, 2}
    other = Plan([capped], 10, seed=1)
    assert set(counts) != {i for _, i in drawn(other, range(3))}


def test_a_cap_above_its_size_changes_nothing():
    plain, capped = PlannedSource("a", (30, 9)), PlannedSource("a", (30, 9), max_pairs=40)
    assert drawn(Plan([plain], 8), range(20)) == drawn(Plan([capped], 8), range(20))


@pytest.mark.parametrize(("temperature", "share"), [(1, 9), (2, 3), (float("inf"), 1)])
def test_the_mixing_temperature_flattens_the_shares(temperature, share):
    sources = [PlannedSource("small", (1000,)), PlannedSource("large", (9000,))]
    plan = Plan(sources, 8, mixing_temperature=temperature)
    turns = Counter(plan.batch(step).source for step in range(360))
    assert turns[1] / turns[0] == pytest.approx(share)


def test_the_mixing_temperature_sees_sizes_after_the_caps():
    sources = [PlannedSource("a", (1000,)), PlannedSource("b", (9000,), max_pairs=4000)]
    plan = Plan(sources, 8, mixing_temperature=2)
    turns = Counter(plan.batch(step).source for step in range(300))
    assert turns == {0: 100, 1: 200}


@pytest.mark.parametrize("temperature", [0.5, float("nan")])
def test_refuses_a_mixing_temperature_below_1(temperature):
    with pytest.raises(UserError, match=f"at least 1 .* got {temperature}"):
        Plan([PlannedSource("a", (9,))], 8, mixing_temperature=temperature)


def test_refuses_weights_beside_a_mixing_temperature():
    with pytest.raises(UserError, match="mixing_temperature 2 computes weights from sizes"):
        Plan(SOURCES, 8, mixing_temperature=2)


@pytest.mark.parametrize(
    ("sources", "batch", "message"),
    [
        ([], 8, "at least one training source"),
        ([PlannedSource("a", (5,))], 8, "a has 5 pairs, fewer than one global batch of 8"),
        ([PlannedSource("a", (9,)), PlannedSource("a", (9,))], 8, "names must differ"),
        ([PlannedSource("a", (9,), 1.0), PlannedSource("b", (9,))], 8, "to every .* or to none"),
        ([PlannedSource("a", (9,), -1.0)], 8, "positive, got -1"),
        ([PlannedSource("a", (9,), first_step=1)], 8, "no training source is active at step 0"),
        ([PlannedSource("a", (9,), last_step=7)], 8, "no training source is active at step 7"),
        (
            [PlannedSource("a", (9,), 1, last_step=7), PlannedSource("b", (9,), 1, first_step=8)],
            8,
            "no training source is active at step 7",
        ),
        ([PlannedSource("a", (9,), first_step=3, last_step=3)], 8, "3 must come after first_step"),
        ([PlannedSource("a", (9,))], 1, "at least 2, got 1"),
        ([PlannedSource("a", (9,), max_pairs=7)], 8, "a has 7 pairs, fewer than one global"),
        ([PlannedSource("a", (9,), max_pairs=0)], 8, "a: max_pairs must be at least 1"),
    ],
)
def test_refuses(sources, batch, message):
    with pytest.raises(UserError, match=message):
        Plan(sources, batch)


def test_refuses_an_uneven_division():
    with pytest.raises(UserError, match="8 cannot be divided evenly over 3 ranks"):
        Plan(SOURCES, 8).rank_batch(0, 0, 3)


# Candidates of a source with 2 + 5 + 1 + 4 questions, of which the second's lie in two shards.
ASKED = np.array([0, 0, 1, 1, 1, 2, 1, 1, 3, 3, 3, 3])


def asked(questions: int | None, **settings) -> Plan:
    source = PlannedSource("a", (5, 7), candidates=ASKED, questions=questions)
    return Plan([source], global_batch_size=2, **settings)


@pytest.mark.parametrize(("questions", "turns"), [(1, 12), (2, 7), (3, 6), (9, 4), (None, 4)])
def test_each_question_comes_once_a_pass_with_its_candidate(questions, turns):
    plan = asked(questions)
    assert plan.steps_per_epoch == -(-turns // 2)
    found = [part for step in range(turns) for part in plan.batch(step).questions]  # two passes
    for turn in (found[:turns], found[turns:]):
        assert Counter(np.concatenate(turn).tolist()) == dict.fromkeys(range(12), 1)
        assert all(len(set(ASKED[part])) == 1 for part in turn)
        assert max(map(len, turn)) <= (questions or 12)


def test_a_candidate_with_too_many_questions_shares_them_out_evenly():
    plan = asked(3)
    found = [part for step in range(3) for part in plan.batch(step).questions]
    sizes = sorted((int(ASKED[part[0]]), len(part)) for part in found)
    assert sizes == [(0, 2), (1, 2), (1, 3), (2, 1), (3, 2), (3, 2)]


def test_questions_to_a_candidate_come_in_another_order_each_pass():
    plan = asked(3)
    passes = [
        sorted(tuple(sorted(part)) for step in steps for part in plan.batch(step).questions)
        for steps in (range(3), range(3, 6), range(6, 9), range(9, 12))
    ]
    assert any(other != passes[0] for other in passes[1:])


def test_the_turns_of_a_candidate_are_spread_over_the_pass():
    candidates = np.repeat(np.arange(100), 6)
    source = PlannedSource("a", (600,), candidates=candidates, questions=2)
    plan = Plan([source], global_batch_size=10)
    batches = [candidates[plan.batch(step).positions[::2]] for step in range(30)]
    twice = sum(len(set(batch.tolist())) < 10 for batch in batches)
    assert twice <= 6, "at random, one would be twice in a batch in every third"
    thirds = [set(np.concatenate(batches[i : i + 10]).tolist()) for i in (0, 10, 20)]
    assert all(len(third) > 90 for third in thirds)


def test_ranks_get_equally_many_candidates_with_all_their_questions():
    source = PlannedSource("a", (5, 7), candidates=ASKED, questions=None)
    plan = Plan([source], global_batch_size=4)
    for step in range(5):
        whole = plan.batch(step)
        parts = [plan.rank_batch(step, rank, 2) for rank in range(2)]
        together = [list(asked) for part in parts for asked in part.questions]
        assert sorted(together) == sorted(list(asked) for asked in whole.questions)
        assert [len(part.questions) for part in parts] == [2, 2]
        assert [part.candidates[0] for part in parts] == [0, 0]


def test_a_cap_draws_candidates_with_their_questions():
    candidates = np.repeat(np.arange(50), 4)
    plan = Plan(
        [PlannedSource("a", (200,), max_pairs=40, candidates=candidates, questions=None)], 10
    )
    (found,) = {tuple(sorted(plan.batch(step).positions)) for step in range(5)}
    assert len(found) == 40
    assert len(set(candidates[list(found)])) == 10


def test_one_question_each_gives_the_batches_of_pairs():
    plain = PlannedSource("a", (30, 9))
    numbered = PlannedSource("a", (30, 9), candidates=np.arange(39), questions=1)
    assert drawn(Plan([plain], 8), range(20)) == drawn(Plan([numbered], 8), range(20))


@pytest.mark.parametrize("questions", [0, -3])
def test_refuses_questions_below_1(questions):
    with pytest.raises(UserError, match=f"source a: questions must be at least 1.*{questions}"):
        asked(questions)


def test_names_candidates_where_they_are_fewer_than_a_batch():
    source = PlannedSource("a", (5, 7), candidates=ASKED, questions=None)
    with pytest.raises(UserError, match=r"a has 12 pairs of 4 candidates \(questions: all\), few"):
        Plan([source], global_batch_size=5)
