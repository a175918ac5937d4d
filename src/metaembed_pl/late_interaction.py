"""Late interaction: how well queries and candidates match, for all nested groups at once.

The score of a pair is MaxSim: each query vector finds its best candidate vector, and the best dot
products are summed. A group (r_q, r_c) scores the first r_q and r_c vectors. The groups are nested,
so one product holds the dot products of all of them, and a running maximum over the candidate's
vectors passes through the maximum of every group.

Q: queries    C: candidates    N: hard negatives of a query    G: groups    D: width of a vector
Rq, Rc: vectors of a query, of a candidate
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from metaembed_pl.budget import Budget, parse_groups
from metaembed_pl.errors import UserError

TILE_ELEMENTS = 2**20
"""Dot products held at a time (4 bytes each)."""


def maxsim(
    queries: Float[Tensor, "Q Rq D"], candidates: Float[Tensor, "C Rc D"]
) -> Float[Tensor, "Q C"]:
    """MaxSim of every query with every candidate, over all the vectors given.

    Not divided by the number of query vectors: with unit vectors it lies in [-Rq, Rq].

    >>> query = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> maxsim(query, torch.tensor([[[0.6, 0.8]], [[1.0, 0.0]]])).tolist()
    [[1.4000..., 1.0]]
    """
    return nested_scores(queries, candidates, [(queries.shape[1], candidates.shape[1])])[0]


def nested_scores(
    queries: Float[Tensor, "Q Rq D"],
    candidates: Float[Tensor, "C Rc D"],
    groups: Iterable[Budget | tuple[int, int]],
    tile_elements: int = TILE_ELEMENTS,
) -> Float[Tensor, "G Q C"]:
    """MaxSim of every query with every candidate, for every group.

    Differentiable in both. What the backward pass keeps is which candidate vector won: one byte for
    each query vector of each group, 31 bytes a pair for the paper's groups.

    Args:
        queries: unit vectors (normalised by the caller), the most important first.
        candidates: likewise.
        groups: nested, smallest first; the largest may not exceed Rq and Rc.
        tile_elements: how many dot products to hold at a time; bounds memory, never the result.

    Returns:
        Scores, not divided by r_q, without temperature; float32 (float64 for float64 inputs).

    Raises:
        UserError: widths differ, or a group is larger than the vectors given.

    Source: MetaEmbed, arXiv 2509.18095, section 3.
    """
    groups = parse_groups(groups)
    _check_vectors(queries, candidates.shape[1], candidates.shape[2], groups)
    if torch.is_grad_enabled() and (queries.requires_grad or candidates.requires_grad):
        return _NestedScores.apply(queries, candidates, groups, tile_elements)
    return _score_tiles(queries, candidates, groups, tile_elements, winners=None)


def paired_scores(
    queries: Float[Tensor, "Q Rq D"],
    candidates: Float[Tensor, "Q N Rc D"],
    groups: Iterable[Budget | tuple[int, int]],
) -> Float[Tensor, "G Q N"]:
    """MaxSim of each query with its own N candidates (its hard negatives), for every group.

    Plain autograd: there are C / N times fewer pairs here than in `nested_scores`.

    Raises:
        UserError: as `nested_scores`, or the two do not hold equally many queries.
    """
    groups = parse_groups(groups)
    _check_vectors(queries, candidates.shape[2], candidates.shape[3], groups)
    if len(queries) != len(candidates):
        raise UserError(f"expected hard negatives of {len(queries)} queries, got {len(candidates)}")
    with torch.autocast(queries.device.type, enabled=False):
        queries, candidates = _accurate(queries), _accurate(candidates)
        products = torch.einsum("qid,qnjd->qnij", queries, candidates)
        # max, not amax: the gradient goes to one winner, as in nested_scores.
        return torch.stack(
            [products[:, :, :r_q, :r_c].max(dim=3).values.sum(dim=2) for r_q, r_c in groups]
        )


class _NestedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, queries, candidates, groups, tile_elements):
        shape = len(candidates), len(queries)
        dtype = torch.uint8 if groups[-1].r_c <= 256 else torch.int16
        winners = [
            torch.empty(shape[0], r_q, shape[1], dtype=dtype, device=queries.device)
            for r_q, _ in groups
        ]
        ctx.save_for_backward(queries, candidates, *winners)
        ctx.groups, ctx.tile_elements = groups, tile_elements
        return _score_tiles(queries, candidates, groups, tile_elements, winners)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        queries, candidates, *winners = ctx.saved_tensors
        grads = _backward_dense(queries, candidates, winners, ctx.groups, ctx.tile_elements, grad)
        return *grads, None, None


def _score_tiles(queries, candidates, groups, tile_elements, winners):
    largest = groups[-1]
    scores = None
    with torch.autocast(queries.device.type, enabled=False):
        queries, candidates = _slots_first(queries, largest.r_q), _accurate(candidates[:, : largest.r_c])
        scores = queries.new_empty(len(groups), queries.shape[1], len(candidates))
        for c, q in _tiles(len(candidates), queries.shape[1], largest, tile_elements):
            tile = queries[:, q]
            products = candidates[c].flatten(0, 1) @ tile.flatten(0, 1).T
            products = products.view(-1, largest.r_c, *tile.shape[:2])
            best = winner = None
            start = 0
            for g, (r_q, r_c) in enumerate(groups):
                if r_c > start:
                    value, slot = products[:, start:r_c].max(dim=1)
                    if best is None:
                        best, winner = value, slot
                    else:
                        winner = torch.where(value > best, slot + start, winner)
                        best = torch.maximum(best, value)
                    start = r_c
                scores[g, q, c] = best[:, :r_q].sum(dim=1).T
                if winners is not None:
                    winners[g][c, :, q] = winner[:, :r_q]
    return scores


def _backward_dense(queries, candidates, winners, groups, tile_elements, grad):
    largest = groups[-1]
    grad_q, grad_c = torch.zeros_like(queries), torch.zeros_like(candidates)
    with torch.autocast(queries.device.type, enabled=False):
        q_slots = _slots_first(queries, largest.r_q)
        cands = _accurate(candidates[:, : largest.r_c])
        acc_q, acc_c = torch.zeros_like(q_slots), torch.zeros_like(cands)
        for c, q in _tiles(len(cands), q_slots.shape[1], largest, tile_elements):
            tile_q, tile_c = q_slots[:, q], cands[c]
            weight = cands.new_zeros(len(tile_c), largest.r_c, largest.r_q, tile_q.shape[1])
            for g, (r_q, _) in enumerate(groups):
                index = winners[g][c, :, q].unsqueeze(1).long()
                weight[:, :, :r_q].scatter_add_(
                    1, index, grad[g, q, c].T[:, None, None].expand_as(index).contiguous()
                )
            weight = weight.view(-1, largest.r_q * tile_q.shape[1])
            acc_c[c] += (weight @ tile_q.flatten(0, 1)).view_as(tile_c)
            acc_q[:, q] += (weight.T @ tile_c.flatten(0, 1)).view_as(tile_q)
        grad_q[:, : largest.r_q] = acc_q.transpose(0, 1)
        grad_c[:, : largest.r_c] = acc_c
    return grad_q, grad_c


def _tiles(num_candidates, num_queries, largest, tile_elements):
    pairs = max(1, tile_elements // (largest.r_q * largest.r_c))
    step_q = min(num_queries, pairs)
    step_c = max(1, pairs // max(1, step_q))
    for c in range(0, num_candidates, step_c):
        for q in range(0, num_queries, step_q):
            yield slice(c, c + step_c), slice(q, q + step_q)


def _slots_first(queries, r_q):
    return _accurate(queries[:, :r_q]).transpose(0, 1).contiguous()


def _accurate(x):
    return x if x.dtype == torch.float64 else x.float()


def _check_vectors(queries, candidate_vectors, candidate_width, groups):
    largest = groups[-1]
    if queries.shape[2] != candidate_width:
        raise UserError(
            f"queries are {queries.shape[2]} wide and candidates {candidate_width}: "
            "encode both with the same model"
        )
    if largest.r_q > queries.shape[1] or largest.r_c > candidate_vectors:
        raise UserError(
            f"group {largest} needs {largest.r_q} query and {largest.r_c} candidate vectors; "
            f"got {queries.shape[1]} and {candidate_vectors}"
        )
