"""Late interaction: scores of queries with candidates, for all nested groups at once.

The score of a pair is MaxSim: the sum, over the query's vectors, of the largest dot product with a
vector of the candidate. A group (r_q, r_c) scores the first r_q and r_c vectors.

    >>> query = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> candidate = torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])
    >>> nested_scores(query, candidate, [(1, 1), (2, 1), (2, 2)]).flatten()
    tensor([0., 1., 2.])

Q: queries    C: candidates    N: hard negatives of a query    G: groups    D: width of a vector
I: items    Rq, Rc, R: vectors of a query, of a candidate, of an item
"""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from metaembed_pl.budget import Budget, parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.late_interaction_kernel import NestedScores, accurate, score

CPU_TILE_ELEMENTS = 2**19
"""2 MiB of float32, about a core's cache; within 10 % of the fastest of 2^16 to 2^22."""
GPU_TILE_ELEMENTS = 2**25
"""128 MiB of float32, enough to fill a GPU. Not measured."""
SCORES_AT_A_TIME = 2**24
"""Scores in memory at a time when ranking a large pool: 64 MiB of float32."""


def maxsim(
    queries: Float[Tensor, "Q Rq D"], candidates: Float[Tensor, "C Rc D"]
) -> Float[Tensor, "Q C"]:
    """MaxSim of every query with every candidate, over all the vectors given.

    Args:
        queries: unit vectors (normalised by the caller).
        candidates: likewise.

    Returns:
        Scores in [-Rq, Rq], not divided by Rq; float32 (float64 for float64 inputs).

    Raises:
        UserError: the widths differ.

    >>> query = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    >>> maxsim(query, torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]], [[0.0, -1.0]]]))
    tensor([[ 1.,  1., -1.]])
    """
    return nested_scores(queries, candidates, [(queries.shape[1], candidates.shape[1])])[0]


def nested_scores(
    queries: Float[Tensor, "Q Rq D"],
    candidates: Float[Tensor, "C Rc D"],
    groups: Iterable[Budget | str | tuple[int, int]],
    tile_elements: int | None = None,
) -> Float[Tensor, "G Q C"]:
    """MaxSim of every query with every candidate, for every group.

    Differentiable in both. The backward pass needs the index of each winning candidate vector: one
    byte for each query vector of each group, 31 bytes per pair for the paper's groups.

    Args:
        queries: unit vectors (normalised by the caller).
        candidates: likewise.
        groups: nested, smallest first; the largest may not exceed Rq and Rc.
        tile_elements: dot products in memory at a time; does not change the result. None chooses by
            device.

    Returns:
        Scores, not divided by r_q, without temperature; float32 (float64 for float64 inputs).

    Raises:
        UserError: widths differ, or a group is larger than the vectors given.

    Source: MetaEmbed, arXiv 2509.18095, section 3.
    """
    groups = parse_groups(groups)
    _check_sizes(queries, candidates.shape[1], candidates.shape[2], groups)
    if tile_elements is None:
        tile_elements = GPU_TILE_ELEMENTS if queries.is_cuda else CPU_TILE_ELEMENTS
    if torch.is_grad_enabled() and (queries.requires_grad or candidates.requires_grad):
        return NestedScores.apply(queries, candidates, groups, tile_elements)
    return score(queries, candidates, groups, tile_elements)


def paired_scores(
    queries: Float[Tensor, "Q Rq D"],
    candidates: Float[Tensor, "Q N Rc D"],
    groups: Iterable[Budget | str | tuple[int, int]],
) -> Float[Tensor, "G Q N"]:
    """MaxSim of each query with its own N candidates (its hard negatives), for every group.

    Plain autograd: these pairs are few, compared with those of `nested_scores`.

    Raises:
        UserError: as `nested_scores`, or the two sides belong to different numbers of queries.
    """
    groups = parse_groups(groups)
    _check_sizes(queries, candidates.shape[2], candidates.shape[3], groups)
    if len(queries) != len(candidates):
        raise UserError(f"expected hard negatives of {len(queries)} queries, got {len(candidates)}")
    with torch.autocast(queries.device.type, enabled=False):
        products = torch.einsum("qid,qnjd->qnij", accurate(queries), accurate(candidates))
        # max, not amax: the gradient goes to one winner, as in nested_scores.
        best = [products[:, :, :r_q, :r_c].max(dim=3).values for r_q, r_c, _ in groups]
        return torch.stack([value.sum(dim=2) for value in best])


def narrowed(vectors: Float[Tensor, "... D"], width: int | None) -> Float[Tensor, "... _"]:
    """The first `width` components as unit vectors; None: the vectors as they are.

    >>> narrowed(torch.tensor([[[0.6, 0.0, 0.8]]]), 2)
    tensor([[[1., 0.]]])
    """
    return vectors if width is None else F.normalize(vectors[..., :width], dim=-1)


def cosines(vectors: Float[Tensor, "I R D"]) -> Float[Tensor, "R R"]:
    """The cosines between an item's unit vectors, averaged over items.

    >>> cosines(torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]]))
    tensor([[1.0000, 0.5000], [0.5000, 1.0000]])
    """
    return (vectors @ vectors.transpose(1, 2)).mean(dim=0)


def mean_cosine(vectors: Float[Tensor, "I R D"]) -> Float[Tensor, ""]:
    """The mean cosine between the unit vectors of an item, over all items; 1 if they have only one.

    >>> mean_cosine(torch.tensor([[[1.0, 0.0], [0.6, 0.8]], [[1.0, 0.0], [0.0, 1.0]]]))
    tensor(0.3000)
    """
    count = vectors.shape[1]
    if count == 1:
        return vectors.new_ones(())
    # The square of the sum has every pair twice, and each vector with itself.
    squares = vectors.sum(dim=1).square().sum(dim=1)
    return ((squares - count) / (count * (count - 1))).mean()


def check_vectors(vectors: object, what: str) -> None:
    """Raises a UserError if these are not vectors as a model encodes them: a tensor (N, R, D)."""
    is_tensor = isinstance(vectors, Tensor)
    if not is_tensor or vectors.ndim != 3:
        got = " x ".join(map(str, vectors.shape)) if is_tensor else type(vectors).__name__
        raise UserError(
            f"{what} must be a tensor of items x vectors x width, as the model encodes them; got "
            f"{got}"
        )


def _check_sizes(
    queries: Tensor, candidate_vectors: int, candidate_width: int, groups: tuple[Budget, ...]
) -> None:
    largest = groups[-1]
    if queries.shape[2] != candidate_width:
        raise UserError(
            f"queries are {queries.shape[2]} wide and candidates {candidate_width}: "
            "encode both with the same model"
        )
    if largest.r_q > queries.shape[1] or largest.r_c > candidate_vectors:
        raise UserError(
            f"group {largest} needs {largest.r_q} query and {largest.r_c} candidate vectors, "
            f"got {queries.shape[1]} and {candidate_vectors}"
        )
