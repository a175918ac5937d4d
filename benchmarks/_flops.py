"""The floating-point operations that a training step needs, counted from the model's shape.

    linear layer    2 in out                 a token (or image patch), forward
    attention       4 n d                    a token that attends to n others;
                                             half of it in the causal language model

d: attention heads times their width
n: tokens of its own row, patches of its own image, or of its window

Going backwards, a linear layer that a gradient passes through costs the same once more, and once
more again if its weights are trained; attention costs twice its forward pass. A frozen vision tower
has no backward pass.

Padding, what gradient checkpointing or caching computes again, norms, activation functions, the
optimiser and the loss are not counted: utilisation falls where they take time.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metaembed_pl.model.embedder import MetaEmbedder

# Dense bf16, without sparsity, by what the device's name holds.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "4090": 165e12,
    "A10": 125e12,
}


def peak_flops(device_name: str) -> float | None:
    """Of a GPU of that name; None if it is not known.

    >>> peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    True
    """
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device_name), None)


@dataclass
class Work:
    """What a batch holds.

    Args:
        lengths: tokens of each row, without padding.
        patches: of each image.
    """

    lengths: list[int]
    patches: list[int]

    @classmethod
    def of(cls, inputs: Any) -> "Work":
        """Of processed rows, in one piece or in chunks."""
        pieces = [inputs] if isinstance(inputs, dict) else [chunk.inputs for chunk in inputs]
        return cls(
            [n for piece in pieces for n in piece["attention_mask"].sum(dim=1).tolist()],
            [
                n
                for piece in pieces
                if "image_grid_thw" in piece
                for n in piece["image_grid_thw"].prod(dim=1).tolist()
            ],
        )


def training_flops(model: MetaEmbedder, work: Work) -> float:
    """Forward and backward of one side of a batch, for the Qwen2.5-VL family."""
    family, backbone = model.processing.family, model.backbone
    text = backbone.get_submodule(family.text_module)
    vision = backbone.get_submodule(family.vision_module)
    is_trained = any(p.requires_grad for p in vision.parameters())
    return (
        _linear(text) * sum(work.lengths)
        + 3 * _text_attention(backbone.config.get_text_config(), work.lengths)
        + _vision_linear(vision, is_trained) * sum(work.patches)
        + (3 if is_trained else 1) * _vision_attention(backbone.config.vision_config, work.patches)
    )


def _linear(module: nn.Module, has_gradient: bool = True) -> float:
    """Of all linear layers in it, for one row of each."""
    passes = (
        (part.weight.numel(), 1 + has_gradient + part.weight.requires_grad)
        for part in module.modules()
        if isinstance(part, nn.Linear)
    )
    return sum(2 * count * times for count, times in passes)


def _vision_linear(vision: Any, has_gradient: bool) -> float:
    """Of one patch; the merger sees a few patches as one row."""
    merger = _linear(vision.merger, has_gradient)
    blocks = _linear(vision, has_gradient) - merger
    embedding: Tensor = vision.patch_embed.proj.weight
    if not isinstance(vision.patch_embed.proj, nn.Linear):
        blocks += 2 * embedding.numel() * (1 + embedding.requires_grad)
    return blocks + merger / vision.spatial_merge_size**2


def _text_attention(config: Any, lengths: list[int]) -> float:
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width *= config.num_attention_heads
    return config.num_hidden_layers * sum(4 * n * n * width / 2 for n in lengths)


def _vision_attention(config: Any, patches: list[int]) -> float:
    window = (config.window_size // config.patch_size) ** 2
    whole = len(config.fullatt_block_indexes)
    seen = sum(n * (whole * n + (config.depth - whole) * min(n, window)) for n in patches)
    return 4 * seen * config.hidden_size


def count_tokens(inputs: Any) -> int:
    """Of all rows, slots included, padding not."""
    return sum(Work.of(inputs).lengths)


def synchronized(device: str) -> None:
    """Waits until the device has done all that it was given."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
