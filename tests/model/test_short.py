"""The parts with a backward pass of their own, against autograd's way through the library."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

import tiny
from metaembed_pl.model.kernels import FP32, set_attention
from metaembed_pl.model.short import ShortRMSNorm, attend_shortly


def gradients_of(output, weights, *inputs):
    return torch.autograd.grad((output * weights).sum(), inputs)


@pytest.mark.parametrize("how", ["all", "causal", "masked"])
def test_short_attention_equals_torchs(how):
    torch.manual_seed(0)
    query, key, value = (torch.randn(3, 2, 7, 4, requires_grad=True) for _ in range(3))
    mask = (torch.rand(3, 1, 7, 7) < 0.5) | torch.eye(7).bool() if how == "masked" else None
    given = {"attn_mask": mask, "is_causal": how == "causal"}
    found = attend_shortly(query, key, value, 0.3, **given)
    expected = scaled_dot_product_attention(query, key, value, scale=0.3, **given)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(found)
    for ours, theirs in zip(
        gradients_of(found, weights, query, key, value),
        gradients_of(expected, weights, query, key, value),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)


def test_a_row_that_may_see_nothing_stays_finite():
    query = torch.randn(1, 1, 3, 4, requires_grad=True)
    mask = torch.tensor([[[[True, False, False], [True, True, False], [False] * 3]]])
    found = attend_shortly(query, query, query, None, attn_mask=mask)
    (gradient,) = gradients_of(found, torch.ones_like(found), query)
    assert found.isfinite().all()
    assert gradient.isfinite().all()


def test_a_short_norm_equals_the_librarys():
    torch.manual_seed(0)
    norm = Qwen2RMSNorm(8, eps=1e-6)
    torch.nn.init.uniform_(norm.weight, 0.5, 2.0)
    hidden = torch.randn(5, 3, 8, requires_grad=True)
    expected, weights = norm(hidden), torch.randn(5, 3, 8)
    of_theirs = gradients_of(expected, weights, hidden, norm.weight)
    norm.__class__ = ShortRMSNorm
    found = norm(hidden)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    of_ours = gradients_of(found, weights, hidden, norm.weight)
    for ours, theirs in zip(of_ours, of_theirs, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * theirs.abs().max().item(), rtol=0)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_whole_batch_has_the_gradient_of_the_plain_form(family):
    items = [
        {"text": "red apple"},
        {"image": tiny.picture(1)},
        {"text": "a", "image": tiny.picture(2)},
    ]
    found = []
    for is_short in (False, True):
        model = tiny.embedder(config=tiny.CONFIGS[family]).train()
        if is_short:
            set_attention(model.backbone, FP32, model.processing.family)
            assert any(isinstance(part, ShortRMSNorm) for part in model.modules())
        batch = model.processor()([tiny.Item.parse(item) for item in items], "candidate")
        model(batch, "candidate")[:, :, 0].sum().backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    plain, short = found
    assert plain.keys() == short.keys()
    largest = max(gradient.abs().max() for gradient in plain.values())
    for name, gradient in plain.items():
        assert (short[name] - gradient).abs().max() <= 1e-5 * largest, name


def test_under_autocast_the_products_are_in_bf16_and_the_vectors_near():
    model = tiny.embedder()
    before = model.encode_candidate(["red apple", {"image": tiny.picture(1)}])
    set_attention(model.backbone, FP32, model.processing.family)
    seen = []
    layer = model.backbone.language_model.layers[0]
    layer.input_layernorm.register_forward_hook(lambda *given: seen.append(given[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        after = model.encode_candidate(["red apple", {"image": tiny.picture(1)}])
    assert seen == [torch.bfloat16]
    assert torch.nn.functional.cosine_similarity(after, before, dim=-1).min() > 0.995


def test_under_autocast_what_is_promised_in_fp32_is_rounded_once():
    torch.manual_seed(0)
    norm, hidden = Qwen2RMSNorm(64), torch.randn(50, 64)
    query, key, value = (torch.randn(3, 2, 7, 8) for _ in range(3))
    normal = norm(hidden).bfloat16()
    attended = scaled_dot_product_attention(query, key, value).bfloat16()
    norm.__class__ = ShortRMSNorm
    with torch.autocast("cpu", torch.bfloat16):
        short_normal, short_attended = norm(hidden), attend_shortly(query, key, value, None)
    # Sums in another order: a few numbers lie on the edge between two roundings.
    assert (short_normal == normal).float().mean() > 0.99
    assert (short_attended == attended).float().mean() > 0.99
