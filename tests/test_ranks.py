"""Gathering: the identity in one process, exact on two."""

import pytest
import torch

from metaembed_pl.errors import UserError
from metaembed_pl.ranks import (
    gather,
    gather_with_gradient,
    maximum_over_ranks,
    rank_and_world,
)
from ranks import on_two_ranks


def rows(rank):
    return torch.arange(6.0).view(2, 3) + 10 * rank


def loss_of(rank, gathered):
    """Each rank weighs all rows its own way."""
    weight = torch.linspace(-1, 2, gathered.numel()).view_as(gathered) * (1 + rank)
    return (gathered**2 * weight).sum()


def work(rank):
    x = rows(rank).requires_grad_()
    gathered = gather_with_gradient(x)
    loss_of(rank, gathered).backward()
    refusals = []
    for function in (gather, gather_with_gradient):
        # Ranks that differ in rows, and in the number of dimensions.
        for shape in ((2 + rank, 3), (2, 3) if rank else (6,)):
            try:
                function(torch.zeros(shape))
            except UserError as error:
                refusals.append(str(error))
    return {
        "rank_and_world": rank_and_world(),
        "gathered": gathered.detach(),
        "grad": x.grad,
        "integers": gather(torch.tensor([[rank, -1]])),
        "bf16": gather_with_gradient(rows(rank).bfloat16()),
        "not_contiguous": gather(rows(rank).T),
        "requires_grad": gather(x).requires_grad,
        "maximum": maximum_over_ranks(3 - 2 * rank, x.device),
        "refusals": refusals,
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_two_ranks(work, tmp_path_factory.mktemp("gather"))


def test_one_process_gathers_itself():
    x = torch.ones(2, 3, requires_grad=True)
    assert rank_and_world() == (0, 1)
    assert gather_with_gradient(x) is x
    assert not gather(x).requires_grad
    assert maximum_over_ranks(7, x.device) == 7


def test_every_rank_sees_all_rows_in_the_order_of_ranks(ranks):
    everything = torch.cat([rows(0), rows(1)])
    for rank, seen in enumerate(ranks):
        assert seen["rank_and_world"] == (rank, 2)
        assert torch.equal(seen["gathered"], everything)
        assert torch.equal(seen["bf16"], everything.bfloat16())
        assert torch.equal(seen["integers"], torch.tensor([[0, -1], [1, -1]]))
        assert torch.equal(seen["not_contiguous"], torch.cat([rows(0).T, rows(1).T]))
        assert seen["maximum"] == 3


def test_a_row_gets_the_sum_of_the_gradients_of_all_ranks(ranks):
    everything = torch.cat([rows(0), rows(1)]).requires_grad_()
    (loss_of(0, everything) + loss_of(1, everything)).backward()
    torch.testing.assert_close(torch.cat([seen["grad"] for seen in ranks]), everything.grad)


def test_gather_alone_has_no_gradient(ranks):
    assert not any(seen["requires_grad"] for seen in ranks)


def test_refuses_ranks_of_different_shapes_and_names_them(ranks):
    for seen in ranks:
        assert len(seen["refusals"]) == 4
        assert "[[2, 3], [3, 3]]" in seen["refusals"][0]
        assert "[[6], [2, 3]]" in seen["refusals"][1]
