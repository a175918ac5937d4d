"""The bytes kept for a backbone's backward pass, counted over its layers without running them.

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

from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from metaembed_pl.model.family import Family

FP32_BYTES = 4
# Linear layers that read what attention or the MLP made; the others read a norm's output.
ATTENDED, INNER = {"o_proj", "out_proj", "proj"}, {"down_proj", "fc2", "linear_fc2"}
OUTPUTS = ATTENDED | INNER
# What cross-attention does to image patches instead of tokens.
OF_PATCHES = ("k_proj", "v_proj", "k_norm")


@dataclass(frozen=True)
class Precision:
    """How wide numbers are, and what that costs.

    Args:
        compute_bytes: of what matrix products read and give.
        residual_bytes: of the stream between the layers.
        dropped_bytes: of what dropout keeps of a number: a mark, or on the CPU a factor.
        has_autocast: linear layers cast their inputs, each for itself.
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
        num_patches: of each row's image, as the vision tower reads them.
        pixel_bytes: of each row's image, as the image processor gives it.
    """

    num_rows: int
    num_tokens: int
    num_patches: int = 0
    pixel_bytes: int = 0


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps.

    Args:
        token: for each token.
        pair: for each pair of tokens of a row.
        cross: for each image patch that its tokens attend to.
        input: for each token, if nothing but its input is kept.
        backward: for each token, beside, while its gradients are computed.
        is_checkpointed: it is computed again in the backward pass, where that is asked for.
    """

    token: float
    pair: float
    cross: float
    input: float
    backward: float
    is_checkpointed: bool

    def kept(self, num_rows: int, num_tokens: int, num_patches: int) -> float:
        """Of all rows of a call."""
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
    """Bytes kept between forward and backward, and what computing one layer backwards takes beside.

    Args:
        backbone: may be on the meta device; what is trained in it counts.
        family: says where its towers are.
        calls: the forward calls whose graphs are alive at once.
        precision: of numbers.
        is_checkpointed: each layer is computed again in the backward pass.
        has_mask: attention keeps a mask of tokens by tokens, as sdpa does where rows are padded.
    """
    vision_tower = backbone.get_submodule(family.vision_module)
    text = _layers(backbone.get_submodule(family.text_module), precision, has_mask)
    # A frozen tower keeps nothing: no gradient goes through it.
    is_frozen = not any(p.requires_grad for p in vision_tower.parameters())
    vision = [] if is_frozen else _layers(vision_tower, precision, False)
    passing = _seeing(backbone, vision_tower, precision) if is_frozen else 0.0
    kept = beside = peak = 0.0
    for rows in calls:
        kept += rows.num_rows * rows.pixel_bytes
        peak = max(peak, kept + rows.num_rows * rows.num_patches * passing)
        for layers, num_tokens in ((text, rows.num_tokens), (vision, rows.num_patches)):
            count = rows.num_rows * num_tokens
            for layer in layers:
                complete = layer.kept(rows.num_rows, num_tokens, rows.num_patches)
                redone = is_checkpointed and layer.is_checkpointed
                kept += layer.input * count if redone else complete
                beside = max(beside, (complete if redone else 0) + layer.backward * count)
        kept += rows.num_rows * rows.num_tokens * _around(backbone, precision)
        kept += rows.num_rows * rows.num_patches * _shown(backbone, precision)
    return round(max(peak, kept + beside))


def _seeing(backbone: PreTrainedModel, tower: nn.Module, precision: Precision) -> float:
    """Of a patch, while a frozen tower runs: its widest layer, and states that it collects.

    Llama 3.2 Vision reads states of several layers, for which transformers keeps those of all.
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
    """Of a patch, what cross-attention layers look at, kept once for all of them."""
    config: Any = backbone.config.get_text_config()
    looks = getattr(config, "cross_attention_layers", None)
    return 2 * config.hidden_size * precision.compute_bytes if looks else 0.0


def _around(backbone: PreTrainedModel, precision: Precision) -> float:
    """Of a token outside the layers: its embedding with the meta tokens, and the final norm."""
    config: Any = backbone.config.get_text_config()
    return config.hidden_size * (2 * precision.residual_bytes + FP32_BYTES)


def _layers(tower: nn.Module, precision: Precision, has_mask: bool) -> list[LayerBytes]:
    return [_layer_bytes(module, precision, has_mask) for module in _modules(tower)]


def _modules(tower: nn.Module) -> list[nn.Module]:
    """Its layers: what stands in lists and has attention and an MLP."""
    lists = [module for module in tower.modules() if isinstance(module, nn.ModuleList)]
    return [layer for layers in lists for layer in layers if _is_layer(layer)]


def _is_layer(module: nn.Module) -> bool:
    names = {name.rpartition(".")[2] for name, _ in _parts(module)}
    return bool(names & ATTENDED) and bool(names & INNER)


def _layer_bytes(layer: nn.Module, precision: Precision, has_mask: bool) -> LayerBytes:
    parts = list(_parts(layer))
    shape, seen = _shape(parts), set()
    compute = precision.compute_bytes
    # Where there is a mask, sdpa repeats keys and values for every query head.
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
    """Of a layer: its width, that of its queries, keys and MLP, and states the MLP keeps."""

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
    """Its norms and linear layers; an adapted linear layer with its adapter is one."""
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
    """Of one token."""
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
    """What a linear layer keeps of its input: nothing if frozen, a copy if it casts or drops."""
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
    """Whether an input takes memory of its own, or is one that another layer keeps already."""
    is_new = is_copy or where not in seen
    seen.add(where)
    return is_new
