"""Muon: equal to torch's where that computes well, and orthogonal."""

import pytest
import torch
from torch import nn

from metaembed_pl.training import muon


def weights() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 12), (12, 8), (8, 12), (6, 6), (8, 12)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]


def train(parameters, optimizer, num_steps: int = 6) -> None:
    for step in range(num_steps):
        generator = torch.Generator().manual_seed(step)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()


@pytest.mark.parametrize("in_bf16", [True, False])
def test_moves_as_torchs_own(monkeypatch, in_bf16):
    """Torch's computes in bf16: in fp32 we can only be as near as that rounds."""
    monkeypatch.setattr(muon, "computes_in_bf16", lambda _: in_bf16)
    ours, theirs = weights(), weights()
    train(ours, muon.Muon(ours, lr=1e-2, weight_decay=0.1))
    settings = {"lr": 1e-2, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    train(theirs, torch.optim.Muon(theirs, **settings))
    start = weights()
    for one, other, first in zip(ours, theirs, start, strict=True):
        moved = (other - first).norm()
        assert (one - other).norm() < (0.01 if in_bf16 else 0.03) * moved


@pytest.mark.parametrize("shape", [(4, 5, 9), (4, 9, 5), (1, 7, 7)])
def test_keeps_directions_and_brings_lengths_near_one(shape):
    generator = torch.Generator().manual_seed(0)
    u, _, v = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    lengths = torch.rand(u.shape[0], u.shape[2], generator=generator) + 0.5
    found = muon.orthogonal(u * lengths[:, None] @ v)
    within = u.mT @ found @ v.mT  # diagonal, if the directions are kept
    lengths = within.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(within, torch.diag_embed(lengths), atol=1e-5, rtol=0)
    assert lengths.min() > 0.6
    assert lengths.max() < 1.3


def test_a_matrix_without_gradient_stays():
    parameters = weights()
    before = [parameter.detach().clone() for parameter in parameters]
    parameters[0].grad = torch.ones_like(parameters[0])
    muon.Muon(parameters).step()
    changed = [not torch.equal(p, old) for p, old in zip(parameters, before, strict=True)]
    assert changed == [True, False, False, False, False]


def test_zero_gradients_move_nothing():
    parameter = nn.Parameter(torch.ones(3, 4))
    parameter.grad = torch.zeros(3, 4)
    muon.Muon([parameter], weight_decay=0.0).step()
    assert torch.equal(parameter, torch.ones(3, 4))
