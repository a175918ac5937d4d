"""Parts of a language model and of a vision tower in fewer passes, for short sequences on a CPU.

A tiny model's activations fit a processor's cache, and its matrix products take bf16: what remains
of a step are dozens of passes of elementwise arithmetic. Here the two parts with most of them have
a backward pass of their own, equal to autograd's.

Shape letters: n rows, H heads, L tokens that attend, M that are attended to, E width of a head, D
hidden width.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

BEFORE_LINEAR = ("input_layernorm", "post_attention_layernorm", "norm1", "norm2", "ln_q")
"""Names of norms in layers of the Llama and Qwen families; what they give goes to linear layers."""


class ShortAttention(torch.autograd.Function):
    """Attention whose scores and softmax are fp32; the other products are in `dtype`.

    As flash attention does it on a GPU; the scores of all tokens are kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "n H L E"],
        key: Float[Tensor, "n H M E"],
        value: Float[Tensor, "n H M E"],
        bias: Tensor | None,
        scale: float,
        dtype: torch.dtype,
    ) -> Float[Tensor, "n H L E"]:
        """The attended values, in `dtype`."""
        scores = (query.float() @ key.float().mT).mul_(scale)
        if bias is not None:
            scores.add_(bias)
        weights, value = scores.softmax(dim=-1).to(dtype), value.to(dtype)
        ctx.save_for_backward(query.to(dtype), key.to(dtype), value, weights)
        ctx.scale = scale
        return weights @ value

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Those of query, key and value."""
        query, key, value, weights = ctx.saved_tensors
        of_output = gradients[0].to(value.dtype)
        of_weights = of_output @ value.mT
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_scores = of_scores.mul_(ctx.scale)
        return of_scores @ key, of_scores.mT @ query, weights.mT @ of_output, None, None, None


class RootMeanSquare(torch.autograd.Function):
    """Each row divided by its root mean square, times the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Float[Tensor, "... D"],
        weight: Float[Tensor, " D"],
        eps: float,
        dtype: torch.dtype,
    ) -> Float[Tensor, "... D"]:
        """In `dtype`."""
        hidden = hidden.float()
        # Not `vecdot`: it is a matrix product, which autocast computes in bf16.
        factor = (hidden.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
        normal = hidden * factor
        ctx.save_for_backward(normal, factor, weight)
        return (normal * weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Those of the rows and of the weights."""
        normal, factor, weight = ctx.saved_tensors
        along = gradients[0] * normal
        of_weight = along.flatten(0, -2).sum(dim=0)
        mean = (along @ weight)[..., None] / -normal.shape[-1]
        of_hidden = torch.addcmul(gradients[0] * weight, normal, mean).mul_(factor)
        return of_hidden, of_weight, None, None


class ShortRMSNorm(nn.Module):
    """Takes over a norm of transformers, with its weights."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        """In the dtype that the next layer would cast it to."""
        return RootMeanSquare.apply(hidden, self.weight, self.variance_epsilon, lower(hidden))  # pyright: ignore[reportReturnType]


def attend_shortly(
    query: Float[Tensor, "n H L E"],
    key: Float[Tensor, "n H M E"],
    value: Float[Tensor, "n H M E"],
    scale: float | None,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "n H L E"]:
    """What `scaled_dot_product_attention` gives, in the dtype that the next layer would cast to."""
    if is_causal:
        attn_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        # Finite: a row of padding may see nothing at all.
        least = torch.finfo(torch.float32).min
        attn_mask = torch.zeros(attn_mask.shape).masked_fill_(~attn_mask, least)
    # In fp32 throughout, as `sdpa_fp32` promises.
    with torch.autocast(query.device.type, enabled=False):
        found: Any = ShortAttention.apply(
            query, key, value, attn_mask, scale or query.shape[-1] ** -0.5, torch.float32
        )
    return found.to(lower(query))


def lower(tensor: Tensor) -> torch.dtype:
    """What autocast computes matrix products in; where it is off, the tensor's own."""
    if torch.is_autocast_enabled(tensor.device.type):
        return torch.get_autocast_dtype(tensor.device.type)
    return tensor.dtype


def shorten_norms(model: nn.Module) -> None:
    """Lets the norms before a model's linear layers take `ShortRMSNorm`'s way.

    Not those that end a tower: what they give is not cast.
    """
    for layer in model.modules():
        for name in BEFORE_LINEAR:
            norm = getattr(layer, name, None)
            if isinstance(norm, nn.Module) and hasattr(norm, "variance_epsilon"):
                norm.__class__ = ShortRMSNorm
