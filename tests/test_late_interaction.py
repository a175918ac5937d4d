"""Late interaction against the paper's formula, written as a loop."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from metaembed_pl import late_interaction_kernel as kernel
from metaembed_pl.budget import PAPER_GROUPS, parse_groups
from metaembed_pl.errors import UserError
from metaembed_pl.late_interaction import maxsim, nested_scores, paired_scores
from unchecked import shapes_unchecked

SMALL = parse_groups(["1x1", "1x3", "3x4", "4x9"])
GROUPS = [SMALL, parse_groups(["1x1"]), parse_groups(["5x1"]), parse_groups(["2x8", "4x8"])]


def vectors(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def maxsim_by_loop(query, candidate):
    return sum(max(q @ c for c in candidate) for q in query)


def nested_by_loop(queries, candidates, groups):
    rows = [
        [maxsim_by_loop(q[:r_q], c[:r_c]) for q in queries for c in candidates]
        for r_q, r_c, *_ in groups
    ]
    return torch.stack([torch.stack(row) for row in rows]).view(-1, len(queries), len(candidates))


def gradients(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    scores = function(*inputs)
    weight = torch.randn(scores.shape, generator=torch.Generator().manual_seed(9)).to(scores.dtype)
    return torch.autograd.grad((scores * weight).sum(), inputs)


@pytest.fixture
def one_backward(request, monkeypatch):
    """The GPU's way back, or the CPU's, for all groups."""
    if request.param == "product":
        monkeypatch.setattr(kernel, "_by_lookup", kernel._by_product)
    else:
        monkeypatch.setattr(kernel, "_by_product", kernel._by_lookup)


each_backward = pytest.mark.parametrize("one_backward", ["product", "lookup"], indirect=True)
each_groups = pytest.mark.parametrize("groups", GROUPS, ids=lambda groups: str(groups[-1]))


def test_maxsim_is_the_sum_of_best_matches():
    queries, candidates = vectors(3, 4, 5), vectors(2, 6, 5, seed=1)
    expected = nested_by_loop(queries, candidates, [(4, 6)])[0]
    torch.testing.assert_close(maxsim(queries, candidates), expected)


@each_groups
def test_nested_scores_are_the_loop_of_the_paper(groups):
    queries, candidates = vectors(3, 5, 6), vectors(4, 9, 6, seed=1)
    expected = nested_by_loop(queries, candidates, groups)
    torch.testing.assert_close(nested_scores(queries, candidates, groups), expected)
    scored_with_winners = nested_scores(queries.requires_grad_(), candidates, groups)
    torch.testing.assert_close(scored_with_winners, expected)


@each_groups
@pytest.mark.usefixtures("one_backward")
@each_backward
def test_nested_gradients_are_those_of_the_loop(groups):
    queries, candidates = vectors(3, 5, 6), vectors(4, 9, 6, seed=1)
    ours = gradients(lambda q, c: nested_scores(q, c, groups), queries, candidates)
    loop = gradients(lambda q, c: nested_by_loop(q, c, groups), queries, candidates)
    torch.testing.assert_close(ours, loop)


@pytest.mark.usefixtures("one_backward")
@each_backward
def test_nested_scores_pass_gradcheck():
    queries, candidates = vectors(2, 4, 3).requires_grad_(), vectors(3, 9, 3, seed=1)
    assert torch.autograd.gradcheck(
        lambda q, c: nested_scores(q, c, SMALL), (queries, candidates.requires_grad_())
    )


@pytest.mark.usefixtures("one_backward")
@each_backward
def test_only_the_side_that_asks_gets_a_gradient():
    queries, candidates = vectors(2, 4, 3), vectors(3, 9, 3, seed=1)
    full = gradients(lambda q, c: nested_scores(q, c, SMALL), queries, candidates)
    (for_queries,) = gradients(lambda q: nested_scores(q, candidates, SMALL), queries)
    (for_candidates,) = gradients(lambda c: nested_scores(queries, c, SMALL), candidates)
    torch.testing.assert_close((for_queries, for_candidates), full)


@each_groups
def test_paired_scores_are_the_diagonal_of_nested_scores(groups):
    queries, candidates = vectors(3, 5, 6), vectors(3, 2, 9, 6, seed=1)

    def diagonal(queries, candidates):
        scores = nested_scores(queries, candidates.flatten(0, 1), groups).view(-1, 3, 3, 2)
        return scores.diagonal(dim1=1, dim2=2).transpose(1, 2)

    inputs = queries, candidates
    torch.testing.assert_close(paired_scores(*inputs, groups), diagonal(*inputs))
    torch.testing.assert_close(
        gradients(lambda q, c: paired_scores(q, c, groups), *inputs), gradients(diagonal, *inputs)
    )


@given(st.integers(1, 3000), st.integers(1, 7), st.integers(1, 7))
@settings(max_examples=25, deadline=None)
def test_tiling_changes_nothing(tile_elements, num_queries, num_candidates):
    queries, candidates = vectors(num_queries, 4, 3), vectors(num_candidates, 9, 3, seed=1)

    def tiled(queries, candidates):
        return nested_scores(queries, candidates, SMALL, tile_elements)

    def whole(queries, candidates):
        return nested_scores(queries, candidates, SMALL, 2**20)

    torch.testing.assert_close(tiled(queries, candidates), whole(queries, candidates))
    torch.testing.assert_close(
        gradients(tiled, queries, candidates), gradients(whole, queries, candidates)
    )


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 500))
def test_tiles_cover_each_pair_once(num_queries, num_candidates, pairs):
    seen = torch.zeros(num_queries, num_candidates)
    for q, c in kernel._tiles(num_queries, num_candidates, pairs):
        assert seen[q, c].numel() <= max(1, pairs)
        seen[q, c] += 1
    assert (seen == 1).all()


def test_permuting_candidates_permutes_scores():
    queries, candidates = vectors(3, 16, 8), vectors(10, 64, 8, seed=1)
    order = torch.randperm(10, generator=torch.Generator().manual_seed(2))
    scores = nested_scores(queries, candidates, PAPER_GROUPS)
    permuted = nested_scores(queries, candidates[order], PAPER_GROUPS)
    torch.testing.assert_close(permuted, scores[:, :, order])


def test_a_group_is_the_score_of_its_prefixes():
    queries, candidates = vectors(3, 16, 8), vectors(5, 64, 8, seed=1)
    scores = nested_scores(queries, candidates, PAPER_GROUPS)
    for of_group, (r_q, r_c, _) in zip(scores, PAPER_GROUPS, strict=True):
        torch.testing.assert_close(of_group, maxsim(queries[:, :r_q], candidates[:, :r_c]))


def test_more_than_256_candidate_vectors_keep_their_winner():
    queries, candidates = vectors(2, 2, 4), vectors(2, 300, 4, seed=1)
    candidates[:, 299] = queries[:, 0]
    groups = parse_groups(["1x1", "2x300"])
    ours = gradients(lambda q, c: nested_scores(q, c, groups), queries, candidates)
    loop = gradients(lambda q, c: nested_by_loop(q, c, groups), queries, candidates)
    torch.testing.assert_close(ours, loop)


def test_no_query_and_no_candidate_make_an_empty_score():
    assert nested_scores(vectors(0, 16, 8), vectors(5, 64, 8), PAPER_GROUPS).shape == (5, 0, 5)
    assert nested_scores(vectors(3, 16, 8), vectors(0, 64, 8), PAPER_GROUPS).shape == (5, 3, 0)


def test_bf16_vectors_are_scored_in_float32():
    queries, candidates = vectors(3, 16, 8).bfloat16(), vectors(3, 64, 8, seed=1).bfloat16()

    def score(queries, candidates):
        return nested_scores(queries, candidates, PAPER_GROUPS)

    scores = score(queries, candidates)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), score(queries.double(), candidates.double()))
    of_pairs = paired_scores(queries, candidates.unsqueeze(1), PAPER_GROUPS)
    torch.testing.assert_close(of_pairs[:, :, 0], scores.diagonal(dim1=1, dim2=2))

    grads = gradients(score, queries, candidates)
    assert all(grad.dtype == torch.bfloat16 for grad in grads)
    exact = gradients(score, queries.float(), candidates.float())
    torch.testing.assert_close(grads, tuple(grad.bfloat16() for grad in exact))


@pytest.mark.usefixtures("one_backward")
@each_backward
def test_autocast_changes_neither_scores_nor_gradients():
    queries, candidates = vectors(3, 4, 8).float(), vectors(3, 9, 8, seed=1).float()

    def results():
        return (
            nested_scores(queries, candidates, SMALL),
            paired_scores(queries, candidates.unsqueeze(1), SMALL),
            gradients(lambda q, c: nested_scores(q, c, SMALL), queries, candidates),
        )

    expected = results()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(results(), expected)


def test_nan_reaches_the_score():
    queries, candidates = vectors(2, 16, 8), vectors(3, 64, 8, seed=1)
    candidates[1, 40] = torch.nan
    scores = nested_scores(queries.requires_grad_(), candidates, PAPER_GROUPS)
    assert scores[4, :, 1].isnan().all()
    assert scores[:4].isfinite().all()
    scores.sum().backward()


@pytest.mark.parametrize(
    ("function", "candidates"),
    [
        (lambda q, c: nested_scores(q, c, PAPER_GROUPS), vectors(2, 64, 1)),
        (lambda q, c: paired_scores(q, c, PAPER_GROUPS), vectors(2, 1, 64, 1)),
        (maxsim, vectors(2, 64, 1)),
    ],
    ids=["nested", "paired", "maxsim"],
)
def test_refuses_vectors_of_two_models(function, candidates):
    match = "queries are 8 wide and candidates 1:"
    with shapes_unchecked(), pytest.raises(UserError, match=match):
        function(vectors(2, 16, 8), candidates)


def test_refuses_hard_negatives_of_other_queries():
    with shapes_unchecked(), pytest.raises(UserError, match="of 2 queries, got 1"):
        paired_scores(vectors(2, 16, 8), vectors(1, 1, 64, 8), PAPER_GROUPS)


def test_refuses_a_group_larger_than_the_vectors():
    match = "16x64 needs 16 query and 64 candidate vectors, got 16 and 63"
    with pytest.raises(UserError, match=match):
        nested_scores(vectors(2, 16, 8), vectors(2, 63, 8), PAPER_GROUPS)
    with pytest.raises(UserError, match="got 15 and 64"):
        paired_scores(vectors(2, 15, 8), vectors(2, 1, 64, 8), PAPER_GROUPS)
