"""transformers' computations with fewer or faster kernel calls.

`packed`: vision towers of the Qwen family put the patches of all images of a batch one after the
other. Without flash attention, transformers calls the kernel once an image (or window) and layer:
thousands of small calls a batch. Chunks of equal length can share one call, with the same result.

`sdpa_fp32`: attention with scores and softmax in fp32 inside a model that otherwise runs in bf16.
torch's CPU kernel takes 8 times as long for the backward pass in bf16 as in fp32 (docs/log.md).
Short sequences use plain matrix products, which are faster than torch's fused CPU kernel; so does
`packed` on the CPU.

`look_up_grids`: these vision towers compute positions and windows of patches image by image, in
some forty small calls each; a dictionary caches the results by image size.

`PatchProjection`: the patch embedding is a convolution whose stride is its kernel, that is, one
matrix product; as a convolution its backward pass alone was a tenth of a training step on a CPU.

Shape letters: S patches of all images, H heads, E width of a head, n chunks of one length L, M
tokens that they attend to, s patches of an image, t tokens of it, w its windows.
"""

from contextlib import nullcontext
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import sdpa_mask
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from metaembed_pl.model.family import Family

FP32 = "sdpa_fp32"
# transformers hands cumulative lengths only to implementations with "flash" in their name.
PACKED = "packed_sdpa_in_place_of_flash"
PACKED_FP32 = "packed_sdpa_fp32_in_place_of_flash"
SHORT = 64
"""Tokens; at 36 plain products took half the time on a CPU, at 256 half as much again."""


def _attend(
    query: Float[Tensor, "n H L E"],
    key: Float[Tensor, "n H M E"],
    value: Float[Tensor, "n H M E"],
    scale: float | None,
    dropout: float,
    **given: Any,
) -> Float[Tensor, "n H L E"]:
    # Plain products take less time than torch's fused kernel for short sequences on a CPU.
    is_short = query.device.type == "cpu" and query.shape[2] <= SHORT
    with sdpa_kernel(SDPBackend.MATH) if is_short else nullcontext():
        return scaled_dot_product_attention(
            query, key, value, scale=scale, dropout_p=dropout, **given
        )


def _attend_in_fp32(
    query: Float[Tensor, "n H L E"],
    key: Float[Tensor, "n H M E"],
    value: Float[Tensor, "n H M E"],
    scale: float | None,
    dropout: float,
    **given: Any,
) -> Float[Tensor, "n H L E"]:
    """Scores and softmax in fp32, whatever the inputs are."""
    inputs = query.float(), key.float(), value.float()
    with torch.autocast(query.device.type, enabled=False):
        return _attend(*inputs, scale, dropout, **given).to(query.dtype)


def attention_in_fp32(
    module: nn.Module,
    query: Float[Tensor, "n H L E"],
    key: Float[Tensor, "n K M E"],
    value: Float[Tensor, "n K M E"],
    attention_mask: Shaped[Tensor, "n 1 L M"] | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "n L H E"], None]:
    """The language model's attention, as `sdpa_attention_forward` but in fp32."""
    repeats = query.shape[1] // key.shape[1]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    output = _attend_in_fp32(
        query,
        repeat_kv(key, repeats),
        repeat_kv(value, repeats),
        scaling,
        dropout,
        attn_mask=attention_mask,
        is_causal=is_causal and attention_mask is None and query.shape[2] > 1,
    )
    return output.transpose(1, 2).contiguous(), None


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
    attend: Any = _attend,
    **_: Any,
) -> tuple[Float[Tensor, "1 S H E"], None]:
    """Each chunk attends to itself; chunks are given by their cumulative lengths.

    Source: the signature of transformers' `AttentionInterface`.
    """

    def joined_heads(*chunks: Float[Tensor, "n H L E"]) -> Float[Tensor, "n*L H E"]:
        return attend(*chunks, scaling, dropout).transpose(1, 2).flatten(0, 1)

    groups = _by_length(cu_seq_lens_q)
    if len(groups) == 1:
        length = groups[0].length
        chunks = (_chunks(tensor[0], length) for tensor in (query, key, value))
        return joined_heads(*chunks)[None], None
    parts = []
    for group in groups:
        chosen = (tensor[0].index_select(1, group.places) for tensor in (query, key, value))
        parts.append(joined_heads(*(_chunks(tensor, group.length) for tensor in chosen)))
    joined, places = torch.cat(parts), torch.cat([group.places for group in groups])
    return torch.empty_like(joined).index_copy(0, places, joined)[None], None


class _SameLength(NamedTuple):
    """Chunks of one length, and the indices of their patches."""

    length: int
    places: Int[Tensor, " p"]


def _by_length(ends: Any) -> list[_SameLength]:
    """Chunks by length, from cumulative lengths; computed once, because it waits for the GPU.

    The result is stored on the tensor, which all layers of a forward pass share.
    """
    if not hasattr(ends, "by_length"):
        on_cpu = ends.cpu()
        lengths, starts = on_cpu.diff(), on_cpu[:-1]
        groups = []
        for length in lengths.unique().tolist():
            places = starts[lengths == length][:, None] + torch.arange(length)
            groups.append(_SameLength(length, places.flatten().to(ends.device)))
        ends.by_length = groups
    return ends.by_length


def _chunks(tensor: Float[Tensor, "H S E"], length: int) -> Float[Tensor, "n H L E"]:
    return tensor.unflatten(1, (-1, length)).transpose(0, 1)


class PatchProjection(nn.Conv3d):
    """A patch embedding as the matrix product it is. Takes over a `Conv3d` and its weights."""

    def forward(self, patches: Float[Tensor, "S C T P P"]) -> Float[Tensor, "S H 1 1 1"]:
        """Each patch is exactly one kernel's size, as transformers' vision towers cut them."""
        projected = nn.functional.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return projected[:, :, None, None, None]


_ZERO = torch.zeros(1, dtype=torch.int32)


class Places(NamedTuple):
    """Values that depend only on the size of an image.

    Args:
        positions: row and column of each patch.
        order: of its tokens, window by window; empty without windows.
        ends: of its windows, in patches; likewise.
    """

    positions: Int[Tensor, "s 2"]
    order: Int[Tensor, " t"]
    ends: Int[Tensor, " w"]


@lru_cache(maxsize=1024)
def _places(
    grid: tuple[int, int, int], merge_size: int, window_size: int | None, patch_size: int
) -> Places:
    # Tensors that are made in inference mode cannot be used in training later.
    with torch.inference_mode(False):
        one = torch.tensor([grid])
        positions = get_vision_position_ids(one, merge_size)
        if window_size is None:
            return Places(positions, torch.empty(0), torch.empty(0))
        order, ends = get_vision_window_index(one, merge_size, window_size, patch_size)
        return Places(positions, order, ends[1:])


def _with_places(visual: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """Adds what a vision tower's forward would compute itself, under the same names."""
    config, window_size = visual.config, getattr(visual.config, "window_size", None)
    positions, orders, ends, images = [], [], [_ZERO], [_ZERO]
    num_tokens = num_patches = 0
    for grid in given["grid_thw"].tolist():
        of = _places(tuple(grid), config.spatial_merge_size, window_size, config.patch_size)
        positions.append(of.positions)
        orders.append(of.order + num_tokens)
        ends.append(of.ends + num_patches)
        num_tokens += len(of.order)
        frames = torch.arange(1, grid[0] + 1, dtype=torch.int32) * (grid[1] * grid[2])
        images.append(frames + num_patches)
        num_patches += len(of.positions)
    found = {"position_ids": positions, "cu_seqlens": images}
    if window_size is not None:
        found |= {"window_index": orders, "cu_window_seqlens": ends}
    device = given["grid_thw"].device
    return args, {name: _moved(torch.cat(parts), device) for name, parts in found.items()} | given


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    """Moves a tensor; chunks are found before, because that would wait for the GPU later."""
    moved: Any = tensor.to(device, non_blocking=True)
    if tensor.dtype == torch.int32 and moved is not tensor:
        moved.by_length = [
            _SameLength(group.length, group.places.to(device, non_blocking=True))
            for group in _by_length(tensor)
        ]
    return moved


def look_up_grids(model: PreTrainedModel, family: Family) -> None:
    """Makes a vision tower that packs images look up values that depend only on their sizes."""
    if family.packs_images:
        visual: Any = model.visual
        visual.register_forward_pre_hook(_with_places, with_kwargs=True)


def project_patches(model: PreTrainedModel, family: Family) -> None:
    """Makes a vision tower that packs images embed patches with `PatchProjection`."""
    if family.packs_images:
        visual: Any = model.visual
        visual.patch_embed.proj.__class__ = PatchProjection


def set_attention(model: PreTrainedModel, name: str, family: Family) -> None:
    """Sets the attention of a model that was built with `sdpa`.

    Args:
        model: a transformers base model.
        name: `sdpa` or `sdpa_fp32`.
        family: of the model.
    """
    if name == FP32:
        model.set_attn_implementation(FP32)
    if family.packs_images:
        visual: Any = model.visual
        visual.config._attn_implementation = PACKED_FP32 if name == FP32 else PACKED


AttentionInterface.register(PACKED, packed_attention)
AttentionInterface.register(PACKED_FP32, partial(packed_attention, attend=_attend_in_fp32))
AttentionInterface.register(FP32, attention_in_fp32)
AttentionMaskInterface.register(FP32, sdpa_mask)
