"""What an export may change of a model: the angle of vectors and the order of candidates."""

import math

import pytest
import torch

from metaembed_pl.errors import UserError
from metaembed_pl.model.export import Vectors, compare

WIDTH = 3584


def turned(vectors: torch.Tensor, cosine: float) -> torch.Tensor:
    """Each vector turned by that cosine, in a random direction of its own."""
    noise = torch.randn_like(vectors)
    noise -= (noise * vectors).sum(-1, keepdim=True) * vectors
    noise /= noise.norm(dim=-1, keepdim=True)
    return cosine * vectors + math.sqrt(1 - cosine**2) * noise


def made() -> Vectors:
    torch.manual_seed(0)
    sides = (torch.randn(5, count, WIDTH) for count in (16, 64))
    return Vectors(*(torch.nn.functional.normalize(side, dim=-1) for side in sides))


@pytest.mark.parametrize(
    ("dtype", "kept", "refused"),
    [
        (torch.float32, 0.99995, 0.9998),
        (torch.bfloat16, 0.996, 0.99),
        (torch.float16, 0.9995, 0.998),
    ],
)
def test_vectors_may_turn_as_far_as_rounding_turns_them(dtype, kept, refused):
    before = made()
    found = compare(before, Vectors(*(turned(side, kept) for side in before)), dtype, "merging")
    assert found.cosine == pytest.approx(kept, abs=1e-5)
    assert found.swaps == 0
    after = Vectors(before.queries, turned(before.candidates, refused))
    with pytest.raises(UserError, match=f"merging would change .* cosine of a vector {refused}"):
        compare(before, after, dtype, "merging")


def test_a_turn_that_no_single_component_shows_is_refused():
    before = made()
    after = Vectors(*(turned(side, 0.88) for side in before))
    assert max(float((b - a).abs().max()) for b, a in zip(before, after, strict=True)) < 5e-2
    with pytest.raises(UserError, match=r"at least 0\.995 is rounding"):
        compare(before, after, torch.bfloat16, "merging")


def test_candidates_that_were_apart_keep_their_order():
    """The same small turn is rounding in any direction, and a fault towards one query."""
    query = torch.eye(WIDTH)[:1, None]
    near = torch.zeros(2, 1, WIDTH)
    near[:, 0, 0] = torch.tensor([0.52, 0.50])
    near[:, 0, 1] = (1 - near[:, 0, 0] ** 2).sqrt()
    before = Vectors(query, near)
    swapped = Vectors(query, near.flip(0))
    assert torch.cosine_similarity(near, near.flip(0), dim=-1).min() > 0.9996
    with pytest.raises(UserError, match="1 pairs of candidates swapped"):
        compare(before, swapped, torch.bfloat16, "merging")


def test_what_is_not_a_number_is_refused():
    before = made()
    with pytest.raises(UserError, match="cosine of a vector nan"):
        compare(before, Vectors(before.queries, before.candidates * torch.nan), torch.float32, "x")
