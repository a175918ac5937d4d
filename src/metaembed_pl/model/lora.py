"""The trained part of a backbone: everything, everything but its vision tower, or a LoRA adapter.

peft injects the adapter into the backbone, which keeps its class and module names. The meta tokens
are not part of the adapter and are always trained fully.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from metaembed_pl.errors import UserError, first_line
from metaembed_pl.model.family import Family
from metaembed_pl.model.sharded import is_sharded
from metaembed_pl.model.weights import fingerprint, load_into, refuse_unlike

ADAPTER_FILE = "adapter_model.safetensors"
PREFIX = "base_model.model."  # what peft puts before the names of an adapter's tensors
INITS = ("gaussian", "default")


@dataclass
class LoraConfig:
    """A LoRA adapter; the defaults are the paper's.

    Args:
        r: rank of the update of each adapted layer.
        alpha: the update is scaled by alpha / r.
        dropout: dropout of the adapter's inputs in training.
        init: how the adapter starts, `gaussian` or `default` (Kaiming); with both as no update.
        dora: learn the length of each weight row separately from its direction (DoRA).
        targets: regular expression for the full names of the adapted modules; None: the linear
            layers of the language model, and with `train_vision` those of the vision tower.
    """

    r: int = 32
    alpha: int = 32
    dropout: float = 0.1
    init: str = "gaussian"
    dora: bool = False
    targets: str | None = None

    def __post_init__(self) -> None:
        if self.r < 1 or self.alpha < 1:
            raise UserError(
                f"lora.r and lora.alpha must be at least 1, got {self.r} and {self.alpha}"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout is a share, 0 to below 1, got {self.dropout}")
        if self.init not in INITS:
            gone = "; pissa was removed" if self.init == "pissa" else ""
            raise UserError(f"lora.init must be {' or '.join(INITS)}, got {self.init!r}{gone}")


def set_trainable(
    backbone: PreTrainedModel, family: Family, lora: LoraConfig | None, train_vision: bool
) -> None:
    """Adds the adapter, or freezes the parameters that are not trained.

    Args:
        backbone: without an adapter.
        family: of the backbone.
        lora: None trains the weights themselves.
        train_vision: without LoRA: train the vision tower and its projector; with LoRA: adapt the
            vision tower's linear layers too.
    """
    if lora is not None:
        add_lora(backbone, lora, lora_targets(lora, family, train_vision))
    elif not train_vision:
        for part in family.vision_parts(backbone):
            part.requires_grad_(False)


def lora_targets(lora: LoraConfig, family: Family, train_vision: bool) -> str:
    """The pattern of module names that LoRA adapts."""
    if lora.targets is not None:
        return lora.targets
    patterns = [family.lora_targets]
    if train_vision and family.vision_targets:
        patterns.append(family.vision_targets)
    return "|".join(f"(?:{pattern})" for pattern in patterns)


def add_lora(backbone: Any, lora: LoraConfig, targets: str) -> None:
    """Adds a new adapter to the backbone and freezes everything else in it."""
    from peft import LoraConfig as PeftConfig

    config = PeftConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        init_lora_weights=True if lora.init == "default" else "gaussian",  # the only others
        use_dora=lora.dora,
        target_modules=targets,
        base_model_name_or_path=backbone.config.name_or_path or None,
        revision=getattr(backbone, "base_revision", None),
    )
    _inject(backbone, config)


def _inject(backbone: Any, config: Any) -> None:
    from peft import inject_adapter_in_model
    from peft.functional import cast_adapter_dtype

    _refuse_no_hit(backbone, config.target_modules)
    backbone.base_fingerprint = fingerprint(backbone)
    try:
        inject_adapter_in_model(config, backbone)
    except ValueError as error:
        raise UserError(
            f"lora.targets {config.target_modules!r} matches modules that cannot be adapted: "
            f"{first_line(error)}"
        ) from error
    # peft makes adapters in the backbone's dtype: in bf16, updates of 1e-4 would be rounded away.
    cast_adapter_dtype(backbone, "default")
    for layer in adapted_layers(backbone).values():
        layer.cast_input_dtype_enabled = _Casts()


class _Casts:
    """Whether adapters cast their inputs to fp32: not under autocast, which would cast them back.

    peft asks at every call, also when gradient checkpointing runs a layer again.
    """

    def __bool__(self) -> bool:
        return not any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))


def _refuse_no_hit(backbone: nn.Module, targets: str | list[str] | set[str]) -> None:
    linear = [name for name, module in backbone.named_modules() if isinstance(module, nn.Linear)]
    if not isinstance(targets, str):  # an adapter of other origin: the last parts of names
        targets = rf"(.*\.)?({'|'.join(map(re.escape, sorted(targets)))})"
    try:
        pattern = re.compile(targets)
    except re.error as error:
        raise UserError(
            f"lora.targets {targets!r} is not a valid regular expression: {error}"
        ) from error
    if not any(pattern.fullmatch(name) for name in linear):
        some = ", ".join(linear[:: max(1, len(linear) // 4)][:4])
        raise UserError(
            f"lora.targets {targets!r} matches no linear layer of this backbone; the full name "
            f"must match, and names here are such as {some}"
        )


def adapted_layers(backbone: nn.Module) -> dict[str, Any]:
    """The layers that have an adapter, by name."""
    from peft.tuners.lora import LoraLayer

    return {
        name: module for name, module in backbone.named_modules() if isinstance(module, LoraLayer)
    }


def has_adapter(backbone: nn.Module) -> bool:
    """Whether the backbone has an adapter that is not merged."""
    return "default" in getattr(backbone, "peft_config", {})


def adapter_tensors(backbone: Any) -> dict[str, Tensor]:
    """The adapter's tensors (not copies), under their names in peft's files."""
    from peft import get_peft_model_state_dict

    state = backbone.state_dict(keep_vars=True)
    found = get_peft_model_state_dict(backbone, state_dict=state, save_embedding_layers=False)
    return {PREFIX + name: tensor for name, tensor in found.items()}


def save_adapter(backbone: Any, tensors: dict[str, Tensor], folder: Path, base: str | None) -> None:
    """Writes the adapter as peft does: `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        backbone: with an adapter.
        tensors: its `adapter_tensors`, unsharded.
        folder: created if it does not exist.
        base: the base model's name, for other programs.
    """
    config = copy.copy(backbone.peft_config["default"])
    config.base_model_name_or_path, config.inference_mode = base, True
    folder.mkdir(exist_ok=True)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
    refuse_unlike(folder / ADAPTER_FILE, tensors)
    config.save_pretrained(str(folder))


def load_adapter(backbone: Any, folder: Path) -> None:
    """Adds a saved adapter to the backbone; every tensor must exist and fit."""
    from peft import LoraConfig as PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: not a readable LoRA adapter: {first_line(error)}") from error
    if config.base_model_name_or_path is not None:
        config.base_model_name_or_path = backbone.config.name_or_path
    try:
        _inject(backbone, config)
    except UserError as error:
        raise UserError(f"{folder}: an adapter for another base model: {error}") from error
    load_into(adapter_tensors(backbone), folder / ADAPTER_FILE)


def merge_adapter(backbone: Any) -> None:
    """Merges the adapter into the weights, if there is one."""
    layers = adapted_layers(backbone)
    if any(is_sharded(layer.get_base_layer().weight) for layer in layers.values()):
        raise UserError(
            "an adapter cannot become part of weights that are shared out over ranks: export the "
            "model with --merge first, and start from that folder"
        )
    for name, layer in layers.items():
        layer.merge(safe_merge=True)
        parent, _, child = name.rpartition(".")
        setattr(backbone.get_submodule(parent), child, layer.get_base_layer())
    if has_adapter(backbone):
        del backbone.peft_config
        backbone.config.name_or_path = ""  # it is no longer the model of that name


def base_weights(backbone: nn.Module) -> dict[str, Tensor]:
    """The base model's weights, under their names without an adapter."""
    return {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in backbone.state_dict(keep_vars=True).items()
        if "lora_" not in name
    }
