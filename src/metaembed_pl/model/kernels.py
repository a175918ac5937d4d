"""The same computations as transformers', done with fewer or faster kernel calls.

`packed`: vision towers of the Qwen family put the patches of all images of a batch one after the
other. Without flash attention, transformers calls the kernel once an image (or window) and layer:
thousands of small calls a batch. Chunks of equal length can share one call, with the same result.

`sdpa_fp32`: attention in fp32 inside a model that otherwise runs in bf16. torch's CPU kernel takes
8 times as long for the backward pass in bf16 as in fp32 (docs/log.md).

`PatchProjection`: the patch embedding is a convolution whose stride is its kernel, that is, one
matrix product; as a convolution its backward pass alone was a tenth of a training step on a CPU.

Shape letters: S patches of all images, H heads, E width of a head, n chunks of one length L.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from metaembed_pl.model.family import Family

FP32 = "sdpa_fp32"
# transformers hands cumulative lengths only to implementations with "flash" in their name.
PACKED = "packed_sdpa_in_place_of_flash"
PACKED_FP32 = "packed_sdpa_fp32_in_place_of_flash"


def packed_attention(
    module: nn.Module,
    query: Float[Tensor, "1 H S E"],
    key: Float[Tensor, "1 H S E"],
    value: Float[Tensor, "1 H S E"],
    attention_mask: None = None,
    *,
    cu_seq_lens_q: Int[Tensor, " ends"],
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "1 S H E"], None]:
    """Each chunk attends to itself; chunks are given by their cumulative lengths.

    Source: the signature of transformers' `AttentionInterface`.
    """
    lengths = cu_seq_lens_q.diff()
    parts, places = [], []
    for length in lengths.unique().tolist():
        starts = cu_seq_lens_q[:-1][lengths == length]
        place = (starts[:, None] + torch.arange(length, device=starts.device)).flatten()
        chunks = (
            tensor[0].index_select(1, place).unflatten(1, (-1, length)).transpose(0, 1)
            for tensor in (query, key, value)
        )
        output = scaled_dot_product_attention(*chunks, scale=scaling, dropout_p=dropout)
        parts.append(output.transpose(1, 2).flatten(0, 1))
        places.append(place)
    joined = torch.cat(parts)
    return torch.empty_like(joined).index_copy(0, torch.cat(places), joined)[None], None


def _in_fp32(attention: Any) -> Any:
    def run(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.float()
        inputs = query.float(), key.float(), value.float(), attention_mask
        with torch.autocast(query.device.type, enabled=False):
            output, _ = attention(module, *inputs, **kwargs)
        return output.to(query.dtype), None

    return run


class PatchProjection(nn.Conv3d):
    """A patch embedding as the matrix product it is. Takes over a `Conv3d` and its weights."""

    def forward(self, patches: Float[Tensor, "S C T P P"]) -> Float[Tensor, "S H 1 1 1"]:
        """Each patch is exactly one kernel's size, as transformers' vision towers cut them."""
        projected = nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return projected[:, :, None, None, None]


def use_fast_kernels(model: PreTrainedModel, attention: str, family: Family) -> None:
    """Swaps in what this file has, for a model built with `sdpa`; weights and names stay."""
    set_attention(model, attention, family)
    if family.packs_images:
        visual: Any = model.visual
        visual.patch_embed.proj.__class__ = PatchProjection


def set_attention(model: PreTrainedModel, name: str, family: Family) -> None:
    """Sets the attention of a model that was built with `sdpa`.

    Args:
        model: a transformers base model.
        name: `sdpa` or `sdpa_fp32`.
        family: says whether its vision tower packs the images of a batch into one sequence.
    """
    if name == FP32:
        model.set_attn_implementation(FP32)
    if family.packs_images:
        visual: Any = model.visual
        visual.config._attn_implementation = PACKED_FP32 if name == FP32 else PACKED


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(PACKED_FP32, _in_fp32(packed_attention))
AttentionInterface.register(FP32, _in_fp32(sdpa_attention_forward))
AttentionMaskInterface.register(FP32, sdpa_mask)
