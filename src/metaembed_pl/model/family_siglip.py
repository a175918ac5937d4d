"""PaliGemma and Gemma 3: a SigLIP tower that sees every picture at one size.

Shape letters: B rows, L tokens, N images.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

PALIGEMMA_TOKENS = (
    ("<pad>", None),
    ("<eos>", None),
    ("<bos>", None),
    ("<image>", "image_token_index"),
)
GEMMA3_TOKENS = (
    ("<pad>", None),
    ("<eos>", None),
    ("<bos>", None),
    ("<start_of_turn>", None),
    ("<end_of_turn>", None),
    ("<start_of_image>", "boi_token_index"),
    ("<end_of_image>", "eoi_token_index"),
    ("<image_soft_token>", "image_token_index"),
)


def paligemma_text(image_processor: Any, images: Mapping[str, Any]) -> list[str]:
    """`<image>` for every patch."""
    return ["<image>" * image_processor.image_seq_length] * len(images["pixel_values"])


def gemma3_text(image_processor: Any, images: Mapping[str, Any]) -> list[str]:
    """`<image_soft_token>` for every pooled patch, between the image's own marks."""
    soft = "<image_soft_token>" * image_processor.image_seq_length
    return [f"\n\n<start_of_image>{soft}<end_of_image>\n\n"] * len(images["pixel_values"])


def paligemma_image_processor(config: Mapping[str, Any]) -> SiglipImageProcessorPil:
    """The image processor of a model made from scratch."""
    return SiglipImageProcessorPil(size=_square(config))


def gemma3_image_processor(config: Mapping[str, Any]) -> Gemma3ImageProcessorPil:
    """The image processor of a model made from scratch."""
    return Gemma3ImageProcessorPil(size=_square(config))


def _square(config: Mapping[str, Any]) -> dict[str, int]:
    side = config.get("vision_config", {}).get("image_size", 224)
    return {"height": side, "width": side}


def paligemma_length(config: Mapping[str, Any]) -> int:
    """Tokens of an image: its patches."""
    vision = config.get("vision_config", {})
    return (vision.get("image_size", 224) // vision.get("patch_size", 14)) ** 2


def gemma3_length(config: Mapping[str, Any]) -> int:
    """Tokens of an image: what the projector pools its patches into."""
    return config.get("mm_tokens_per_image", 256)


def paligemma_inputs(
    batch: Mapping[str, Tensor], images: Mapping[str, Any], rows: Int[Tensor, " N"], image_id: int
) -> dict[str, Tensor]:
    """Type 0 for the input, which sees itself in both directions, 1 for the causal meta tokens."""
    types = torch.zeros_like(batch["input_ids"]).scatter(1, batch["slot_index"], 1)
    return {"token_type_ids": types, **images}


def gemma3_inputs(
    batch: Mapping[str, Tensor], images: Mapping[str, Any], rows: Int[Tensor, " N"], image_id: int
) -> dict[str, Tensor]:
    """Type 1 for the tokens of an image, which see each other in both directions."""
    inputs = {"token_type_ids": (batch["input_ids"] == image_id).long()}
    return inputs | ({"pixel_values": images["pixel_values"]} if images else {})
