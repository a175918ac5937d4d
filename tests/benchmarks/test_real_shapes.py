"""Counts without weights against the same model with them."""

import sys
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

import tiny
from metaembed_pl.item import Item
from metaembed_pl.model.backbone_options import checkpoint_activations
from metaembed_pl.model.lora import LoraConfig, set_trainable

FOLDER = Path(__file__).parents[2] / "benchmarks"
ITEMS = [Item("red apple on a table", tiny.picture(1)), Item("a car")]


@pytest.fixture(scope="module", autouse=True)
def importable():
    sys.path.insert(0, str(FOLDER))
    yield
    sys.path.remove(str(FOLDER))


def made(family: str):
    model = tiny.embedder(config=tiny.CONFIGS[family], layout="both")
    model.backbone.set_attn_implementation("eager")
    set_trainable(model.backbone, model.processing.family, LoraConfig(r=4, dropout=0.0), False)
    checkpoint_activations(model.backbone)
    return model.train(), model.processor()(ITEMS, "candidate")


@pytest.mark.parametrize("family", ["qwen2_5_vl", "mllama", "paligemma"])
def test_operations_and_bytes_are_those_of_the_model_with_weights(family):
    import _weightless

    model, inputs = made(family)
    with FlopCounterMode(display=False) as counter:
        model(inputs, "candidate").sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    ledger = _weightless.Ledger([*model.parameters(), *model.buffers(), *gradients])
    with ledger:
        ledger.add(list(inputs.values()))
        total = model(inputs, "candidate").sum()
        kept = ledger.num_bytes
        total.backward()
    _weightless.without_weights(model)
    found = _weightless.count(model, [(inputs, "candidate")], autocast=False)
    assert found.flops == counter.get_total_flops()
    assert sum(found.kept.values()) == pytest.approx(kept, rel=0.02)
    assert sum(found.peak.values()) == pytest.approx(sum(ledger.peak.values()), rel=0.02)


def test_operations_at_other_shapes_follow_from_those_that_were_counted():
    from real_shapes import Cost, Work

    def true(work):  # a tower, tokens, and their pairs
        return 7 * work.tokens + 5 * work.patches, 3 * work.pairs + 2 * work.patch_pairs

    works = [Work(10, 100), Work(20, 200, 16, 256)]
    cost = Cost([(work, *true(work)) for work in works])
    other = Work(31, 500, 40, 900)
    assert cost(other) == pytest.approx(sum(true(other)))


@pytest.mark.slow
def test_a_recipe_is_counted_and_check_is_right():
    """Reads no weights; some 40 s of one core."""
    import real_shapes

    found = real_shapes.main(["--recipes", "paligemma3b"])["paligemma3b"]
    assert abs(found["fit_error"]) < 0.01
    assert found["ratio"] >= 1
    assert 0 < found["worst_real"] <= found["real"] <= 1
    counted, told = found["memory"]["counted"], found["memory"]["check"]
    for part in ("weights", "activations"):
        assert told[part] == pytest.approx(counted[part], rel=0.1), part
