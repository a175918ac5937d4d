"""The bytes saved for a backbone's backward pass, counted over its layers without running them.

A layer keeps, for each token: the tensors of its norms and its attention, the inputs of the linear
layers that are trained (or adapted), and the inner states of its MLP. With gradient checkpointing
only each layer's input stays, and one layer at a time is computed again. A frozen vision tower
keeps nothing, but takes memory while it runs.

The counts follow the tensors that autograd saves in transformers' layers. They are compared with
the memory of real steps in tests/training/test_memory.py, and at the recipes' real shapes by
benchmarks/real_shapes.py.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from metaembed_pl.model.family import Family

FP32_BYTES = 4
# Linear layers after attention and inside the MLP; the others read a norm's output.
ATTENDED, INNER = {"o_proj", "out_proj", "proj"}, {"down_proj", "fc2", "linear_fc2"}
OUTPUTS = ATTENDED | INNER
# Parts of cross-attention that process image patches instead of tokens.
OF_PATCHES = ("k_proj", "v_proj", "k_norm")


@dataclass(frozen=True)
class Precision:
    """The sizes of numbers.

    Args:
        compute_bytes: of the inputs and outputs of matrix products.
        residual_bytes: of the residual stream.
        dropped_bytes: of dropout's mask, per number; on the CPU it is a factor.
        has_autocast: each linear layer casts its inputs.
    """

    compute_bytes: int
    residual_bytes: int
    dropped_bytes: int
    has_autocast: bool


@dataclass(frozen=True)
class Rows:
    """The rows of one forward call.

    Args:
        num_rows: items.
        num_tokens: of each row, slots and padding included.
        num_patches: of each row's image, as inputs of the vision tower.
        pixel_bytes: of each row's image, after the image processor.
    """

    num_rows: int
    num_tokens: int
    num_patches: int = 0
    pixel_bytes: int = 0


def num_patches(pixels: Tensor, patch_size: int) -> int:
    """Patches that the vision tower reads: cut ones, or those of complete pictures or tiles."""
    return len(pixels) if pixels.dim() == 2 else pixels.numel() // (3 * patch_size**2)


@dataclass(frozen=True)
class LayerBytes:
    """The bytes that one layer saves for the backward pass.

    Args:
        token: per token.
        pair: per pair of tokens of a row.
        cross: per image patch that its tokens attend to.
        input: per token, if only its input is saved.
        backward: additional bytes per token while its gradients are computed.
        is_checkpointed: it supports gradient checkpointing.
    """

    token: float
    pair: float
    cross: float
    input: float
    backward: float
    is_checkpointed: bool

    def saved(self, num_rows: int, num_tokens: int, num_patches: int) -> float:
        """The bytes for all rows of a call."""
        a_row = num_tokens * (self.token + num_tokens * self.pair) + num_patches * self.cross
        return num_rows * a_row


def activation_bytes(
    backbone: PreTrainedModel,
    family: Family,
    calls: Iterable[Rows],
    precision: Precision,
    is_checkpointed: bool,
    has_mask: bool = True,
) -> int:
    """Bytes saved between forward and backward pass, plus the peak of one layer's backward pass.

    Args:
        backbone: may be on the meta device; with the trained parameters set.
        family: of the backbone.
        calls: the forward calls whose graphs exist at the same time.
        precision: of numbers.
        is_checkpointed: with gradient checkpointing.
        has_mask: attention saves a mask of tokens by tokens, as sdpa does for padded rows.
    """
    vision_tower = backbone.get_submodule(family.vision_module)
    text = _layers(backbone.get_submodule(family.text_module), precision, has_mask)
    # A frozen tower saves nothing: no gradient passes through it.
    is_frozen = not any(p.requires_grad for p in vision_tower.parameters())
    vision = [] if is_frozen else _layers(vision_tower, precision, False)
    passing = _seeing(backbone, vision_tower, precision) if is_frozen else 0.0
    saved = beside = peak = 0.0
    for rows in calls:
        saved += rows.num_rows * rows.pixel_bytes
        peak = max(peak, saved + rows.num_rows * rows.num_patches * passing)
        for layers, num_tokens in ((text, rows.num_tokens), (vision, rows.num_patches)):
            count = rows.num_rows * num_tokens
            for layer in layers:
                complete = layer.saved(rows.num_rows, num_tokens, rows.num_patches)
                redone = is_checkpointed and layer.is_checkpointed
                saved += layer.input * count if redone else complete
                beside = max(beside, (complete if redone else 0) + layer.backward * count)
        saved += rows.num_rows * rows.num_tokens * _around(backbone, precision)
        saved += rows.num_rows * rows.num_patches * _shown(backbone, precision)
    return round(max(peak, saved + beside))


def _seeing(backbone: PreTrainedModel, tower: nn.Module, precision: Precision) -> float:
    """Bytes per patch while a frozen tower runs: its widest layer, and states that it collects.

    Llama 3.2 Vision uses states of several layers, for which transformers stores those of all.
    """
    layers = _modules(tower)
    shape = _shape(list(_parts(layers[0])))
    # A layer norm gives fp32 under autocast, and what is added to it stays so.
    stream = FP32_BYTES if precision.has_autocast else precision.residual_bytes
    config: Any = backbone.config.vision_config
    read = getattr(config, "intermediate_layers_indices", None)
    num_states = 2 if read is None else len(layers) + 3 * len(read) + 2
    inside = (shape.num_copies + 1) * shape.num_inner * precision.compute_bytes
    return num_states * shape.width * stream + inside


def _shown(backbone: PreTrainedModel, precision: Precision) -> float:
    """Bytes per patch of the inputs of cross-attention layers, saved once for all of them."""
    config: Any = backbone.config.get_text_config()
    looks = getattr(config, "cross_attention_layers", None)
    return 2 * config.hidden_size * precision.compute_bytes if looks else 0.0


def _around(backbone: PreTrainedModel, precision: Precision) -> float:
    """Bytes per token outside the layers: embeddings with meta tokens, and the final norm."""
    config: Any = backbone.config.get_text_config()
    return config.hidden_size * (2 * precision.residual_bytes + FP32_BYTES)


def _layers(tower: nn.Module, precision: Precision, has_mask: bool) -> list[LayerBytes]:
    return [_layer_bytes(module, precision, has_mask) for module in _modules(tower)]


def _modules(tower: nn.Module) -> list[nn.Module]:
    """Its layers: modules in lists that have attention and an MLP."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    return [layer for layers in lists for layer in layers if _is_layer(layer)]


def _is_layer(module: nn.Module) -> bool:
    names = {name.rpartition(".")[2] for name, _ in _parts(module)}
    return bool(names & ATTENDED) and bool(names & INNER)


def _layer_bytes(layer: nn.Module, precision: Precision, has_mask: bool) -> LayerBytes:
    parts = list(_parts(layer))
    shape, seen = _shape(parts), set()
    compute = precision.compute_bytes
    # With a mask, sdpa repeats keys and values for every query head.
    own_keys = 0 if shape.is_cross else shape.num_attended if has_mask else shape.num_keys
    each = {name: _part_bytes(name, part, shape, seen, precision) for name, part in parts}
    of_patches = {name for name in each if shape.is_cross and name.endswith(OF_PATCHES)}
    token = sum(size for name, size in each.items() if name not in of_patches)
    token += (2 * (shape.num_attended + own_keys) + shape.num_inner * shape.num_copies) * compute
    return LayerBytes(
        token=token,
        pair=compute if has_mask and not shape.is_cross else 0,
        cross=2 * shape.num_attended * compute + sum(each[name] for name in of_patches)
        if shape.is_cross
        else 0,
        input=shape.width * precision.residual_bytes,
        backward=1.5 * shape.num_inner * compute + 2 * shape.width * precision.residual_bytes,
        is_checkpointed=isinstance(layer, GradientCheckpointingLayer),
    )


@dataclass(frozen=True)
class _Shape:
    """A layer's widths (its own, of queries, keys and MLP), and states that its MLP saves."""

    width: int
    num_attended: int
    num_keys: int
    num_inner: int
    num_copies: int
    is_cross: bool


def _shape(parts: list[tuple[str, Any]]) -> _Shape:
    inputs = {name.rpartition(".")[2]: part for name, part in parts}
    attended = next(inputs[name].in_features for name in inputs if name in ATTENDED)
    inner = next(inputs[name].in_features for name in inputs if name in INNER)
    return _Shape(
        width=max(part.weight.numel() for _, part in parts if _is_norm(part)),
        num_attended=attended,
        num_keys=inputs["k_proj"].out_features if "k_proj" in inputs else attended,
        num_inner=inner,
        num_copies=3 if "gate_proj" in inputs else 1,
        is_cross=any("cross_attn" in name for name, _ in parts),
    )


def _parts(layer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Its norms and linear layers; a linear layer and its adapter are one part."""
    adapted: tuple[str, ...] = ()
    for name, module in layer.named_modules():
        if adapted and name.startswith(adapted):
            continue
        if hasattr(module, "lora_A"):
            adapted = (*adapted, f"{name}.")
            yield name, module
        elif isinstance(module, nn.Linear) or _is_norm(module):
            yield name, module


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Norm") and hasattr(module, "weight")


def _part_bytes(name: str, part: Any, shape: _Shape, seen: set, precision: Precision) -> float:
    """Bytes per token."""
    parent, _, last = name.rpartition(".")
    if not _is_norm(part):
        return _input_bytes(part, (parent, last in OUTPUTS), seen, precision)
    of_heads = {"q_norm": shape.num_attended, "k_norm": shape.num_keys}
    size = of_heads[last] if last in of_heads else part.weight.numel()
    if isinstance(part, nn.LayerNorm):
        return size * max(precision.residual_bytes, FP32_BYTES * precision.has_autocast)
    # An RMS norm computes in fp32 and keeps that copy; in fp32 the copy is the stream itself.
    return size * (FP32_BYTES + precision.residual_bytes * part.weight.requires_grad)


def _input_bytes(linear: Any, where: tuple[str, bool], seen: set, precision: Precision) -> float:
    """Bytes per token of a linear layer's input: none if frozen, a copy with casts or dropout."""
    size = linear.in_features
    adapters = getattr(linear, "lora_A", None)
    if adapters is not None:
        rank = sum(adapter.out_features for adapter in adapters.values())
        dropout = any(getattr(part, "p", 0) for part in linear.lora_dropout.values())
        dropped = size * precision.dropped_bytes if dropout else 0
        is_copy = dropout or precision.has_autocast
        own = _once(where, is_copy, seen) * size * precision.compute_bytes
        return own + dropped + rank * precision.compute_bytes
    if not linear.weight.requires_grad:
        return 0
    is_copy = precision.has_autocast and precision.residual_bytes != precision.compute_bytes
    return _once(where, is_copy, seen) * size * precision.compute_bytes


def _once(where: tuple[str, bool], is_copy: bool, seen: set) -> bool:
    """Whether an input takes additional memory, because no other layer saves it."""
    is_new = is_copy or where not in seen
    seen.add(where)
    return is_new
