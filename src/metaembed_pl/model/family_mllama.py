"""Llama-3.2-Vision (mllama): the text attends to pictures through cross-attention layers.

transformers requires a picture for every row if one row has one, runs its vision tower over the
dummy ones, and skips the cross-attention layers if there are no pictures. Here the tower runs only
on real pictures, and rows without one attend to zeros. Through layers without biases these add
exactly nothing, so a text has the same embeddings in either kind of batch.

Tokens before `<|image|>` look at all tiles evenly, as in transformers (its issue 39379).

Shape letters: B rows, L tokens, N images, T tiles of an image, P patches of a tile.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaModel,
)

from metaembed_pl.model import vision

SPECIAL_TOKENS = (
    ("<|finetune_right_pad_id|>", None),
    ("<|begin_of_text|>", None),
    ("<|start_header_id|>", None),
    ("<|end_header_id|>", None),
    ("<|eot_id|>", None),
    ("<|image|>", "image_token_index"),
)
PICTURES = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


def image_text(image_processor: Any, images: Mapping[str, Any]) -> list[str]:
    """One token, whatever the image's size: it only says where the image comes."""
    return ["<|image|>"] * len(images["pixel_values"])


def image_processor(config: Mapping[str, Any]) -> MllamaImageProcessorPil:
    """The image processor of a model made from scratch."""
    vision = config.get("vision_config", {})
    side = vision.get("image_size", 448)
    return MllamaImageProcessorPil(
        size={"height": side, "width": side}, max_image_tiles=vision.get("max_num_tiles", 4)
    )


def model_inputs(
    batch: Mapping[str, Tensor], images: Mapping[str, Any], rows: Int[Tensor, " N"], image_id: int
) -> dict[str, Tensor]:
    """The pictures, whose they are, and who sees them: `<|image|>` and all that follows it.

    The meta tokens stand last, so they see the full picture.
    """
    if not images:
        return {}
    ids = batch["input_ids"]
    sees = (ids[rows] == image_id).cumsum(dim=1) > 0
    tiles = images["aspect_ratio_mask"]
    mask = torch.zeros(*ids.shape, *tiles.shape[1:], dtype=torch.long)
    mask[rows] = sees[:, :, None, None] * tiles[:, None]
    pictures = {name: images[name] for name in PICTURES}
    return pictures | {"cross_attention_mask": mask, "image_rows": rows}


def see(backbone: nn.Module, pictures: Mapping[str, Tensor]) -> vision.Seen:
    """The states that the text attends to: (N, T * P, hidden width)."""
    model = _base(backbone)
    seen = model.vision_model(**pictures).last_hidden_state
    return {"states": model.multi_modal_projector(seen).flatten(1, 3)}


@contextmanager
def shown(backbone: nn.Module, inputs: vision.Inputs, seen: vision.Seen) -> Iterator[vision.Inputs]:
    """Gives each row the states of its picture to look at, or zeros where it has none."""
    inputs, states = dict(inputs), seen["states"]
    of_all = states.new_zeros(len(inputs["input_ids"]), *states.shape[1:])
    of_all = of_all.index_copy(0, inputs.pop("image_rows"), states)
    yield inputs | {"cross_attention_states": of_all}


@contextmanager
def in_step(
    backbone: nn.Module, inputs: vision.Inputs, unused: vision.Seen
) -> Iterator[vision.Inputs]:
    """While open, the cross-attention layers run on a single token, and change nothing.

    Without pictures, transformers skips them. With ZeRO-3, gradients must also flow to the same
    modules as on other ranks: back to the tower, if it was run.
    """
    text = _base(backbone).language_model
    layers: list[Any] = [m for m in text.layers if isinstance(m, MllamaCrossAttentionDecoderLayer)]
    for layer in layers:
        layer.forward = partial(_changing_nothing, layer.forward)
    size, device = (1, 1, text.config.hidden_size), inputs["input_ids"].device
    try:
        if unused:
            states = unused["states"][:1, :1]
        else:
            states = torch.zeros(size, dtype=text.dtype, device=device)
        yield inputs | {"cross_attention_states": states}
    finally:
        for layer in layers:
            del layer.forward


def _changing_nothing(forward: Any, states: Tensor, **given: Any) -> Tensor:
    given |= {"attention_mask": None, "position_ids": None, "position_embeddings": None}
    return states + 0 * forward(states[:1, :1], **given)


def _base(backbone: nn.Module) -> Any:
    return next(module for module in backbone.modules() if isinstance(module, MllamaModel))
