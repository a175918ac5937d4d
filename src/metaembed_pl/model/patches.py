"""Attention maps: attention from the slot of each meta embedding to the image's tokens.

R: meta embeddings of a side    L: length of the row    H, W: image tokens down and across
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.data.collate import Side
from metaembed_pl.item import Item

if TYPE_CHECKING:
    from metaembed_pl.model.embedder import MetaEmbedder


def patch_attention(model: "MetaEmbedder", item: Item, side: Side) -> Float[Tensor, "R H W"] | None:
    """The attention of each meta embedding of an item to each patch of its picture.

    The mean over all layers and heads of the language model, from its slot to the image's tokens.
    Information that reaches the slot through other tokens is not included.

    Args:
        model: in eval mode.
        item: with or without an image.
        side: whose meta embeddings.

    Returns:
        Shares of the slot's attention. If a picture is cut into tiles (Idefics3, SmolVLM): those of
        the full picture that follows them. None without a picture, or if its tokens are not in the
        row (mllama, which has cross-attention to pictures).
    """
    if model.pooling != "meta_tokens":
        return None
    batch = model.processor()([item], side)
    image_id = model.processing.tokenizer.convert_tokens_to_ids(model.processing.family.image_token)
    places = (batch["input_ids"][0] == image_id).nonzero().flatten()
    num_full = getattr(model.processing.image_processor, "image_seq_length", None)
    places = places[-num_full:] if num_full else places
    grid = _grid(batch, len(places), model.processing.image_processor)
    if grid is None:
        return None
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    slots = batch["slot_index"][0]
    if side == "candidate":
        slots = slots[-model.meta_tokens.num_candidate :]
    seen: list[Tensor] = []
    with torch.inference_mode(), _attention_kept(model, seen):
        model(batch, side)
    # Of each layer: heads, then from a slot to an image token.
    layers = [weights[0].float().mean(dim=0)[slots][:, places.to(slots.device)] for weights in seen]
    if not layers:
        return None
    return torch.stack(layers).mean(dim=0).view(-1, *grid).cpu()


def _grid(
    batch: dict[str, Tensor], num_tokens: int, image_processor: Any
) -> tuple[int, int] | None:
    """Image tokens down and across."""
    if "image_grid_thw" in batch:
        _, height, width = (batch["image_grid_thw"][0]).tolist()
        merged = image_processor.merge_size
        grid = height // merged, width // merged
    else:
        grid = math.isqrt(num_tokens), math.isqrt(num_tokens)
    return grid if num_tokens > 1 and grid[0] * grid[1] == num_tokens else None


@contextmanager
def _attention_kept(model: "MetaEmbedder", seen: list[Tensor]) -> Iterator[None]:
    """While open, every layer of the language model adds its attention weights to `seen`."""
    text: Any = model.backbone.get_submodule(model.processing.family.text_module)
    used = text.config._attn_implementation

    def keep(_module: Any, _args: Any, output: Any) -> None:
        if isinstance(output, tuple) and len(output) > 1 and output[1] is not None:
            seen.append(output[1])

    # Only the plain implementation has the weights; the fast ones never form them.
    model.backbone.set_attn_implementation({"": used, "text_config": "eager"})
    layers = [part for name, part in text.named_modules() if name.endswith("self_attn")]
    handles = [layer.register_forward_hook(keep) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        model.backbone.set_attn_implementation({"": used, "text_config": used})
