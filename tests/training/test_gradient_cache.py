"""Gradient caching in one process; on several, see test_scale.py."""

import pytest
import torch

import tiny
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item
from metaembed_pl.model.lora import LoraConfig, set_trainable
from metaembed_pl.training.gradient_cache import GradientCache, GradientCacheConfig
from metaembed_pl.training.loss import MMRLoss

QUERIES = [Item(tiny.text(i, 1 + i % 5)) for i in range(6)]
CANDIDATES = [
    Item(None if i % 3 else tiny.text(i), tiny.picture(i, (28 + 28 * (i % 2), 56)))
    for i in range(6)
]
SIDES = {"query": QUERIES, "candidate": CANDIDATES}


def model(lora: LoraConfig | None = None, train_vision: bool = True):
    """In training; an adapter already does something, or half of it would get no gradient."""
    made = tiny.embedder().train()
    set_trainable(made.backbone, made.processing.family, lora, train_vision)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    return made


def chunks_of(made, max_tokens: int = 40) -> dict:
    process = made.processor()
    return {side: process.in_chunks(items, side, max_tokens) for side, items in SIDES.items()}


def gradients(made) -> dict[str, torch.Tensor]:
    found = {n: p.grad.clone() for n, p in made.named_parameters() if p.requires_grad}
    made.zero_grad()
    return found


def cached(made, chunks: dict) -> dict[str, torch.Tensor]:
    cache = GradientCache(made)
    embeddings = {side: cache.encode(chunks[side], side) for side in SIDES}
    loss = MMRLoss(made.groups)(embeddings["query"], embeddings["candidate"]).loss
    wanted = torch.autograd.grad(loss, list(embeddings.values()))
    for part in cache.surrogates(dict(zip(SIDES, wanted, strict=True))):
        part.backward()
    return gradients(made)


def in_one_graph(made, chunks: dict) -> dict[str, torch.Tensor]:
    """The definition: every chunk's graph is kept, and one backward pass goes through them all."""
    embeddings = {}
    for side, of_side in chunks.items():
        parts = [made(chunk.inputs, side) for chunk in of_side]
        order = torch.cat([chunk.rows for chunk in of_side]).argsort()
        embeddings[side] = torch.cat(parts)[order]
    MMRLoss(made.groups)(embeddings["query"], embeddings["candidate"]).loss.backward()
    return gradients(made)


def all_at_once(made) -> dict[str, torch.Tensor]:
    process = made.processor()
    embeddings = [made(process(items, side), side) for side, items in SIDES.items()]
    MMRLoss(made.groups)(*embeddings).loss.backward()
    return gradients(made)


def largest_difference(one: dict, other: dict) -> float:
    assert one.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    return max(float((one[name] - other[name]).abs().max()) for name in one) / largest


@pytest.mark.parametrize("lora", [None, LoraConfig(r=4, dropout=0.0)])
@pytest.mark.parametrize("train_vision", [True, False])
def test_the_gradient_is_that_of_the_whole_batch(lora, train_vision):
    made = model(lora, train_vision)
    expected = all_at_once(made)
    assert all(gradient.any() for gradient in expected.values())
    assert largest_difference(expected, cached(made, chunks_of(made))) < 2e-6


@pytest.mark.parametrize("train_vision", [True, False])
def test_dropout_is_the_same_in_both_passes(train_vision):
    made = model(LoraConfig(r=4, dropout=0.5), train_vision)
    chunks = chunks_of(made)
    torch.manual_seed(3)
    expected = in_one_graph(made, chunks)
    torch.manual_seed(3)
    found = cached(made, chunks)
    assert largest_difference(expected, found) < 2e-6
    torch.manual_seed(4)
    assert largest_difference(expected, cached(made, chunks)) > 1e-2  # dropout does matter here


def test_weights_cast_without_gradient_do_not_serve_again():
    made = model()
    chunks = chunks_of(made)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = in_one_graph(made, chunks), cached(made, chunks)
    assert all(gradient.any() for gradient in found.values())
    assert largest_difference(expected, found) < 0.02


def test_a_frozen_vision_tower_runs_once():
    made = model(LoraConfig(r=4), train_vision=False)
    calls = []
    tower = made.backbone.get_submodule(made.processing.family.vision_module)
    tower.patch_embed.register_forward_hook(lambda *_: calls.append(1))
    chunks = chunks_of(made)
    cached(made, chunks)
    with_images = [chunk for chunk in chunks["candidate"] if "pixel_values" in chunk.inputs]
    assert len(calls) == len(with_images) > 1
    assert "forward" not in vars(tower)


def test_the_memory_of_a_chunk_is_all_it_takes():
    """Tokens held for the backward pass: as many as a chunk has, however many chunks there are."""
    made = model()
    held = []
    for count in (8, 32):
        items = [Item(tiny.text(i, 6)) for i in range(count)]
        chunks = made.processor().in_chunks(items, "query", max_tokens=60)
        cache = GradientCache(made)
        embeddings = cache.encode(chunks, "query")
        largest = 0
        for part in cache.surrogates({"query": torch.ones_like(embeddings)}):
            saved = _saved_bytes(part)
            largest = max(largest, saved)
            part.backward()
        held.append(largest)
    assert held[1] < 1.2 * held[0]


def _saved_bytes(loss: torch.Tensor) -> int:
    """Bytes of what the graph of a loss keeps, each storage once."""
    storages, waiting, seen = {}, [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [parent for parent, _ in node.next_functions]
        for name in dir(node):
            value = getattr(node, name) if name.startswith("_saved_") else None
            if isinstance(value, torch.Tensor):
                storages[value.untyped_storage()._cdata] = value.untyped_storage().nbytes()
    return sum(storages.values())


def test_refuses_a_chunk_of_nothing():
    with pytest.raises(UserError, match=r"gradient_cache.max_tokens must be at least 1, got 0"):
        GradientCacheConfig(max_tokens=0)
