"""Backbone families: the differences between vision-language models, as rows of data.

Everything that the rest of the code needs to know about a family is here: how an image appears in
the token sequence, the inputs of the model, the layers that LoRA adapts. To add a family, add a row
to `FAMILIES`; the functions of its row are in family_*.py.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

from metaembed_pl.errors import UserError, did_you_mean
from metaembed_pl.model import family_idefics as idefics
from metaembed_pl.model import family_mllama as mllama
from metaembed_pl.model import family_qwen as qwen
from metaembed_pl.model import family_siglip as siglip
from metaembed_pl.model import vision

LANGUAGE_LAYERS = (
    r".*(language_model|text_model)\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
)
VISION_LAYERS = (
    r"(.*\.)?(visual|vision_tower|vision_model)\..*(blocks|layers)\.\d+\..*\."
    r"(qkv|proj|q_proj|k_proj|v_proj|o_proj|out_proj|gate_proj|up_proj|down_proj"
    r"|fc1|fc2|linear_fc1|linear_fc2)"
)


@dataclass(frozen=True)
class Template:
    """The words around an item, as one user turn of the family's chat template has them.

    Args:
        prefix: opens the turn; the image follows it.
        suffix: closes the turn.
        before_text: between image and text; also where there is no image.
        query: stands before the text of queries only.
        image_only: the text of an item that has none.
    """

    prefix: str
    suffix: str
    before_text: str = ""
    query: str = "Query: "
    image_only: str = "Describe the image."


def _of_one_size(
    image_processor: Any,
    config: Mapping[str, Any],
    min_pixels: int | None,
    max_pixels: int | None,
    image_length: Callable[[Mapping[str, Any]], int] | None = None,
) -> None:
    if min_pixels is not None or max_pixels is not None:
        raise UserError(
            "min_pixels and max_pixels must be null for this family, got "
            f"{min_pixels} and {max_pixels}: its vision tower sees every image at one size"
        )
    if image_length is not None:
        image_processor.image_seq_length = image_length(config)


ModelInputs = Callable[
    [Mapping[str, Tensor], Mapping[str, Any], Int[Tensor, " N"], int], dict[str, Tensor]
]


@dataclass(frozen=True)
class Family:
    """One family of vision-language models.

    Args:
        model_type: the `model_type` of its transformers config.
        template: the words around an item.
        special_tokens: what a tokenizer trained from scratch must have, with the config's name of
            each (None: the config does not name it). The first one pads.
        image_token: stands where an image is.
        image_text: from (image processor, its output) to the text that stands for each image.
        scratch_image_processor: from the config of a model made from scratch to its image
            processor.
        set_up: from (image processor, model config as a dict, min pixels, max pixels): sets up
            the image processor for the model, with the limits of an image.
        model_inputs: from (batch, image processor's output or nothing, rows with an image, id of
            the image token) to what the model takes beside ids and attention mask.
        vision_module: where the base model has its vision tower.
        text_module: where it has its language model.
        projector_module: what stands between them; None: part of the vision tower.
        picture_inputs: what its vision tower takes.
        see: from (backbone, those inputs) to what the language model takes of pictures.
        shown: from (backbone, the other inputs, what was seen) to the inputs of its forward, while
            the context is open.
        in_step: from (backbone, inputs without pictures, what was seen and is not to be shown) to
            inputs with which the language model runs all of its layers, while the context is open.
        lora_targets: regular expression over the names of the language model's layers that LoRA
            adapts.
        vision_targets: the same for the vision tower.
        image_options: what the image processor is called with.
        smallest_options: what makes it keep a small picture small.
        packs_images: its vision tower runs over the patches of all images as one sequence.
        packs_rows: its language model takes several rows as one; see packing.py.
        other_templates: of models of this kind with other markers, recognised by their tokenizers.
    """

    model_type: str
    template: Template
    special_tokens: tuple[tuple[str, str | None], ...]
    image_token: str
    image_text: Callable[[Any, Mapping[str, Any]], list[str]]
    scratch_image_processor: Callable[[Mapping[str, Any]], Any]
    set_up: Callable[[Any, Mapping[str, Any], int | None, int | None], None]
    model_inputs: ModelInputs
    vision_module: str
    text_module: str
    projector_module: str | None
    picture_inputs: tuple[str, ...] = ("pixel_values",)
    see: Callable[[nn.Module, Mapping[str, Tensor]], vision.Seen] = vision.image_features
    shown: Callable[
        [nn.Module, vision.Inputs, vision.Seen], AbstractContextManager[vision.Inputs]
    ] = vision.shown
    in_step: Callable[
        [nn.Module, vision.Inputs, vision.Seen], AbstractContextManager[vision.Inputs]
    ] = vision.as_it_is
    lora_targets: str = LANGUAGE_LAYERS
    vision_targets: str = VISION_LAYERS
    image_options: Mapping[str, Any] = field(default_factory=dict)
    smallest_options: Mapping[str, Any] = field(default_factory=dict)
    packs_images: bool = False
    packs_rows: bool = False
    other_templates: tuple[Template, ...] = ()

    def image_processor(
        self, config: Mapping[str, Any], min_pixels: int | None, max_pixels: int | None
    ) -> Any:
        """The image processor of a model made from scratch.

        Args:
            config: its transformers config.
            min_pixels: smaller images are enlarged to it.
            max_pixels: larger images are shrunk to it.
        """
        made = self.scratch_image_processor(config)
        self.set_up(made, config, min_pixels, max_pixels)
        return made

    def split(self, inputs: Mapping[str, Tensor]) -> tuple[vision.Inputs, vision.Inputs]:
        """Inputs of a model: what its vision tower takes, and the rest."""
        pictures = {name: inputs[name] for name in self.picture_inputs if name in inputs}
        return pictures, {name: inputs[name] for name in inputs.keys() - pictures.keys()}

    def vision_parts(self, backbone: nn.Module) -> list[nn.Module]:
        """The vision tower, and the projector where it is not a part of it."""
        names = (self.vision_module, self.projector_module)
        return [backbone.get_submodule(name) for name in names if name]


def _qwen(model_type: str, **settings: Any) -> Family:
    return Family(
        model_type,
        Template("<|im_start|>user\n", "<|im_end|>\n"),
        qwen.SPECIAL_TOKENS,
        "<|image_pad|>",
        qwen.image_text,
        partial(qwen.image_processor, **settings),
        qwen.limit_pixels,
        qwen.model_inputs,
        vision_module="visual",
        text_module="language_model",
        projector_module=None,
        picture_inputs=("pixel_values", "image_grid_thw"),
        see=qwen.see,
        shown=qwen.shown,
        smallest_options={"size": {"shortest_edge": 1, "longest_edge": 10**6}},
        packs_images=True,
        packs_rows=True,
    )


def _idefics(
    model_type: str,
    prefix: str,
    tokens: tuple[tuple[str, str | None], ...],
    kind: type,
    *others: str,
) -> Family:
    suffix = "<end_of_utterance>\n"
    return Family(
        model_type,
        Template(prefix, suffix),
        tokens,
        "<image>",
        idefics.image_text,
        partial(idefics.image_processor, kind=kind),
        idefics.limit_pixels,
        idefics.model_inputs,
        vision_module="vision_model",
        text_module="text_model",
        projector_module="connector",
        picture_inputs=("pixel_values", "pixel_attention_mask"),
        image_options={"return_row_col_info": True},
        smallest_options={"do_image_splitting": False},
        other_templates=tuple(Template(other, suffix) for other in others),
    )


_HALF = [0.5, 0.5, 0.5]

FAMILIES = {
    family.model_type: family
    for family in (
        _qwen("qwen2_vl"),
        _qwen("qwen2_5_vl"),
        _qwen("qwen3_vl", patch_size=16, image_mean=_HALF, image_std=_HALF),
        Family(
            "mllama",
            Template("<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
            mllama.SPECIAL_TOKENS,
            "<|image|>",
            mllama.image_text,
            mllama.image_processor,
            _of_one_size,
            mllama.model_inputs,
            vision_module="vision_model",
            text_module="language_model",
            projector_module="multi_modal_projector",
            picture_inputs=mllama.PICTURES,
            see=mllama.see,
            shown=mllama.shown,
            in_step=mllama.in_step,
        ),
        Family(
            "paligemma",
            Template("", "\n", before_text="<bos>"),
            siglip.PALIGEMMA_TOKENS,
            "<image>",
            siglip.paligemma_text,
            siglip.paligemma_image_processor,
            partial(_of_one_size, image_length=siglip.paligemma_length),
            siglip.paligemma_inputs,
            vision_module="vision_tower",
            text_module="language_model",
            projector_module="multi_modal_projector",
        ),
        Family(
            "gemma3",
            Template("<bos><start_of_turn>user\n", "<end_of_turn>\n"),
            siglip.GEMMA3_TOKENS,
            "<image_soft_token>",
            siglip.gemma3_text,
            siglip.gemma3_image_processor,
            partial(_of_one_size, image_length=siglip.gemma3_length),
            siglip.gemma3_inputs,
            vision_module="vision_tower",
            text_module="language_model",
            projector_module="multi_modal_projector",
            image_options={"do_pan_and_scan": False},
        ),
        _idefics(
            "idefics3",
            "<|begin_of_text|>User:",
            idefics.IDEFICS3_TOKENS,
            Idefics3ImageProcessorPil,
            "<|im_start|>User:",  # SmolVLM-Instruct, the first SmolVLM, is of this type
        ),
        _idefics("smolvlm", "<|im_start|>User:", idefics.SMOLVLM_TOKENS, SmolVLMImageProcessorPil),
    )
}


def family_of(model_type: str) -> Family:
    """The family of a transformers config's `model_type`.

    Raises:
        UserError: the family is not supported; the message names those that are.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    raise UserError(
        f"backbone family {model_type!r} is not supported; supported: {', '.join(FAMILIES)}"
        f"{did_you_mean(model_type, FAMILIES)}"
    )
