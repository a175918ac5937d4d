"""The floating-point operations of a training step, from the shapes of a model that never runs.

    linear layer    2 in out                 a token, patch or merged patch, forward
    attention       4 n d                    a token that looks at n others, forward

Going backwards, a linear layer that a gradient passes through costs the same once more, and once
more again if its weights are trained; fused attention costs 2.5 times its forward pass. Gradient
checkpointing runs the forward pass twice. A frozen vision tower runs forwards once.

Norms, activation functions, the optimizer and the loss are not counted, nor is padding.
tests/benchmarks/test_gpu.py compares this with the operations that torch counts.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.training.activations import Rows

FUSED_BACKWARD = 2.5  # five products, where the forward pass has two


@dataclass(frozen=True)
class Gpu:
    """A GPU's speed and memory.

    Args:
        flops: per second, in dense bf16.
        memory_bytes: available to a program.
    """

    flops: float
    memory_bytes: int


GPUS = {
    "A100": Gpu(312e12, round(79.2 * 2**30)),
    "H100": Gpu(989e12, round(79.1 * 2**30)),
    "H200": Gpu(989e12, round(139.8 * 2**30)),
}
UTILISATION = 0.4
"""The assumed share of a GPU's peak, until a run has been measured."""


def training_flops(model: MetaEmbedder, calls: Iterable[Rows], is_checkpointed: bool) -> float:
    """FLOPs of the forward and backward passes of some calls.

    Args:
        model: may be on the meta device; with the trained parameters set.
        calls: rows without padding; tokens and patches may be means.
        is_checkpointed: gradient checkpointing.
    """
    return sum(
        rows.num_rows * (_of_text(model, rows, is_checkpointed) + _of_vision(model, rows))
        for rows in calls
    )


def _of_text(model: MetaEmbedder, rows: Rows, is_checkpointed: bool) -> float:
    text = model.backbone.get_submodule(model.processing.family.text_module)
    forward = 1 + is_checkpointed
    config: Any = model.backbone.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width *= config.num_attention_heads
    cross = len(getattr(config, "cross_attention_layers", None) or [])
    total = 0.0
    for name, linear in _linear(text):
        # Cross-attention reads patches; without a picture its layers are not run.
        is_cross = ".cross_attn." in f".{name}"
        of_patches = is_cross and name.split(".cross_attn.")[1].startswith(("k_proj", "v_proj"))
        if is_cross and not rows.num_patches:
            continue
        count = rows.num_patches if of_patches else rows.num_tokens
        # Patches have no gradient: of the layers that read them, only the weights have one.
        total += _of_linear(linear, count, forward, not of_patches or "lora_B" in name)
    seen = (config.num_hidden_layers - cross) * rows.num_tokens + cross * rows.num_patches
    return total + 4 * rows.num_tokens * seen * width * (forward + FUSED_BACKWARD)


def _of_vision(model: MetaEmbedder, rows: Rows) -> float:
    """FLOPs of the vision tower and the projector, per row."""
    if not rows.num_patches:
        return 0.0
    family = model.processing.family
    config: Any = model.backbone.config.vision_config
    tower = model.backbone.get_submodule(family.vision_module)
    is_trained = any(p.requires_grad for p in tower.parameters())
    merged = rows.num_patches / getattr(config, "spatial_merge_size", 1) ** 2
    total = 0.0
    for name, linear in _linear(tower):
        count = merged if "merger" in name else rows.num_patches
        total += _of_linear(linear, count, 1, is_trained)
    if family.projector_module:
        for _, linear in _linear(model.backbone.get_submodule(family.projector_module)):
            total += _of_linear(linear, rows.num_patches, 1, is_trained)
    seen = _patch_pairs(config, rows.num_patches)
    return total + 4 * seen * config.hidden_size * (1 + FUSED_BACKWARD * is_trained)


def _patch_pairs(config: Any, num_patches: float) -> float:
    """Pairs of patches that attend to each other, over all layers; some layers have windows."""
    depth = getattr(config, "depth", None) or config.num_hidden_layers
    depth += getattr(config, "num_global_layers", 0)
    full = len(getattr(config, "fullatt_block_indexes", None) or range(depth))
    window = (getattr(config, "window_size", 0) // config.patch_size) ** 2
    seen = full * num_patches + (depth - full) * min(window, num_patches)
    return num_patches * seen


def _linear(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers, adapters among them, and convolutions that are one product a patch."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Linear | nn.Conv2d | nn.Conv3d) and not hasattr(part, "base_layer"):
            yield name, part


def _of_linear(linear: Any, count: float, forward: int, has_gradient: bool) -> float:
    passes = forward + has_gradient + linear.weight.requires_grad
    return 2 * linear.weight.numel() * count * passes
