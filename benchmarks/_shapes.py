"""Models of real shapes with random weights, and pairs with a realistic mix: no hub needed."""

import io
import json
import random
import re
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel

from metaembed_pl.budget import PAPER_GROUPS
from metaembed_pl.data.batches import TrainingBatches
from metaembed_pl.data.plan import Plan, PlannedSource
from metaembed_pl.data.shards import ShardedPairs, ShardWriter
from metaembed_pl.item import Item, Pair
from metaembed_pl.model.backbone_options import checkpoint_activations, refuse_missing_flash
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.family import family_of
from metaembed_pl.model.image_processors import load_image_processor
from metaembed_pl.model.kernels import project_patches, set_attention
from metaembed_pl.model.lora import LoraConfig, set_trainable
from metaembed_pl.model.processing import Processing, Prompt
from metaembed_pl.model.weightless import RoughTokenizer

CONFIGS = Path(__file__).parent.parent / "recipes" / "configs" / "Qwen"
MAX_PIXELS = 802816  # 1,024 image tokens, as recipes/qwen7b.yaml
TINY_PIXELS = 112 * 112
# What the layers of a tiny stand-in have instead; names and kinds of layers are the real ones.
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
}
TINY_VISION = {
    "depth": 2,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}
# Width and height: thumbnails, photographs, slides, pages of documents.
SIZES = [(224, 224), (336, 448), (640, 480), (768, 1024), (1280, 720), (1240, 1754)]


@dataclass(frozen=True)
class Case:
    """How a step is run.

    Args:
        size: `3B` or `7B`.
        attention: `sdpa` or `flash_attention_2`.
        is_checkpointed: gradient checkpointing.
        chunk_tokens: gradient caching in chunks of so many tokens; None: all rows at once.
    """

    size: str
    attention: str = "sdpa"
    is_checkpointed: bool = True
    chunk_tokens: int | None = None

    def __str__(self) -> str:
        parts = [self.size, self.attention.removesuffix("_attention_2")]
        parts += ["checkpointed"] * self.is_checkpointed
        parts += [f"cached in chunks of {self.chunk_tokens} tokens"] * bool(self.chunk_tokens)
        return ", ".join(parts)


class RandomTokenizer(RoughTokenizer):
    """Ids all over the vocabulary for words, the model's own for special tokens.

    Args:
        vocab_size: of the model.
        marks: special tokens and their ids.
    """

    def __init__(self, vocab_size: int, marks: dict[str, int]):
        self._size, self._marks = vocab_size, marks
        self._parts = re.compile("(" + "|".join(map(re.escape, marks)) + ")")

    def convert_tokens_to_ids(self, token: str) -> int:
        """The id of a special token."""
        return self._marks.get(token, 1)

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        """About as many ids as a real tokenizer would produce."""
        return {"input_ids": [self._ids(text) for text in texts]}

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in filter(None, self._parts.split(text)):
            if part in self._marks:
                ids.append(self._marks[part])
            else:
                first = zlib.crc32(part.encode())
                ids += [(first + 7919 * i) % (self._size // 2) for i in range(self._count(part))]
        return ids


def config_of(size: str, is_tiny: bool) -> dict[str, Any]:
    """The config of Qwen2.5-VL of a size, or of its tiny stand-in."""
    values = json.loads((CONFIGS / f"Qwen2.5-VL-{size}-Instruct" / "config.json").read_text())
    if is_tiny:
        values["text_config"] |= TINY_TEXT
        values["vision_config"] |= TINY_VISION
    return values


def build(case: Case, device: str, is_tiny: bool) -> MetaEmbedder:
    """The embedder that recipes/qwen7b.yaml trains, of random weights, drawn where it will be.

    Raises:
        UserError: flash attention was asked for and is not here.
    """
    if case.attention == "flash_attention_2":
        refuse_missing_flash()
    folder = CONFIGS / f"Qwen2.5-VL-{case.size}-Instruct"
    config: Any = AutoConfig.for_model(**config_of(case.size, is_tiny))
    torch.manual_seed(0)
    with torch.device(device):
        backbone: Any = AutoModel.from_config(
            config, dtype=torch.bfloat16, attn_implementation=case.attention
        )
    family = family_of(config.model_type)
    if case.attention == "sdpa":
        set_attention(backbone, "sdpa", family)
    project_patches(backbone, family)
    if case.is_checkpointed:
        checkpoint_activations(backbone)
    image_processor = load_image_processor(str(folder))
    max_pixels = TINY_PIXELS if is_tiny else MAX_PIXELS
    family.set_up(image_processor, config.to_dict(), None, max_pixels)
    marks = {
        "<|image_pad|>": config.image_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
    }
    tokenizer = RandomTokenizer(config.get_text_config().vocab_size, marks)
    processing = Processing(family, tokenizer, image_processor, Prompt())
    set_trainable(backbone.train(), family, LoraConfig(), train_vision=False)
    return MetaEmbedder(backbone, processing, PAPER_GROUPS, "both").to(device)


def write_pairs(folder: Path, count: int, is_tiny: bool) -> None:
    """Shards of pairs with one hard negative: texts, pictures and both, short and long."""
    with ShardWriter(folder, "mixed", pairs_per_shard=max(1, count // 4)) as writer:
        for pair in _pairs(count, is_tiny):
            writer.write(pair)


def _pairs(count: int, is_tiny: bool) -> Iterator[Pair]:
    chance = random.Random(0)
    for i in range(count):
        with_picture = chance.random() < 0.4  # of the queries; the others ask in words alone
        query = _item(chance, 10, 1.0, 0.4 if with_picture else 0.0, is_tiny)
        # Candidates are pictures, pages with their words, or passages.
        candidates = [_item(chance, 60, 0.5, 0.75, is_tiny) for _ in range(2)]
        yield Pair(f"pair-{i}", query, candidates[0], (candidates[1],))


def _item(
    chance: random.Random, num_words: int, has_text: float, has_picture: float, is_tiny: bool
) -> Item:
    """A random item; `num_words` is the median length of its text."""
    shows = chance.random() < has_picture
    reads = not shows or chance.random() < has_text
    length = min(400, max(1, round(chance.lognormvariate(0, 0.8) * num_words)))
    words = " ".join(f"w{chance.randrange(10**5)}" for _ in range(length))
    size = chance.choice(SIZES)
    if is_tiny:
        size = size[0] // 8, size[1] // 8
    return Item(words if reads else None, _picture(chance, size) if shows else None)


def _picture(chance: random.Random, size: tuple[int, int]) -> bytes:
    """A JPEG of soft shapes: noise would take far longer to decode than a photograph."""
    noise = np.random.default_rng(chance.randrange(2**32)).integers(0, 256, (24, 18, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
    return file.getvalue()


def batches(folder: Path, model: MetaEmbedder, case: Case, num_pairs: int) -> TrainingBatches:
    """This rank's training batches, read and processed as `fit` does.

    Args:
        folder: what `write_pairs` wrote.
        model: whose preprocessing is used.
        case: whether they come in chunks.
        num_pairs: of all ranks.
    """
    pairs = ShardedPairs(folder)
    plan = Plan([PlannedSource("mixed", tuple(pairs.shard_sizes))], num_pairs)
    found = TrainingBatches([pairs], [1], plan, model.processor())
    if case.chunk_tokens is not None:
        found.max_chunk_tokens = case.chunk_tokens
    return found


@cache
def first_batch(case: Case, num_pairs: int, is_tiny: bool) -> dict[str, dict[str, Any]]:
    """The rows of the first batch of steps, in one piece a side."""
    case = replace(case, chunk_tokens=None)
    model = build(case, "meta", is_tiny)
    with tempfile.TemporaryDirectory() as folder:
        write_pairs(Path(folder), max(64, 2 * num_pairs), is_tiny)
        batch: Any = batches(Path(folder), model, case, num_pairs).load(0)
    return {"query": batch.queries, "candidate": batch.candidates}


def pieces(side: Any) -> list[dict[str, Any]]:
    """The forward calls of one side of a batch: in one piece, or in chunks."""
    return [side] if isinstance(side, dict) else [chunk.inputs for chunk in side]
