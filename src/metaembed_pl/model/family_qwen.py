"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: pictures of any size, the patches of all in one long sequence.

Shape letters: B rows, L tokens, N images.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from metaembed_pl.errors import UserError
from metaembed_pl.model import vision
from metaembed_pl.model.image_processors import Qwen2VLImageProcessorPil

SPECIAL_TOKENS = (
    ("<|endoftext|>", None),
    ("<|im_start|>", None),
    ("<|im_end|>", None),
    ("<|vision_start|>", "vision_start_token_id"),
    ("<|vision_end|>", "vision_end_token_id"),
    ("<|image_pad|>", "image_token_id"),
    ("<|video_pad|>", "video_token_id"),
)


def image_text(image_processor: Any, images: Mapping[str, Any]) -> list[str]:
    """`<|vision_start|>`, `<|image_pad|>` for every merged square of patches, `<|vision_end|>`."""
    counts = images["image_grid_thw"].prod(dim=1) // image_processor.merge_size**2
    return [f"<|vision_start|>{'<|image_pad|>' * count}<|vision_end|>" for count in counts.tolist()]


def image_processor(config: Mapping[str, Any], **settings: Any) -> Qwen2VLImageProcessorPil:
    """The image processor of a model made from scratch; `settings` are those of its family."""
    vision = config.get("vision_config", {})
    shape: dict[str, Any] = {"patch_size": 14, "temporal_patch_size": 2, **settings}
    shape |= {
        name: vision[name] for name in ("patch_size", "temporal_patch_size") if name in vision
    }
    merge = vision.get("spatial_merge_size", 2)
    smallest = (shape["patch_size"] * merge) ** 2
    size = {"shortest_edge": smallest, "longest_edge": 1280 * smallest}
    return Qwen2VLImageProcessorPil(merge_size=merge, size=size, **shape)


def limit_pixels(
    image_processor: Any,
    config: Mapping[str, Any],
    min_pixels: int | None,
    max_pixels: int | None,
) -> None:
    """Bounds the area of an image, and with it its tokens.

    Raises:
        UserError: a limit below one token's area, or the upper one below the lower.
    """
    limits = {"shortest_edge": min_pixels, "longest_edge": max_pixels}
    given = {name: limit for name, limit in limits.items() if limit is not None}
    side = image_processor.patch_size * image_processor.merge_size
    if min(given.values(), default=side**2) < side**2:
        raise UserError(
            f"min_pixels and max_pixels must be at least {side**2} ({side} x {side}, one image "
            f"token), got {min_pixels} and {max_pixels}"
        )
    size = dict(image_processor.size) | given
    if size["shortest_edge"] > size["longest_edge"]:
        raise UserError(
            f"min_pixels ({size['shortest_edge']}) is larger than max_pixels "
            f"({size['longest_edge']}); set both"
        )
    image_processor.size = size


def model_inputs(
    batch: Mapping[str, Tensor], images: Mapping[str, Any], rows: Int[Tensor, " N"], image_id: int
) -> dict[str, Tensor]:
    """Adds the types of tokens, without which M-RoPE silently treats images as text."""
    return {"mm_token_type_ids": (batch["input_ids"] == image_id).long(), **images}


def see(backbone: Any, pictures: Mapping[str, Tensor]) -> vision.Seen:
    """Features of pictures, and how many rows and columns of tokens each has."""
    merged = backbone.config.vision_config.spatial_merge_size
    sizes = pictures["image_grid_thw"][:, 1:] // merged
    return vision.image_features(backbone, pictures) | {"sizes": sizes}


@contextmanager
def shown(backbone: Any, inputs: vision.Inputs, seen: vision.Seen) -> Iterator[vision.Inputs]:
    """Adds the positions of a batch with images, which the library finds row by row in Python.

    It then waits for the GPU several times a row; here all rows are done at once.
    """
    where = positions(inputs["mm_token_type_ids"], inputs["attention_mask"], seen["sizes"])
    with vision.shown(backbone, inputs | {"position_ids": where}, seen) as of_all:
        yield of_all


def positions(
    types: Int[Tensor, "B L"], mask: Int[Tensor, "B L"], sizes: Int[Tensor, "N 2"]
) -> Int[Tensor, "3 B L"]:
    """M-RoPE positions (time, row, column) of rows with at most one image each.

    Text counts on by one. An image stands at one time, its tokens in rows and columns from there;
    text after it counts on from the larger of its sides.

    Args:
        types: 1 where an image's token is, else 0.
        mask: 0 where padding is.
        sizes: rows and columns of tokens of each image.

    Source: Qwen2-VL, arXiv 2409.12191, section 2.1; equal to the library's `get_rope_index`.

    >>> positions(torch.tensor([[0, 1, 1, 0]]), torch.ones(1, 4).long(), torch.tensor([[1, 2]]))[2]
    tensor([[0, 1, 2, 3]])
    """
    is_image, is_text = (types == 1) & (mask > 0), (types == 0) & (mask > 0)
    has_image = is_image.any(dim=1)
    number = has_image.cumsum(0).sub(1).clamp(min=0)
    rows, columns = sizes[number, :, None].unbind(1)
    # Of the text before each token, and of the image's tokens before it.
    text, seen = is_text.cumsum(1) - is_text.long(), is_image.cumsum(1) - is_image.long()
    after = torch.maximum(rows, columns) * ((seen > 0) & is_text)
    inside = torch.stack([torch.zeros_like(seen), seen // columns, seen % columns])
    return (text + after + inside * is_image) * (mask > 0)
