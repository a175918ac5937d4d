"""MaxSim of stored candidates: planes are read in tiles that stay in the cache, in one pass.

A tile's vectors times all query vectors is one matrix product, and a maximum over its slots follows
while the products are still in the cache. With one vector a candidate nothing is left to maximise,
and the sum of a query's vectors does for all of them:

    sum_i max_j q_i . c_j  =  (sum_i q_i) . c     where there is a single c

So 16x1 costs what 1x1 costs, and ranks far better.

Q: queries    q: some of them    Rq: their vectors    D: width    N: rows that are scored
n: rows of a tile    S: slots of a plane    K: hits of a query
"""

import time
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from metaembed_pl.late_interaction import SCORES_AT_A_TIME
from metaembed_pl.retrieval.planes import Plane

CPU_TILE_BYTES = 2**20
"""Of the vectors, and of the products, that a tile has at a time: what a core's cache holds."""
GPU_TILE_BYTES = 2**28
"""Not measured."""


def scan(
    planes: Sequence[Plane],
    queries: Float[Tensor, "Q Rq D"],
    r_c: int,
    rows: Integer[Tensor, " N"],
    dtype: torch.dtype = torch.float32,
) -> Iterator[tuple[Integer[Tensor, " n"], Float[Tensor, "Q n"]]]:
    """Scores of rows, some at a time, so that memory stays bounded.

    Args:
        planes: of the store.
        queries: all their vectors are spent; where they are is where the arithmetic is done.
        r_c: vectors of a candidate to spend; one of the model's counts.
        rows: what to score, ascending.
        dtype: of the arithmetic; scores are summed in float32 whatever it is.

    Yields:
        Some rows and their scores.
    """
    planes = [plane for plane in planes if plane.first < r_c]
    if r_c == 1:
        queries = queries.sum(dim=1, keepdim=True)
    # By slot and then by query: the sum over slots then adds whole rows.
    weights = queries.transpose(0, 1).to(dtype)
    step = max(1, SCORES_AT_A_TIME // max(1, len(queries)))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        scores = torch.empty(len(part), len(queries), device=queries.device)
        tile = _tile_rows(planes, weights)
        for at in range(0, len(part), tile):
            _score_tile(planes, weights, part[at : at + tile], scores[at : at + tile])
        yield part, scores.T


def _tile_rows(planes: Sequence[Plane], weights: Float[Tensor, "Rq Q D"]) -> int:
    """How many rows to take at a time."""
    of_row = max(plane.vectors.shape[1] for plane in planes)
    columns = min(weights.shape[0] * weights.shape[1], _columns(weights))
    widest = max(weights.shape[2], columns) * of_row * 4
    return max(1, _tile_bytes(weights) // widest)


def _tile_bytes(weights: Tensor) -> int:
    return GPU_TILE_BYTES if weights.is_cuda else CPU_TILE_BYTES


def _columns(weights: Tensor) -> int:
    """Query vectors to multiply a tile with at a time."""
    return 2**14 if weights.is_cuda else 2**9


def _score_tile(
    planes: Sequence[Plane],
    weights: Float[Tensor, "Rq Q D"],
    rows: Integer[Tensor, " n"],
    scores: Float[Tensor, "n Q"],
) -> None:
    """Fill in the scores of a tile of rows."""
    first, last = int(rows[0]), int(rows[-1])
    # Rows that lie side by side are read where they are; others are gathered.
    side_by_side = last - first + 1 == len(rows)
    wanted = slice(first, last + 1) if side_by_side else rows
    blocks = [plane.read(wanted, weights.dtype, weights.device) for plane in planes]
    num_slots, num_queries, width = weights.shape
    step = max(1, _columns(weights) // num_slots)
    for start in range(0, num_queries, step):
        columns = weights[:, start : start + step].reshape(-1, width).T
        best = None
        for block in blocks:
            products = (block.flatten(0, 1) @ columns).view(*block.shape[:2], -1)
            found = products[:, 0] if block.shape[1] == 1 else products.amax(dim=1)
            best = found if best is None else torch.maximum(best, found, out=best)
        assert best is not None, "a store has at least one plane"
        best = best.view(len(rows), num_slots, -1)
        torch.sum(best, dim=1, dtype=torch.float32, out=scores[:, start : start + step])


def best_rows(
    scored: Iterator[tuple[Integer[Tensor, " n"], Float[Tensor, "Q n"]]], top: int
) -> tuple[Float[Tensor, "Q K"], Integer[Tensor, "Q K"]]:
    """The best scores of each query and their rows, best first; of equal scores the earlier row.

    Args:
        scored: rows in ascending order, as `scan` gives them.
        top: how many.
    """
    best = None
    for some_rows, scores in scored:
        rows = some_rows.to(scores.device).expand(len(scores), -1)
        if best is not None:
            # What was found before is of earlier rows: it stands first, and wins ties.
            scores, rows = torch.cat([best[0], scores], dim=1), torch.cat([best[1], rows], dim=1)
        values, columns = best_columns(scores, top)
        best = values, rows.gather(1, columns)
    assert best is not None, "nothing was scored"
    return best


def best_columns(
    scores: Float[Tensor, "Q N"], top: int
) -> tuple[Float[Tensor, "Q K"], Integer[Tensor, "Q K"]]:
    """The highest scores of each row and their columns, best first; of equal ones the earlier.

    >>> best_columns(Tensor([[1.0, 3.0, 3.0]]), top=1)
    (tensor([[3.]]), tensor([[1]]))
    """
    top = min(top, scores.shape[1])
    values, columns = scores.topk(top, dim=1)
    # topk takes any of the columns that tie for the last place: there all of them are looked at.
    tied = ((scores >= values[:, -1:]).sum(dim=1) > top).nonzero().flatten().tolist()
    for row in tied:
        candidates = (scores[row] >= values[row, -1]).nonzero().flatten()
        order = scores[row, candidates].argsort(descending=True, stable=True)[:top]
        columns[row] = candidates[order]
    columns = columns.sort(dim=1).values
    values = scores.gather(1, columns)
    order = values.argsort(dim=1, descending=True, stable=True)
    return values.gather(1, order), columns.gather(1, order)


@cache
def fast_dtype(device: torch.device) -> torch.dtype:
    """What this machine multiplies matrices in fastest: float32 or bfloat16, by trial.

    bf16 is three times faster on a CPU with AVX512-BF16 or AMX, ten times slower on one without.
    """
    if device.type == "cuda":
        return torch.bfloat16
    times = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.ones(512, 128, dtype=dtype), torch.ones(128, 128, dtype=dtype)
        torch.mm(a, b)
        start = time.perf_counter()
        torch.mm(a, b)
        times[dtype] = time.perf_counter() - start
    return min(times, key=times.__getitem__)
