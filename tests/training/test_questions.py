"""Several questions to a candidate: the same gradient as encoding it anew for each of them."""

import pytest
import torch
from torch.nn import functional as F

import tiny
from metaembed_pl.data.collate import collate, decoded
from metaembed_pl.item import Item, Pair
from metaembed_pl.late_interaction import nested_scores, paired_scores
from metaembed_pl.training.gradient_cache import GradientCache
from metaembed_pl.training.loss import MMRLoss

GROUPS = ("1x1", "2x4")


def questions() -> list[list[Pair]]:
    """Five candidates with three, one, two, one and one questions, some with hard negatives."""
    found = []
    for pair, count in zip(tiny.pairs(5), (3, 1, 2, 1, 1), strict=True):
        asked = [pair]
        for n in range(1, count):
            query = Item(tiny.text(50 * n + len(found), 2 + n))
            asked.append(Pair(f"{pair.id}/{n}", query, pair.positive, pair.negatives[: n % 2]))
        found.append([decoded(one) for one in asked])
    return found


def gradient(model, loss) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def encoded_anew(model, asked: list[list[Pair]], both_directions: bool) -> torch.Tensor:
    """The loss where each pair has its own copy of its positive and of its hard negatives."""
    pairs = [pair for some in asked for pair in some]
    candidate = torch.tensor([c for c, some in enumerate(asked) for _ in some])
    process = model.processor()
    queries = model(process([pair.query for pair in pairs], "query"), "query")
    copies = model(process([pair.positive for pair in pairs], "candidate"), "candidate")
    scores = nested_scores(queries, copies, GROUPS) / 0.1
    own = torch.eye(len(pairs), dtype=torch.bool)
    is_first = torch.tensor([c not in candidate[:i] for i, c in enumerate(candidate)])
    others = candidate[:, None] != candidate
    total = scores.new_zeros(())
    for i, pair in enumerate(pairs):
        logits = scores[:, i].masked_fill(~(own[i] | (others[i] & is_first)), -torch.inf)
        if pair.negatives:
            hard = model(process(list(pair.negatives), "candidate"), "candidate")
            hard = paired_scores(queries[i : i + 1], hard[None], GROUPS)[:, 0] / 0.1
            logits = torch.cat([logits, hard], dim=1)
        loss = F.cross_entropy(logits, torch.tensor([i] * len(GROUPS)), reduction="sum")
        if both_directions:
            back = scores[:, :, i].masked_fill(~(own[i] | others[i]), -torch.inf)
            back = F.cross_entropy(back, torch.tensor([i] * len(GROUPS)), reduction="sum")
            loss = (loss + back) / 2
        total = total + loss / len(pairs)
    return total


@pytest.mark.parametrize("both_directions", [False, True])
@pytest.mark.parametrize("is_cached", [False, True])
def test_the_gradient_is_that_of_encoding_the_candidate_for_each_question(
    both_directions, is_cached
):
    model = tiny.embedder(GROUPS).train()
    loss_of = MMRLoss(GROUPS, 0.1, both_directions=both_directions)
    asked = questions()
    batch = collate(
        asked,
        model.processor(),
        source="s",
        step=0,
        max_chunk_tokens=60 if is_cached else None,
    )
    if is_cached:
        cache = GradientCache(model)
        sides = {
            "query": cache.encode(batch.queries, "query"),
            "candidate": cache.encode(batch.candidates, "candidate"),
        }
        loss = loss_of(sides["query"], **batch.loss_inputs(sides["candidate"])).loss
        found = torch.autograd.grad(loss, list(sides.values()))
        surrogate = sum(cache.surrogates(dict(zip(sides, found, strict=True))))
        ours = gradient(model, surrogate)
    else:
        queries, candidates = model(batch.queries, "query"), model(batch.candidates, "candidate")
        loss = loss_of(queries, **batch.loss_inputs(candidates)).loss
        ours = gradient(model, loss)
    expected = encoded_anew(model, asked, both_directions)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    plain = gradient(model, expected)
    assert ours.keys() == plain.keys()
    norm = torch.stack([g.norm() for g in plain.values()]).norm()
    worst = max((ours[name] - plain[name]).abs().max() for name in plain)
    assert worst <= 1e-5 * norm
