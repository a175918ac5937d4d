"""MaxSim of stored candidates: planes are read in one pass, in tiles that fit the cache.

A tile's vectors times all query vectors is one matrix product, followed by a maximum over its slots
while the products are still in the cache. With one candidate vector there is no maximum, and the
sum of the query's vectors is enough:

    sum_i max_j q_i . c_j  =  (sum_i q_i) . c     where there is a single c

So 16x1 costs what 1x1 costs, and ranks far better.

Q: queries    q: some of them    Rq: their vectors    D: width    N: rows that are scored
n: rows of a tile    S: slots of a plane    K: hits of a query
"""

import time
from collections.abc import Iterator, Sequence
from functools import cache, partial

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from metaembed_pl.late_interaction import SCORES_AT_A_TIME
from metaembed_pl.retrieval.planes import Plane, read

CPU_TILE_BYTES = 2**22
"""Size of a tile's vectors and of its products: within 5 % of the fastest of 2^18 to 2^25."""
CPU_COLUMNS = 2**9
"""Query vectors multiplied with a tile at a time."""
FEW = 512
"""Up to so many items are scored for one query without tiles, and sorted at once."""
GPU_TILE_BYTES, GPU_COLUMNS = 2**28, 2**14
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
        queries: all of their vectors and components are used, on their device.
        r_c: candidate vectors to use; one of the model's counts.
        rows: to score, ascending.
        dtype: of the products; scores are always summed in float32.

    Yields:
        Some rows and their scores.
    """
    planes = [plane for plane in planes if plane.first < r_c]
    if r_c == 1:
        queries = queries.sum(dim=1, keepdim=True)
    # By slot and then by query: the sum over slots then adds complete rows.
    weights = queries.transpose(0, 1).to(dtype)
    tile = _Tile(planes, weights)
    step = max(tile.num_rows, SCORES_AT_A_TIME // max(1, len(queries)))
    for start in range(0, len(rows), step):
        part = rows[start : start + step]
        scores = torch.empty(len(part), len(queries), device=queries.device)
        for at in range(0, len(part), tile.num_rows):
            end = at + tile.num_rows
            tile.score(part[at:end], scores[at:end])
        yield part, scores.T


def score_few(
    planes: Sequence[Plane],
    query: Float[Tensor, "Rq D"],
    r_c: int,
    rows: Integer[Tensor, " n"],
) -> Float[Tensor, " n"]:
    """Scores of some rows for one query, as from `scan`, without preparing tiles."""
    vectors = read(planes, r_c, rows, query.shape[1]).to(query.device)
    products = query @ vectors.flatten(0, 1).T
    return products.view(len(query), len(rows), r_c).amax(dim=2).sum(dim=0)


class _Tile:
    """Some rows' vectors and their products with query vectors, in memory that is reused.

    New memory for each tile would cost a third of the time: the system provides it page by page.
    """

    def __init__(self, planes: Sequence[Plane], weights: Float[Tensor, "Rq Q D"]):
        self.planes, self.weights = planes, weights
        num_slots, num_queries, width = weights.shape
        on_gpu = weights.is_cuda
        most = GPU_TILE_BYTES if on_gpu else CPU_TILE_BYTES
        self.step = max(1, (GPU_COLUMNS if on_gpu else CPU_COLUMNS) // num_slots)
        columns = num_slots * min(self.step, max(1, num_queries))
        sizes = [plane.vectors.shape[1] for plane in planes]
        of_row = 4 * max(width * sum(sizes), columns * max(sizes))
        self.num_rows = max(1, most // of_row)
        new = partial(torch.empty, dtype=weights.dtype, device=weights.device)
        self._blocks = [new(self.num_rows, size, width) for size in sizes]
        self._products = new(self.num_rows * max(sizes) * columns)

    def score(self, rows: Integer[Tensor, " n"], scores: Float[Tensor, "n Q"]) -> None:
        """Fill in the scores of at most `num_rows` rows."""
        first, last = int(rows[0]), int(rows[-1])
        # Adjacent rows are read in place; others are gathered.
        wanted = slice(first, last + 1) if last - first + 1 == len(rows) else rows
        blocks = [
            plane.read_into(block[: len(rows)], wanted)
            for plane, block in zip(self.planes, self._blocks, strict=True)
        ]
        num_slots, num_queries, width = self.weights.shape
        for start in range(0, num_queries, self.step):
            columns = self.weights[:, start : start + self.step].reshape(-1, width).T
            best = None
            for block in blocks:
                found = self._best_of(block, columns)
                best = found if best is None else torch.maximum(best, found, out=best)
            assert best is not None, "a store has at least one plane"
            best = best.view(len(rows), num_slots, -1)
            # bf16 would lose the last digits of a sum of many.
            scores[:, start : start + self.step] = best.sum(dim=1, dtype=torch.float32)

    def _best_of(
        self, block: Float[Tensor, "n S D"], columns: Float[Tensor, "D Rq_q"]
    ) -> Float[Tensor, "n Rq_q"]:
        """The best product of each query vector with a row's vectors of one plane."""
        num_rows, num_slots, _ = block.shape
        products = self._products[: num_rows * num_slots * columns.shape[1]]
        products = products.view(num_rows * num_slots, -1)
        torch.mm(block.flatten(0, 1), columns, out=products)
        products = products.view(num_rows, num_slots, -1)
        return products[:, 0].clone() if num_slots == 1 else products.amax(dim=1)


def best_rows(
    scored: Iterator[tuple[Integer[Tensor, " n"], Float[Tensor, "Q n"]]], top: int
) -> tuple[Float[Tensor, "Q K"], Integer[Tensor, "Q K"]]:
    """The `top` best scores of each query and their rows; of equal scores the earlier row first.

    The rows come in ascending order, as from `scan`.
    """
    best = None
    for some_rows, scores in scored:
        rows = some_rows.to(scores.device).expand(len(scores), -1)
        if best is not None:
            # Earlier rows stand first, and win ties.
            scores, rows = torch.cat([best[0], scores], dim=1), torch.cat([best[1], rows], dim=1)
        values, columns = best_columns(scores, top)
        best = values, rows.gather(1, columns)
    assert best is not None, "nothing was scored"
    return best


def best_columns(
    scores: Float[Tensor, "Q N"], top: int
) -> tuple[Float[Tensor, "Q K"], Integer[Tensor, "Q K"]]:
    """The highest scores of each row and their columns, best first; of equal scores the earlier.

    >>> best_columns(Tensor([[1.0, 3.0, 3.0]]), top=1)
    (tensor([[3.]]), tensor([[1]]))
    """
    top = min(top, scores.shape[1])
    if scores.shape[1] <= FEW:
        values, columns = scores.sort(dim=1, descending=True, stable=True)
        return values[:, :top], columns[:, :top]
    values, columns = scores.topk(top, dim=1)
    # topk takes any of the columns that tie for the last place: compare all of them.
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
    """The dtype in which this machine multiplies matrices fastest, float32 or bfloat16, by trial.

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
