"""Chunks of like length against rows that are padded alike; on several ranks, see test_scale.py."""

import itertools

import pytest
import torch

import tiny
from metaembed_pl.data.collate import collate
from metaembed_pl.item import Item, Pair
from metaembed_pl.model import processing
from metaembed_pl.model.lora import LoraConfig, set_trainable
from metaembed_pl.model.processing import chunked
from metaembed_pl.training.gradient_cache import encode
from metaembed_pl.training.loss import MMRLoss


def pairs() -> list[Pair]:
    """Texts of all lengths, half of them with pictures of several sizes."""
    found = []
    for i in range(8):
        items = [
            Item(
                tiny.text(3 * i + j, 1 + (7 * i + 3 * j) % 23),
                tiny.picture(i, (28 + 28 * (i % 3), 56)) if (i + j) % 2 else None,
            )
            for j in range(3)
        ]
        found.append(Pair(str(i), items[0], items[1], (items[2],)))
    return found


def gradient(model, loss) -> dict[str, torch.Tensor]:
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")
@pytest.mark.parametrize("family", tiny.CONFIGS)
@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, dropout=0.0)], ids=["full", "lora"])
def test_the_gradient_is_that_of_one_padded_batch(family, lora, monkeypatch):
    monkeypatch.setattr(processing, "PASS_TOKENS", 4)
    model = tiny.embedder(config=tiny.CONFIGS[family]).train()
    set_trainable(model.backbone, model.processing.family, lora, train_vision=lora is None)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02, generator=generator)
    loss_of = MMRLoss(model.groups, 0.1)
    found = []
    for in_chunks in (False, True):
        asked = [[pair] for pair in pairs()]
        batch = collate(asked, model.processor(), source="s", step=0, in_chunks=in_chunks)
        if in_chunks:
            assert min(len(batch.queries), len(batch.candidates)) > 1
        queries = encode(model, batch.queries, "query")
        candidates = encode(model, batch.candidates, "candidate")
        loss = loss_of(queries, **batch.loss_inputs(candidates)).loss
        found.append((loss, gradient(model, loss)))
    (plain_loss, plain), (loss, ours) = found
    torch.testing.assert_close(loss, plain_loss, rtol=1e-5, atol=0)
    norm = torch.stack([part.norm() for part in plain.values()]).norm()
    assert max((ours[name] - plain[name]).abs().max() for name in plain) <= 1e-5 * norm


def test_no_other_chunks_cost_less():
    """Against all ways to cut the sorted rows."""
    lengths = [610, 95, 340, 90, 100, 601, 330, 88]
    for max_tokens in (None, 1300, 700):
        chunks = chunked(lengths, max_tokens)
        assert sorted(itertools.chain(*chunks)) == list(range(8))
        rows = sorted(range(8), key=lambda row: -lengths[row])
        ways = []
        for count in range(8):
            for cuts in itertools.combinations(range(1, 8), count):
                ends = [0, *cuts, 8]
                ways.append([rows[a:b] for a, b in itertools.pairwise(ends)])
        possible = [way for way in ways if max_tokens is None or fits(way, lengths, max_tokens)]
        assert cost(chunks, lengths) == min(cost(way, lengths) for way in possible)
        assert max_tokens is None or fits(chunks, lengths, max_tokens)


def fits(chunks, lengths, max_tokens) -> bool:
    sizes = [len(chunk) * max(lengths[row] for row in chunk) for chunk in chunks]
    return all(size <= max_tokens for size in sizes)


def cost(chunks, lengths) -> int:
    padded = sum(len(chunk) * max(lengths[row] for row in chunk) for chunk in chunks)
    return padded + processing.PASS_TOKENS * len(chunks)
