"""Tiny things made in code: pictures, shards, backbones."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from metaembed_pl.data.shards import ShardWriter
from metaembed_pl.item import Item, Pair
from metaembed_pl.model.backbone import (
    BackboneConfig,
    ScratchTokenizer,
    build_backbone,
    train_tokenizer,
)
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.family import family_of
from metaembed_pl.model.processing import Processing, Prompt

WORDS = (
    "red green blue round square small large apple flag cat tree star moon sun fish bird".split()
)

_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}
_LLAMA = _TEXT | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
}
_SIGLIP = _VISION | {"model_type": "siglip_vision_model", "vision_use_head": False}


def _mrope(*section: int) -> dict:
    parameters = {"rope_type": "default", "mrope_section": list(section), "rope_theta": 1e4}
    return _TEXT | {"rope_parameters": parameters}


QWEN25_VL = {
    "model_type": "qwen2_5_vl",
    "text_config": _mrope(2, 3, 3),
    "vision_config": {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    },
}

# A model of every family: its `model_type` -> a transformers config to make it from scratch.
CONFIGS = {
    "qwen2_vl": {
        "text_config": _mrope(2, 3, 3),
        "vision_config": {
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "mlp_ratio": 2,
            "num_heads": 2,
            "patch_size": 14,
        },
    },
    "qwen2_5_vl": QWEN25_VL,
    "qwen3_vl": {
        "text_config": _mrope(4, 2, 2) | {"head_dim": 16},
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
    },
    "mllama": {
        "text_config": _LLAMA
        | {"num_hidden_layers": 3, "cross_attention_layers": [1], "pad_token_id": 0},
        "vision_config": {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 2,
            "image_size": 28,
            "patch_size": 14,
            "intermediate_layers_indices": [0, 1],
            "vision_output_dim": 96,
        },
    },
    "paligemma": {
        "projection_dim": 32,
        "hidden_size": 32,
        "text_config": _TEXT | {"model_type": "gemma", "head_dim": 16},
        "vision_config": _SIGLIP | {"patch_size": 14},
    },
    "gemma3": {
        "mm_tokens_per_image": 4,
        "text_config": _TEXT
        | {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision_config": _SIGLIP | {"patch_size": 7},
    },
    "idefics3": {
        "scale_factor": 2,
        "text_config": _LLAMA | {"model_type": "llama"},
        "vision_config": _VISION | {"patch_size": 7},
    },
    "smolvlm": {
        "scale_factor": 2,
        "text_config": _LLAMA | {"model_type": "llama"},
        "vision_config": _VISION | {"patch_size": 7},
    },
}
CONFIGS = {name: {"model_type": name} | config for name, config in CONFIGS.items()}
# Smallest and largest area of an image, where a family lets one choose.
PIXEL_LIMITS = {
    "qwen2_vl": (28 * 28, 84 * 84),
    "qwen2_5_vl": (28 * 28, 84 * 84),
    "qwen3_vl": (28 * 28, 84 * 84),
    "idefics3": (None, 56 * 56),
    "smolvlm": (None, 56 * 56),
}


def picture(seed: int, size: tuple[int, int] = (56, 56)) -> Image.Image:
    """A picture of noise; the same for the same seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def text(seed: int, length: int = 4) -> str:
    """A few words; the same for the same seed."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, length))


def pairs(count: int, num_negatives: int = 1, first: int = 0) -> list[Pair]:
    """Text -> picture, with pictures as hard negatives."""
    return [
        Pair(
            f"pair-{i}",
            Item(text(i)),
            Item(image=picture(i), id=f"picture-{i}"),
            tuple(Item(image=picture(10_000 + 10 * i + j)) for j in range(num_negatives)),
        )
        for i in range(first, first + count)
    ]


def shards(
    folder: Path, count: int, num_negatives: int = 1, pairs_per_shard: int = 10, first: int = 0
) -> Path:
    """A folder of shards of `pairs`."""
    with ShardWriter(folder, folder.name, pairs_per_shard=pairs_per_shard) as writer:
        for pair in pairs(count, num_negatives, first):
            writer.write(pair)
    return folder


def processing(config: dict | None = None, padding_side: str = "right", **kwargs) -> Processing:
    """A processing with a tokenizer trained on `WORDS`."""
    config = config or QWEN25_VL
    family = family_of(config["model_type"])
    tokenizer = train_tokenizer(WORDS * 3, 300, family)
    limits = PIXEL_LIMITS.get(family.model_type, (None, None))
    image_processor = family.image_processor(config, *limits)
    prompt = kwargs.pop("prompt", Prompt())
    return Processing(
        family, tokenizer, image_processor, prompt, padding_side=padding_side, **kwargs
    )


def embedder(
    groups: tuple[str, ...] = ("1x1", "2x4", "4x8"),
    layout: str = "own",
    projection: int | None = None,
    config: dict | None = None,
    seed: int = 0,
    **processing_settings,
) -> MetaEmbedder:
    """A tiny MetaEmbedder with random weights, in eval mode."""
    torch.manual_seed(seed)
    prepared = processing(config, **processing_settings)
    backbone_config = BackboneConfig(
        scratch=config or QWEN25_VL, tokenizer=ScratchTokenizer(300, ["unused"])
    )
    backbone = build_backbone(backbone_config, prepared)
    return MetaEmbedder(backbone, prepared, groups, layout, projection).eval()


tiny_embedder = embedder
__all__ = [
    "embedder",
    "pairs",
    "picture",
    "processing",
    "shards",
    "text",
    "tiny_embedder",
]
