"""What the vision tower costs: nothing is kept of a frozen one, and nothing is computed twice."""

from collections import Counter
from contextlib import contextmanager

import pytest
import torch

import tiny
from metaembed_pl.item import Item
from metaembed_pl.model.backbone_options import checkpoint_activations
from metaembed_pl.model.lora import LoraConfig, set_trainable
from metaembed_pl.training.gradient_cache import GradientCache

TEXTS = [Item("red apple"), Item("a text that is a good deal longer than the others are")]
ITEMS = [
    *TEXTS,
    Item(image=tiny.picture(1)),
    Item("blue flag moon star", tiny.picture(2, (84, 56))),
]
SIDES = ("query", "candidate")

every_family = pytest.mark.parametrize("name", tiny.CONFIGS)
pytestmark = pytest.mark.filterwarnings("ignore:`hidden_state` is deprecated:FutureWarning")


def trainee(name: str, lora: bool = False, train_vision: bool = False, checkpointed: bool = False):
    """A tiny model in training, in which every part counts; not quite everything is trained."""
    model = tiny.embedder(config=tiny.CONFIGS[name], layout="both")
    adapter = LoraConfig(r=4, dropout=0.0) if lora else None
    set_trainable(model.backbone, model.processing.family, adapter, train_vision)
    if checkpointed:
        checkpoint_activations(model.backbone)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 or not weight.any():
                weight.normal_(std=0.5 * weight.shape[-1] ** -0.5, generator=generator)
    return model.train()


def loss_of(model, items=ITEMS):
    process = model.processor()
    found = [model(process(items, side), side).flatten(0, 1) for side in SIDES]
    return (found[0] @ found[1].T).square().mean()


def gradients(model) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_equal_gradients(one, other, rtol=1e-5):
    assert one.keys() == other.keys()
    largest = max(float(gradient.abs().max()) for gradient in one.values())
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, atol=rtol * largest, rtol=0, msg=name)


@contextmanager
def watched(model):
    """What runs and what is kept for the backward pass inside the vision tower and projector."""
    calls, kept, inside = Counter(), [], []
    family, hooks = model.processing.family, []
    for part in family.vision_parts(model.backbone):
        hooks += [
            part.register_forward_pre_hook(lambda *_: inside.append(True)),
            part.register_forward_hook(lambda *_: inside.pop() and None, always_call=True),
        ]
        for name, module in part.named_modules():
            if not [*module.children()]:
                hooks.append(
                    module.register_forward_hook(lambda *_, name=name: calls.update([name]))
                )

    def pack(tensor):
        if inside:
            kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield calls, kept
    for hook in hooks:
        hook.remove()


@every_family
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_nothing_of_a_frozen_tower_is_kept_or_computed_twice(name, lora, checkpointed):
    model = trainee(name, lora, checkpointed=checkpointed)
    assert model.vision_is_frozen
    with watched(model) as (calls, kept):
        loss_of(model).backward()
    assert kept == []
    once_a_side = {name for name, count in calls.items() if count == len(SIDES)}
    layers = {name for name in calls if ".0." in name or "proj" in name}
    assert layers
    assert layers <= once_a_side


def test_what_a_trained_tower_keeps_is_seen_by_these_tests():
    model = trainee("qwen2_5_vl", train_vision=True)
    assert not model.vision_is_frozen
    with watched(model) as (_, kept):
        loss_of(model).backward()
    assert kept


@every_family
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_freezing_the_tower_changes_no_other_gradient(name, lora):
    whole = trainee(name, lora=False, train_vision=True)
    if lora:  # the same adapter, on a tower whose weights are trained
        whole = trainee(name, lora=True)
        for part in whole.processing.family.vision_parts(whole.backbone):
            part.requires_grad_(True)
    frozen = trainee(name, lora)
    loss_of(whole).backward()
    loss_of(frozen).backward()
    expected, found = gradients(whole), gradients(frozen)
    assert len(found) < len(expected)
    assert_equal_gradients({name: expected[name] for name in found}, found)


@every_family
def test_gradient_checkpointing_beside_a_frozen_tower_changes_no_gradient(name):
    models = [trainee(name, lora=True, checkpointed=done) for done in (False, True)]
    for model in models:
        loss_of(model).backward()
    assert_equal_gradients(*map(gradients, models))


@every_family
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_gradient_caching_sees_each_picture_once(name, lora):
    model = trainee(name, lora)
    chunks = {side: model.processor().in_chunks(ITEMS, side, max_tokens=1) for side in SIDES}
    assert {len(of_side) for of_side in chunks.values()} == {len(ITEMS)}
    with watched(model) as (calls, kept):
        cache = GradientCache(model)
        embeddings = [cache.encode(chunks[side], side) for side in SIDES]
        loss = (embeddings[0].flatten(0, 1) @ embeddings[1].flatten(0, 1).T).square().mean()
        wanted = torch.autograd.grad(loss, embeddings)
        for part in cache.surrogates(dict(zip(SIDES, wanted, strict=True))):
            part.backward()
    assert kept == []
    num_pictures = len(ITEMS) - len(TEXTS)
    layers = {name for name in calls if ".0." in name or "proj" in name}
    assert {calls[name] for name in layers} == {num_pictures * len(SIDES)}
    cached = gradients(model)
    loss_of(model).backward()
    assert_equal_gradients(gradients(model), cached)
    assert "see" not in vars(model)


def _ran(model, items) -> tuple[set[str], torch.Tensor]:
    """Modules without children that a forward pass runs, and what it gives."""
    ran = set()
    hooks = [
        module.register_forward_hook(lambda *_, name=name: ran.add(name))
        for name, module in model.named_modules()
        if not [*module.children()]
    ]
    found = model(model.processor()(items, "candidate"), "candidate")
    for hook in hooks:
        hook.remove()
    return ran, found


@every_family
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_batch_of_texts_keeps_a_trained_tower_in_step_forward_and_backward(name, lora):
    model = trainee(name, lora, train_vision=True)
    without, plain = _ran(model, TEXTS)
    model.shared = "gradients"
    with_images, _ = _ran(model, ITEMS)
    only_texts, found = _ran(model, TEXTS)
    assert only_texts == with_images != without
    torch.testing.assert_close(found, plain, atol=1e-5, rtol=0)
    model.zero_grad()
    loss_of(model, TEXTS).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    in_step = gradients(model)
    model.shared = None
    loss_of(model, TEXTS).backward()
    alone = gradients(model)
    assert_equal_gradients(alone, {name: in_step[name] for name in alone})
    assert not any(in_step[name].any() for name in in_step.keys() - alone.keys())


@every_family
def test_a_frozen_tower_that_is_not_shared_out_is_left_alone(name):
    model = trainee(name, lora=True)
    model.shared = "gradients"
    with watched(model) as (calls, _):
        loss_of(model, TEXTS).backward()
    assert not calls
    # Every adapter takes part nevertheless: DDP waits for all of them.
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@every_family
def test_a_frozen_tower_that_is_shared_out_is_gathered_for_texts_as_well(name):
    model = trainee(name, lora=True)
    model.shared = "weights"
    with_images, _ = _ran(model, ITEMS)
    only_texts, _ = _ran(model, TEXTS)
    assert only_texts == with_images
    with torch.no_grad():
        assert _ran(model, TEXTS)[0] == with_images


@every_family
def test_pixels_come_in_what_the_tower_computes_in_and_change_nothing(name):
    model = trainee(name).eval()
    model.backbone.to(torch.bfloat16)
    process = model.processor()
    cast, whole = (
        process(ITEMS, "candidate"),
        model.processing.with_slots({"candidate": 12})(ITEMS, "candidate"),
    )
    assert cast["pixel_values"].dtype == torch.bfloat16
    assert whole["pixel_values"].dtype == torch.float32
    (chunk,) = process.in_chunks(ITEMS, "candidate", max_tokens=10**6)
    assert chunk.inputs["pixel_values"].dtype == torch.bfloat16
    with torch.no_grad():
        assert torch.equal(model(cast, "candidate"), model(whole, "candidate"))
    assert trainee(name).processor()(ITEMS, "query")["pixel_values"].dtype == torch.float32
