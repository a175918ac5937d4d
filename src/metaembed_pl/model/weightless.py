"""A model without its weights, built on the meta device from a config, for counting.

The config of a pretrained backbone comes from the first of these that has it: its folder, the local
hub cache, the shapes in the package (recipes/configs), the hub. Weights are never read.
"""

import re
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedModel

from metaembed_pl.errors import UserError, did_you_mean
from metaembed_pl.model.backbone import BackboneConfig, build_processing, scratch_config
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.family import family_of
from metaembed_pl.model.hub_faults import why_not
from metaembed_pl.model.image_processors import load_image_processor
from metaembed_pl.model.model_folder import find_model_folder, read_settings
from metaembed_pl.model.processing import Processing, Prompt

TOKENIZER_FILES = ("tokenizer*", "vocab.*")
CHARACTERS_A_TOKEN = 4  # of English, by the byte-pair vocabularies of these models


class RoughTokenizer:
    """Replaces a tokenizer that is not available: exact for special tokens, rough for words.

    >>> rough = RoughTokenizer()
    >>> ids = rough(["<|image_pad|><|image_pad|>", "a small red apple"])["input_ids"]
    >>> [len(row) for row in ids]
    [2, 5]
    """

    pad_token_id = eos_token_id = 0

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        """Ids that are all 0, as many as a tokenizer would give."""
        return {"input_ids": [[0] * self._count(text) for text in texts]}

    def convert_tokens_to_ids(self, token: str) -> int:
        """The id of a special token: one that no text has."""
        return 1

    def _count(self, text: str) -> int:
        words, num_special = re.subn(r"<[^<>\s]{1,40}>", "", text)
        return num_special + -(-len(words) // CHARACTERS_A_TOKEN)


@dataclass(frozen=True)
class WeightlessModel:
    """A model on the meta device.

    Args:
        model: with its processing, or one with a `RoughTokenizer`.
        source: of its config, in words.
        counts_tokens: the tokenizer is the model's own.
    """

    model: MetaEmbedder
    source: str
    counts_tokens: bool


def weightless_model(
    assemble: Callable[[PreTrainedModel, Processing], MetaEmbedder],
    backbone: BackboneConfig,
    prompt: Prompt,
    start_from: str | None,
    shapes: Path,
) -> WeightlessModel:
    """The model that a recipe trains.

    Args:
        assemble: makes the embedder, from a backbone and its preprocessing.
        backbone: the recipe's.
        prompt: the recipe's.
        start_from: a model folder on this machine; None: a new model.
        shapes: the configs that come with the package, in a folder for each hub id.

    Raises:
        UserError: no such model, an unsupported family, a setting that does not fit the model.
    """
    counts_tokens = True
    if start_from is not None:
        folder, source = find_model_folder(start_from), start_from
        config = AutoConfig.from_pretrained(_backbone_place(folder, shapes))
        processing = Processing.load(folder / "processing")
    elif backbone.path is None:
        processing, source = build_processing(backbone, prompt), "its config in the recipe"
        config = scratch_config(backbone.scratch or {}, processing)
    else:
        place, source = _place(backbone.path, backbone.revision, shapes)
        config = AutoConfig.from_pretrained(place, revision=backbone.revision)
        processing, counts_tokens = _processing(backbone, prompt, config, place)
    is_new = start_from is None and backbone.path is None
    model = _on_meta(config, "float32" if is_new else backbone.dtype)
    with torch.device("meta"):
        return WeightlessModel(assemble(model, processing), source, counts_tokens)


def _backbone_place(folder: Path, shapes: Path) -> str:
    """Where the config of a model folder's backbone is."""
    base = read_settings(folder).get("backbone")
    if base is None:
        return str(folder / "backbone")
    path = base["path"]
    path = str((folder / path).resolve()) if path.startswith(".") else path
    return _place(path, base.get("revision"), shapes, "model.start_from: its base")[0]


def count_parameters(model: MetaEmbedder) -> dict[str, dict[str, int]]:
    """Parameters by part: how many there are, and how many of them are trained."""
    family = model.processing.family
    vision = f"backbone.{family.vision_module}."
    projector = f"backbone.{family.projector_module}."
    parts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            part = "adapters"
        elif name.startswith((vision, projector)):
            part = "vision tower"
        elif name.startswith("backbone."):
            part = "language model"
        else:
            part = name.partition(".")[0].replace("_", " ")
        found = parts.setdefault(part, {"total": 0, "trained": 0})
        found["total"] += parameter.numel()
        found["trained"] += parameter.numel() * parameter.requires_grad
    sums = {key: sum(part[key] for part in parts.values()) for key in ("total", "trained")}
    return {"all": sums, **parts}


def _on_meta(config: Any, dtype: str) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModel.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation="sdpa"
        ).train()


def _place(
    path: str, revision: str | None, shapes: Path, key: str = "model.backbone.path"
) -> tuple[str, str]:
    """The place of a config for `from_pretrained`, and its description."""
    if Path(path).is_dir():
        return path, f"the folder {path}"
    with suppress(HFValidationError):
        cached = try_to_load_from_cache(path, "config.json", revision=revision)
        if isinstance(cached, str):
            return str(Path(cached).parent), "the hub's cache on this machine"
    if (shapes / path / "config.json").is_file():
        return str(shapes / path), "the shapes that come with the package"
    try:
        AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        known = [f.parent.relative_to(shapes).as_posix() for f in shapes.rglob("config.json")]
        hint = did_you_mean(path, known)
        raise UserError(f"{key}: {path}: no such folder; {why_not(path, error)}{hint}") from error
    return path, "the hub"


def _processing(
    backbone: BackboneConfig, prompt: Prompt, config: Any, place: str
) -> tuple[Processing, bool]:
    """The preprocessing, and whether it has the model's own tokenizer."""
    family = family_of(config.model_type)
    # Without its files, transformers would make an empty tokenizer of the model's kind.
    known = not Path(place).is_dir() or any(
        any(Path(place).glob(files)) for files in TOKENIZER_FILES
    )
    tokenizer: Any = RoughTokenizer()
    if known:
        tokenizer = AutoTokenizer.from_pretrained(place, revision=backbone.revision)
    image_processor = load_image_processor(place, backbone.revision)
    family.set_up(image_processor, config.to_dict(), backbone.min_pixels, backbone.max_pixels)
    made = Processing(family, tokenizer, image_processor, prompt, backbone.max_text_tokens)
    return made, known
