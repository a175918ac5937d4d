"""Backbones: a vision-language model from the hub, from a folder, or a tiny one made from a config.

Only the base model is built, without a language-model head: MetaEmbed uses the last hidden states.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModel, PreTrainedModel, PreTrainedTokenizerFast

from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError, about_key
from metaembed_pl.item import Pair
from metaembed_pl.model.backbone_options import (
    checkpoint_activations,
    compile_layers,
    nf4_weights,
    refuse_missing_flash,
    use_liger,
)
from metaembed_pl.model.family import Family, family_of
from metaembed_pl.model.kernels import FP32, look_up_grids, project_patches, set_attention
from metaembed_pl.model.processing import Processing, Prompt, load_processors
from metaembed_pl.model.weights import load_backbone


@dataclass
class ScratchTokenizer:
    """A byte-level BPE tokenizer trained on the texts of shards.

    Args:
        vocab_size: number of entries, special tokens included.
        sources: folders of shards whose texts it is trained on.
    """

    vocab_size: int
    sources: list[str]


@dataclass
class BackboneConfig:
    """The vision-language model (`path` or `scratch`), and options to run it (from `dtype` on).

    Args:
        path: hub id or folder of a pretrained model.
        revision: hub revision of `path`.
        scratch: transformers config of a model with random weights, `model_type` included.
        tokenizer: the tokenizer of a `scratch` model.
        min_pixels: smaller images are enlarged to this size; None: the image processor's limit.
        max_pixels: larger images are shrunk to this size, which limits the tokens of an image;
            None: the image processor's limit.
        max_text_tokens: longer texts are truncated; image tokens never are.
        dtype: dtype of a pretrained model's weights.
        attention: `sdpa`, `sdpa_fp32` (for bf16 on a CPU), `flash_attention_2` or `eager`.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        quantization: `nf4` keeps the weights of linear layers in 4 bits (QLoRA: only with `lora`).
        liger: use the kernels of liger-kernel.
        compile: compile the layers of the language model with `torch.compile`.
    """

    path: str | None = None
    revision: str | None = None
    scratch: dict[str, Any] | None = None
    tokenizer: ScratchTokenizer | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_text_tokens: int = 512
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "sdpa_fp32", "flash_attention_2", "eager"] = "sdpa"
    gradient_checkpointing: bool = False
    quantization: Literal["nf4"] | None = None
    liger: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.path is not None and self.scratch is not None:
            raise UserError("a backbone needs either `path` or `scratch`, not both")
        if self.scratch is not None and self.tokenizer is None:
            raise UserError("a `scratch` backbone needs a `tokenizer` (vocab_size and sources)")
        if self.scratch is not None and self.quantization:
            raise UserError("quantization needs a pretrained backbone: give `path`, not `scratch`")


def build_processing(config: BackboneConfig, prompt: Prompt) -> Processing:
    """The preprocessing that goes with a backbone."""
    if config.path is not None:
        with about_key("model.backbone.path"):
            tokenizer, image_processor = load_processors(config.path, config.revision)
        settings = AutoConfig.from_pretrained(config.path, revision=config.revision)
        family = family_of(settings.model_type)
        limits = config.min_pixels, config.max_pixels
        family.set_up(image_processor, settings.to_dict(), *limits)
    else:
        if config.scratch is None or config.tokenizer is None:
            raise UserError(
                "a backbone needs either `path` or `scratch`, or model.start_from a trained one: "
                "the recipe has none of them"
            )
        family = family_of(config.scratch.get("model_type", ""))
        tokenizer = train_tokenizer(
            _texts(config.tokenizer.sources), config.tokenizer.vocab_size, family
        )
        image_processor = family.image_processor(
            config.scratch, config.min_pixels, config.max_pixels
        )
    return Processing(family, tokenizer, image_processor, prompt, config.max_text_tokens)


def build_backbone(config: BackboneConfig, processing: Processing) -> PreTrainedModel:
    """The base model, in train mode, on the CPU, or quantized on its GPU."""
    attention = "sdpa" if config.attention == FP32 else config.attention
    if attention == "flash_attention_2":
        refuse_missing_flash()
    if config.path is not None:
        quantized = nf4_weights() if config.quantization else {}
        model = load_backbone(
            config.path,
            config.dtype,
            revision=config.revision,
            attn_implementation=attention,
            **quantized,
        )
    else:
        model = AutoModel.from_config(
            scratch_config(config.scratch or {}, processing), attn_implementation=attention
        )
    set_up(model, config, processing.family)
    return model.train()


def set_up(model: PreTrainedModel, config: BackboneConfig, family: Family) -> None:
    """Applies a config's options to a model; weights stay as they are."""
    if config.attention in ("sdpa", FP32):
        set_attention(model, config.attention, family)
    project_patches(model, family)
    look_up_grids(model, family)
    if config.liger:
        use_liger(model)
    if config.gradient_checkpointing:
        checkpoint_activations(model)
    if config.compile:
        compile_layers(model, family)


def scratch_config(values: dict[str, Any], processing: Processing) -> Any:
    """A transformers config whose vocabulary and special tokens are the tokenizer's."""
    tokenizer = processing.tokenizer
    text = dict(values.get("text_config", {}))
    text |= {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.pad_token_id,
    }
    ids = {
        name: tokenizer.convert_tokens_to_ids(token)
        for token, name in processing.family.special_tokens
        if name
    }
    config: dict[str, Any] = values | {"text_config": text} | ids
    try:
        return AutoConfig.for_model(**config)
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise UserError(f"the backbone's `scratch` config is not valid: {error}") from error


def train_tokenizer(texts: Iterable[str], vocab_size: int, family: Family) -> Any:
    """A byte-level BPE tokenizer with the family's special tokens; the first of them pads."""
    special = [token for token, _ in family.special_tokens]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()  # texts that look the same are read the same
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=special[0],
        eos_token=special[0],
        additional_special_tokens=special[1:],
    )


def _texts(sources: list[str]) -> Iterator[str]:
    for source in sources:
        for pair in ShardedPairs(source):
            yield from _pair_texts(pair)


def _pair_texts(pair: Pair) -> list[str]:
    items = (pair.query, pair.positive, *pair.negatives)
    return [item.text for item in items if item.text]
