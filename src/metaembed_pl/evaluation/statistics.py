"""Confidence intervals of means over queries, and tests of differences.

A benchmark's queries are a sample. The interval covers the means of other samples of that size. The
comparison is paired: it tests the differences between two models on the *same* queries, which is
far more precise than comparing two intervals.

T: tasks    Q: queries of a task    B: resamples
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from metaembed_pl.errors import UserError

Values = Sequence[float] | np.ndarray
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean over tasks of means over queries, with its confidence interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Two evaluations on the same queries.

    Args:
        first: mean of the first.
        second: mean of the second.
        difference: second minus first, with its interval.
        p_value: how often a difference at least as large occurs if the two values of each query
            are swapped at random (paired randomisation test).
        num_better: queries on which the second is better.
        num_worse: queries on which it is worse.
        num_queries: number of queries.
    """

    first: float
    second: float
    difference: Interval
    p_value: float
    num_better: int
    num_worse: int
    num_queries: int

    @property
    def is_significant(self) -> bool:
        """Whether the difference is unlikely to be due to chance."""
        return self.p_value < 1 - CONFIDENCE

    def verdict(self) -> str:
        """The comparison in words."""
        if not self.is_significant:
            return "no significant difference"
        return "the second is better" if self.difference.mean > 0 else "the second is worse"


def interval(tasks: Sequence[Values], seed: int = 0) -> Interval:
    """The mean over tasks, each the mean over its queries, with its bootstrap interval.

    Queries are resampled within their task, since the tasks of a benchmark are fixed.

    Args:
        tasks: for each task the values of its queries.
        seed: for resampling.

    >>> interval([[0.0, 1.0], [1.0, 1.0]]).mean
    0.75
    """
    return interval_of(
        [float(np.mean(values)) for values in tasks],
        [resampled_means(values, seed + i) for i, values in enumerate(tasks)],
    )


def interval_of(means: Sequence[float], resampled: Sequence[np.ndarray]) -> Interval:
    """As `interval`, from each task's mean and its `resampled_means`."""
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(np.mean(resampled, axis=0), [tail, 100 - tail])
    return Interval(float(np.mean(means)), float(low), float(high))


def resampled_means(values: Values, seed: int) -> np.ndarray:
    """B means over as many queries, drawn with replacement."""
    values, rng = np.asarray(values, dtype=float), np.random.default_rng(seed)
    # A hundred at a time, to limit the memory for large tasks.
    parts = [
        values[rng.integers(0, len(values), (100, len(values)))].mean(axis=1)
        for _ in range(RESAMPLES // 100)
    ]
    return np.concatenate(parts)


def compare(first: Mapping[str, Values], second: Mapping[str, Values], seed: int = 0) -> Comparison:
    """Compare two evaluations, query by query.

    Args:
        first: the values of the queries of each task.
        second: the same queries, in the same order.
        seed: of the resampling.

    Raises:
        UserError: they have different tasks or numbers of queries.

    >>> better = compare({"x": [0.0] * 20}, {"x": [1.0] * 20})
    >>> better.difference.mean, better.verdict()
    (1.0, 'the second is better')
    """
    _check(first, second)
    rows = [
        np.asarray(second[task], dtype=float) - np.asarray(first[task], dtype=float)
        for task in first
    ]
    difference = interval(rows, seed)
    by_chance = np.abs(_randomised_means(rows, np.random.default_rng(seed)))
    # The observed assignment is one of the possible ones: p is never 0.
    as_large = int((by_chance >= abs(difference.mean) - 1e-12).sum())
    every = np.concatenate(rows)
    means = [float(np.mean([np.mean(side[task]) for task in first])) for side in (first, second)]
    return Comparison(
        means[0],
        means[1],
        difference,
        (1 + as_large) / (1 + RESAMPLES),
        int((every > 0).sum()),
        int((every < 0).sum()),
        len(every),
    )


def _randomised_means(rows: Sequence[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """B means over tasks, with a random sign for each query's difference."""
    total = np.zeros(RESAMPLES)
    for values in rows:
        for start in range(0, RESAMPLES, 100):
            signs = rng.integers(0, 2, (100, len(values))) * 2 - 1
            total[start : start + 100] += (signs * values).mean(axis=1)
    return total / len(rows)


def _check(first: Mapping[str, Values], second: Mapping[str, Values]) -> None:
    if not first or set(first) != set(second):
        raise UserError(
            f"the two evaluations have different tasks: {', '.join(sorted(first)) or 'none'} and "
            f"{', '.join(sorted(second)) or 'none'}; compare two of the same benchmark"
        )
    for task in first:
        if len(first[task]) != len(second[task]):
            raise UserError(
                f"{task}: {len(first[task])} queries in the first evaluation and "
                f"{len(second[task])} in the second; compare two on the same queries"
            )
