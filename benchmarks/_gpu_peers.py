"""A training step of sentence-transformers and of colpali-engine, at real shapes."""

import copy
from typing import Any

import torch
from _clock import fastest
from _peers import HiddenStates, without_torchvision
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from metaembed_pl.model.family import family_of
from metaembed_pl.model.lora import LoraConfig, set_trainable


def measure_peer(
    name: str,
    config: dict[str, Any],
    batch: dict[str, dict[str, Tensor]],
    device: str,
    min_s: float,
) -> dict[str, Any]:
    """Steps of a peer on rows that our batch has, with AdamW and autocast.

    Args:
        name: a key of `PEERS`.
        config: of the backbone.
        batch: the rows of queries and candidates.
        device: `cpu` or `cuda`.
        min_s: how long steps are repeated.
    """
    trainee = PEERS[name](AutoConfig.for_model(**config)).to(device).train()
    trained = [p for p in trainee.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    rows = {
        side: {k: v.to(device) for k, v in inputs.items() if k != "slot_index"}
        for side, inputs in batch.items()
    }

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = trainee(rows["query"], rows["candidate"])
        loss.backward()
        optimizer.step()

    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = fastest(step, device, min_s)
    tokens = sum(int(inputs["attention_mask"].sum()) for inputs in rows.values())
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "step_s": seconds,
        "pairs_per_s": len(rows["query"]["input_ids"]) / seconds,
        "tokens_per_s": tokens / seconds,
        "memory_bytes": memory,
    }


def _plain_backbone(config: Any, kind: Any = AutoModel.from_config, **given: Any) -> Any:
    """As a peer's user has it: plain transformers, LoRA on the language model, checkpointing."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = kind(config, **given)
    model.to(torch.bfloat16)
    set_trainable(model, family_of(config.model_type), LoraConfig(), train_vision=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class _SentenceTransformers(nn.Module):
    """One vector an item, the last token's, as sentence-transformers trains such models."""

    def __init__(self, config: Any):
        super().__init__()
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

        backbone = _plain_backbone(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        width = config.get_text_config().hidden_size
        modules = [HiddenStates(backbone), Pooling(width, pooling_mode="lasttoken"), Normalize()]
        self.model = SentenceTransformer(modules=modules, device="cpu")
        self.loss = MultipleNegativesRankingLoss(self.model)

    def forward(self, queries: dict[str, Tensor], candidates: dict[str, Tensor]) -> Tensor:
        """The loss of their own class over queries and candidates of two forward calls."""
        embedded = [self.model(dict(rows))["sentence_embedding"] for rows in (queries, candidates)]
        count = len(embedded[0])
        parts = [embedded[0], embedded[1][:count], embedded[1][count:]]
        return self.loss.compute_loss_from_embeddings(parts, torch.empty(0))


class _Colpali(nn.Module):
    """A vector of 128 for every token and patch, as colpali-engine trains ColQwen2.5."""

    def __init__(self, config: Any):
        super().__init__()
        without_torchvision()
        from colpali_engine.loss import ColbertPairwiseCELoss  # pyright: ignore
        from colpali_engine.models.qwen2_5.colqwen2_5.modeling_colqwen2_5 import (  # pyright: ignore
            ColQwen2_5,
        )

        self.model = _plain_backbone(copy.deepcopy(config), ColQwen2_5)
        self.loss = ColbertPairwiseCELoss()

    def forward(self, queries: dict[str, Tensor], candidates: dict[str, Tensor]) -> Tensor:
        """Their loss of queries and their positives."""
        embedded = [self.model(**_unpacked(rows)) for rows in (queries, candidates)]
        return self.loss(embedded[0], embedded[1][: len(embedded[0])])


def _unpacked(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their model takes the patches of each image as a row of its own."""
    if "pixel_values" not in rows:
        return rows
    counts = rows["image_grid_thw"].prod(dim=1).tolist()
    parts = rows["pixel_values"].split(counts)
    return {**rows, "pixel_values": nn.utils.rnn.pad_sequence(list(parts), batch_first=True)}


PEERS = {"sentence-transformers": _SentenceTransformers, "colpali-engine": _Colpali}
