"""Idefics3 and SmolVLM: a picture is cut into tiles of the vision tower's input size.

The tiles come row by row, then the full picture at a tile's size.

Shape letters: B rows, L tokens, N images.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor

from metaembed_pl.errors import UserError

_IMAGE_TOKENS = (
    ("<image>", "image_token_id"),
    ("<fake_token_around_image>", None),
    ("<global-img>", None),
    ("<end_of_utterance>", None),
    *((f"<row_{row}_col_{column}>", None) for row in range(1, 5) for column in range(1, 5)),
)
IDEFICS3_TOKENS = (("<|end_of_text|>", None), ("<|begin_of_text|>", None), *_IMAGE_TOKENS)
SMOLVLM_TOKENS = (("<|im_end|>", None), ("<|im_start|>", None), *_IMAGE_TOKENS)


def image_text(image_processor: Any, images: Mapping[str, Any]) -> list[str]:
    """Each tile under its row and column, a line for every row, then the full picture."""
    tile = "<image>" * image_processor.image_seq_length
    full = f"<fake_token_around_image><global-img>{tile}<fake_token_around_image>"
    texts = []
    for (num_rows,), (num_columns,) in zip(images["rows"], images["cols"], strict=True):
        lines = [
            "".join(
                f"<fake_token_around_image><row_{row}_col_{column}>{tile}"
                for column in range(1, num_columns + 1)
            )
            for row in range(1, num_rows + 1)
        ]
        texts.append("".join(f"{line}\n" for line in lines) + ("\n" if lines else "") + full)
    return texts


def image_processor(config: Mapping[str, Any], kind: type) -> Any:
    """The image processor of a model made from scratch; `kind` is its family's."""
    tile = config.get("vision_config", {}).get("image_size", 224)
    return kind(size={"longest_edge": 4 * tile}, max_image_size={"longest_edge": tile})


def image_length(config: Mapping[str, Any]) -> int:
    """Tokens of a tile: its patches, shuffled into `scale_factor` squared fewer."""
    vision = config.get("vision_config", {})
    side = vision.get("image_size", 224) // vision.get("patch_size", 32)
    return side**2 // config.get("scale_factor", 2) ** 2


def limit_pixels(
    image_processor: Any,
    config: Mapping[str, Any],
    min_pixels: int | None,
    max_pixels: int | None,
) -> None:
    """Bounds the longer side, and with it the tiles, so that a square picture keeps the limit.

    Raises:
        UserError: `max_pixels` below one tile, or a `min_pixels`: all images are of one size.
    """
    image_processor.image_seq_length = image_length(config)
    tile = image_processor.max_image_size["longest_edge"]
    if min_pixels is not None:
        raise UserError(
            f"min_pixels must be null for this family, got {min_pixels}: "
            "every image is brought to one length"
        )
    if max_pixels is None:
        return
    if max_pixels < tile**2:
        raise UserError(
            f"max_pixels must be at least {tile**2} ({tile} x {tile}, one tile), got {max_pixels}"
        )
    longest = math.isqrt(max_pixels) // tile * tile
    image_processor.size = {"longest_edge": min(longest, image_processor.size["longest_edge"])}


def model_inputs(
    batch: Mapping[str, Tensor], images: Mapping[str, Any], rows: Int[Tensor, " N"], image_id: int
) -> dict[str, Tensor]:
    """Tiles and which of their pixels are the picture's."""
    return {name: images[name] for name in ("pixel_values", "pixel_attention_mask") if images}
