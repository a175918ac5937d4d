"""Intervals and comparisons say no more than the queries do."""

import numpy as np
import pytest
from scipy import stats

from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.statistics import CONFIDENCE, compare, interval


def values(mean, count, seed):
    return (np.random.default_rng(seed).random(count) < mean).astype(float)


def test_an_interval_is_that_of_scipy_for_one_task():
    sample = np.random.default_rng(1).random(300) ** 2
    ours = interval([sample])
    theirs = stats.bootstrap((sample,), np.mean, method="percentile", rng=0).confidence_interval
    assert ours.mean == pytest.approx(sample.mean())
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)


def test_tasks_count_alike_whatever_their_size():
    assert interval([[1.0], [0.0] * 99]).mean == 0.5


def test_nineteen_of_twenty_intervals_hold_the_truth():
    samples = [np.random.default_rng(seed).random(100) ** 2 for seed in range(400)]
    found = [interval([sample], 5000 + seed) for seed, sample in enumerate(samples)]
    share = np.mean([one.low <= 1 / 3 <= one.high for one in found])
    assert share == pytest.approx(CONFIDENCE, abs=0.03)


def test_the_p_value_is_that_of_scipys_permutation_test():
    first = np.random.default_rng(2).random(60)
    second = first + np.random.default_rng(3).normal(0.04, 0.2, 60)
    theirs = stats.permutation_test(
        (second, first), lambda a, b: np.mean(a - b), permutation_type="samples", rng=0
    )
    assert compare({"x": first}, {"x": second}).p_value == pytest.approx(theirs.pvalue, abs=0.02)


def test_equal_models_differ_by_chance_as_often_as_promised():
    seen = [
        compare({"x": values(0.6, 80, 2 * seed)}, {"x": values(0.6, 80, 2 * seed + 1)}, seed)
        for seed in range(200)
    ]
    assert np.mean([found.is_significant for found in seen]) < 0.09


def test_a_small_gain_on_every_query_is_found_where_intervals_overlap():
    first = np.random.default_rng(4).random(200)
    found = compare({"x": first}, {"x": first + 0.003})
    assert found.is_significant
    assert found.difference.low == pytest.approx(0.003)
    assert interval([first]).high > interval([first + 0.003]).low


def test_a_comparison_tells_means_counts_and_direction():
    first, second = {"x": [1.0] * 30, "y": [1.0, 1.0]}, {"x": [0.0] * 30, "y": [1.0, 1.0]}
    found = compare(first, second)
    assert (found.first, found.second) == (1.0, 0.5)
    assert (found.num_better, found.num_worse, found.num_queries) == (0, 30, 32)
    assert found.verdict() == "the second is worse"
    assert compare(first, first).verdict().startswith("no significant difference")
    assert compare(first, first).p_value == 1


def test_refuses_evaluations_of_something_else():
    with pytest.raises(UserError, match="different tasks: x and y"):
        compare({"x": [1.0]}, {"y": [1.0]})
    with pytest.raises(UserError, match="x: 2 queries in the first evaluation and 1 in the second"):
        compare({"x": [1.0, 1.0]}, {"x": [1.0]})
