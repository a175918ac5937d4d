"""Backbone families: what differs between vision-language models, as rows of data.

Everything the rest of the code must know about Qwen2.5-VL or its peers stands here: how an image
appears in the token sequence, which inputs the model wants, which layers LoRA adapts. Adding a
family means adding a row to `FAMILIES`.
"""

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metaembed_pl.errors import UserError

LANGUAGE_LAYERS = (
    r".*(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    Args:
        model_type: the `model_type` of its transformers config.
        image_tokens: from (tokenizer, image processor, its output) to one list of token ids an
            image.
        image_processor: from (vision config, min pixels, max pixels) to the image processor of a
            model made from scratch.
        lora_targets: regular expression over module names that LoRA adapts.
        token_types: name of the tensor that marks image tokens with 1, or None where there is none.
        special_tokens: what a tokenizer trained from scratch must have, with the config's name of
            each (None: the config does not name it). The first one pads.
        packs_images: its vision tower runs over the patches of all images as one sequence.
    """

    model_type: str
    image_tokens: Callable[[Any, Any, Any], list[list[int]]]
    image_processor: Callable[[dict[str, Any], int | None, int | None], Any]
    lora_targets: str = LANGUAGE_LAYERS
    token_types: str | None = None
    special_tokens: tuple[tuple[str, str | None], ...] = ()
    packs_images: bool = False


def _qwen_image_tokens(tokenizer: Any, image_processor: Any, images: Any) -> list[list[int]]:
    """`<|vision_start|>`, `<|image_pad|>` for every merged square of patches, `<|vision_end|>`."""
    start, pad, end = tokenizer.convert_tokens_to_ids(
        ["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]
    )
    counts = images["image_grid_thw"].prod(dim=1) // image_processor.merge_size**2
    return [[start, *[pad] * count, end] for count in counts.tolist()]


def _qwen_image_processor(
    vision: dict[str, Any], min_pixels: int | None, max_pixels: int | None
) -> Qwen2VLImageProcessorPil:
    patch, merge = vision.get("patch_size", 14), vision.get("spatial_merge_size", 2)
    smallest = (patch * merge) ** 2
    return Qwen2VLImageProcessorPil(
        patch_size=patch,
        merge_size=merge,
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        size={
            "shortest_edge": min_pixels or smallest,
            "longest_edge": max_pixels or 1280 * smallest,
        },
    )


_QWEN_TOKENS = (
    ("<|endoftext|>", None),
    ("<|im_start|>", None),
    ("<|im_end|>", None),
    ("<|vision_start|>", "vision_start_token_id"),
    ("<|vision_end|>", "vision_end_token_id"),
    ("<|image_pad|>", "image_token_id"),
    ("<|video_pad|>", "video_token_id"),
)

FAMILIES = {
    family.model_type: family
    for family in (
        Family(
            "qwen2_5_vl",
            image_tokens=_qwen_image_tokens,
            image_processor=_qwen_image_processor,
            token_types="mm_token_type_ids",
            special_tokens=_QWEN_TOKENS,
            packs_images=True,
        ),
    )
}


def family_of(model_type: str) -> Family:
    """The family of a transformers config's `model_type`.

    Raises:
        UserError: the family is not supported; the message names those that are.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    near = difflib.get_close_matches(model_type, FAMILIES, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(
        f"backbone family {model_type!r} is not supported; supported: {', '.join(FAMILIES)}{hint}"
    )
