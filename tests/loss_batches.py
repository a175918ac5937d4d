"""Batches for tests of the loss, and what loops over them need."""

import torch
from torch.nn import functional as F

from metaembed_pl.budget import parse_groups

GROUPS = parse_groups(["1x1", "2x3", "3x5"])
TWO_ROWS = len(GROUPS) * 6 * 2  # elements of a block of scores


def vectors(*shape, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def a_batch():
    """Vectors of six pairs with two hard negatives each, and who answers what."""
    size = 6
    batch = {
        "queries": vectors(size, 3, 4),
        "positives": vectors(size, 5, 4, seed=1),
        "negatives": vectors(2 * size, 5, 4, seed=2),
        "negatives_of": torch.arange(2 * size).view(size, 2),
        "asks": torch.stack([torch.arange(size), torch.arange(size) + 200], dim=1),
        "answers": torch.full((size, 3), -1),
        "negative_answers": torch.full((2 * size, 2), -1),
    }
    batch["answers"][:, 0] = batch["asks"][:, 0]
    batch["answers"][0, 1:] = torch.tensor([1, 5])  # answers what queries 1 and 5 ask, too
    batch["answers"][4, 1] = 0
    batch["answers"][3, 1] = 202  # shows the same as the positive of query 2
    batch["negative_answers"][7, 0] = 3  # a hard negative of query 3 that is none
    batch["negative_answers"][4] = torch.tensor([70, 2])  # likewise, of query 2
    batch["negative_answers"][10, 1] = 0  # answers another's query: still a negative of query 5
    return batch


def questions():
    """Seven questions to four candidates: three to the first, one, two, one."""
    return {
        "queries": vectors(7, 3, 4),
        "positives": vectors(4, 5, 4, seed=1),
        "negatives": vectors(5, 5, 4, seed=2),
        "positive_of": torch.tensor([0, 0, 0, 1, 2, 2, 3]),
        # Of a query, of a candidate (rows 1 and 2 are compared with by all its queries), and none.
        "negatives_of": torch.tensor(
            [[0, 1, 2], [1, 2, -1], [1, 2, -1], [-1, -1, -1], [3, -1, -1], [4, -1, -1], [-1] * 3]
        ),
        "asks": torch.stack([torch.arange(7), torch.arange(7) + 200], dim=1),
        "answers": torch.tensor([[0, 1, 2, 6], [3, -1, -1, -1], [4, 5, -1, -1], [6, 1, -1, -1]]),
        "negative_answers": torch.tensor([[90, -1], [1, 91], [92, -1], [93, 5], [94, -1]]),
    }


def score_by_loop(query, candidate, group, mean):
    r_q, r_c, *_ = group
    score = sum(max(q @ c for c in candidate[:r_c]) for q in query[:r_q])
    return score / r_q if mean else score


def loss_and_gradients(function, batch):
    """The loss, and its gradient in every floating point input."""
    batch = {
        name: x.clone().requires_grad_() if x.is_floating_point() else x
        for name, x in batch.items()
    }
    loss = function(batch)
    loss.backward()
    return loss.detach(), {name: x.grad for name, x in batch.items() if x.is_floating_point()}


def without(batch, *names):
    return {name: x for name, x in batch.items() if name not in names}


def part_of(batch, rank):
    """One of two ranks' rows: of each side by itself; its answers only as wide as they must be."""
    queries, positives, negatives = batch["queries"], batch["positives"], batch.get("negatives")
    ragged = "positive_of" in batch
    first = {  # rows of rank 0
        len(queries): 4 if ragged else 3,
        len(positives): 2 if ragged else 3,
        len(negatives) if negatives is not None else 0: 3 if ragged else 6,
    }
    part = {}
    for name, x in batch.items():
        split = first[len(x)]
        part[name] = x[:split] if rank == 0 else x[split:]
    if rank == 1:
        if ragged:
            part["positive_of"] = part["positive_of"] - first[len(positives)]
        if negatives is not None:
            rows = part["negatives_of"]
            part["negatives_of"] = torch.where(rows < 0, -1, rows - first[len(negatives)])
        if "answers" in part:
            part["answers"] = part["answers"][:, :2]
    return part
