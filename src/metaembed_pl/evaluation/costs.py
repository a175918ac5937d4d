"""The cost of a budget: bytes per candidate, time per query.

D: width
"""

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch

from metaembed_pl.budget import Budget
from metaembed_pl.late_interaction import maxsim

NUM_TIMED_CANDIDATES = 10_000
TIMED_POOL_BYTES = 2**29


class Cost(NamedTuple):
    """Bytes of a candidate in bf16, and the time to score a query against 10,000 candidates."""

    candidate_bytes: int
    scoring_s: float


def measure_costs(width: int, budgets: Sequence[Budget], num_repeats: int = 15) -> list[Cost]:
    """Measure budgets on random vectors, since the time does not depend on their values.

    If 10,000 candidates would not fit in half a GiB, fewer are timed and the time is scaled: MaxSim
    is linear in their number. The fastest of several runs counts, because other work on the machine
    can only add to the time.
    """
    largest = max(budget.r_c for budget in budgets)
    num_timed = min(NUM_TIMED_CANDIDATES, max(1, TIMED_POOL_BYTES // (4 * largest * width)))
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, max(budget.r_q for budget in budgets), width, generator=generator)
    pool = torch.randn(num_timed, largest, width, generator=generator)
    costs = []
    for r_q, r_c, narrow in budgets:
        # Contiguous, as in an index of this budget's vectors.
        queries, vectors = (
            side[:, :count, :narrow].contiguous() for side, count in ((query, r_q), (pool, r_c))
        )
        fastest_s = math.inf
        for _ in range(num_repeats):
            start = time.perf_counter()
            maxsim(queries, vectors)
            fastest_s = min(fastest_s, time.perf_counter() - start)
        costs.append(
            Cost(2 * r_c * (narrow or width), fastest_s * NUM_TIMED_CANDIDATES / num_timed)
        )
    return costs


def format_bytes(count: float) -> str:
    """Bytes with a unit.

    >>> [format_bytes(count) for count in (256, 2048, 2560, 3 * 2**20)]
    ['256 B', '2 KiB', '2.5 KiB', '3 MiB']
    """
    for unit in ("B", "KiB", "MiB"):
        if count < 1024 or unit == "MiB":
            break
        count /= 1024
    return f"{count:.1f}".removesuffix(".0") + f" {unit}"


def format_ms(time_ms: float) -> str:
    """A time with two significant digits.

    >>> [format_ms(time) for time in (0.314, 2.71, 31.4)]
    ['0.31 ms', '2.7 ms', '31 ms']
    """
    digits = 2 if time_ms < 1 else 1 if time_ms < 10 else 0
    return f"{time_ms:.{digits}f} ms"
