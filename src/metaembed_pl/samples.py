"""Samples: numbers evenly spread over a range, and quantiles of measurements."""

from array import array

import numpy as np

QUANTILES = {"min": 0.0, "5%": 0.05, "median": 0.5, "95%": 0.95, "max": 1.0}


def evenly_spread(length: int, at_most: int) -> list[int]:
    """Numbers below `length`, evenly spread from the first to the last, ascending.

    >>> evenly_spread(100, 3), evenly_spread(2, 3), evenly_spread(100, 1)
    ([0, 49, 99], [0, 1], [0])
    """
    count = min(length, at_most)
    return [i * (length - 1) // max(1, count - 1) for i in range(count)]


def quantiles(values: array) -> dict[str, float]:
    """Values at `QUANTILES`, without interpolation; empty without values.

    >>> quantiles(array("q", [3, 1, 2]))["median"]
    2
    """
    if not values:
        return {}
    found = np.quantile(np.array(values), list(QUANTILES.values()), method="nearest").tolist()
    return {name: round(value, 4) for name, value in zip(QUANTILES, found, strict=True)}
