"""Optional ways to run a backbone, each with a key and a one-line error if it is not available.

Flash attention 2, 4-bit weights (bitsandbytes) and Liger's kernels need a CUDA GPU and a package of
their own; torch.compile needs a compiler.
"""

import os
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.import_utils import (
    is_bitsandbytes_available,
    is_flash_attn_2_available,
    is_kernels_available,
)

from metaembed_pl.errors import UserError
from metaembed_pl.model.family import Family


def refuse_missing_flash() -> None:
    """Raises a UserError where flash attention 2 cannot run."""
    # Where the package `kernels` is, transformers fetches a built kernel through it.
    has_package = is_flash_attn_2_available() or is_kernels_available()
    _refuse_missing("attention: flash_attention_2", "flash-attn", has_package, "attention: sdpa")


def nf4_weights() -> dict[str, Any]:
    """Arguments of `from_pretrained` for linear layers in 4-bit NormalFloat, as in QLoRA.

    Source: Dettmers et al. 2023, arXiv 2305.14314; the products themselves are in bf16.
    """
    from transformers import BitsAndBytesConfig

    extra = "bitsandbytes (pip install metaembed-pl[qlora])"
    _refuse_missing("quantization: nf4", extra, is_bitsandbytes_available(), "quantization: null")
    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        ),
        "device_map": {"": int(os.environ.get("LOCAL_RANK", 0))},
    }


def use_liger(model: PreTrainedModel) -> None:
    """Swaps in Liger's kernels for norms, rotary positions and gated MLPs; weights stay."""
    try:
        from liger_kernel.transformers.monkey_patch import (  # pyright: ignore[reportMissingImports]
            MODEL_TYPE_TO_APPLY_LIGER_FN,
            _apply_liger_kernel_to_instance,
        )
    except ImportError:
        known = None
    else:
        known = MODEL_TYPE_TO_APPLY_LIGER_FN
    _refuse_missing(
        "liger: true",
        "liger-kernel (pip install metaembed-pl[liger])",
        known is not None,
        "liger: false",
    )
    if model.config.model_type not in (known or ()):
        raise UserError(
            f"liger: true: liger-kernel has no kernels for {model.config.model_type}; "
            "use liger: false"
        )
    # The other two are for a language-model head, which is never run here.
    _apply_liger_kernel_to_instance(model, cross_entropy=False, fused_linear_cross_entropy=False)


def _refuse_missing(key: str, package: str, is_there: bool, instead: str) -> None:
    missing = [] if is_there else [f"the package {package}"]
    if not torch.cuda.is_available():
        missing.append("a CUDA GPU")
    if missing:
        raise UserError(f"{key} needs {' and '.join(missing)}, not available; use {instead}")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute activations in the backward pass; under the name that this transformers has."""
    # The reentrant form needs inputs with gradients, which frozen first layers do not have. For it,
    # transformers makes every input embedding require a gradient: a frozen vision tower would then
    # save its activations.
    settings = {"use_reentrant": False}
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(settings)
    else:
        model.gradient_checkpointing_enable(settings)
    model.disable_input_require_grads()


def compile_layers(model: PreTrainedModel, family: Family) -> None:
    """torch.compile for each layer of the language model, at its first call.

    Layers have one shape of code, so one compiled layer serves all; and the meta tokens' hook and
    the images' scatter stay outside. Lengths vary from batch to batch: compiled for any length.
    """
    for layer in _layers(model.get_submodule(family.text_module)):
        layer.compile(dynamic=True)


def _layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
