"""Models for vLLM that return only meta embeddings, not the hidden states of all tokens.

A page of 1,024 image tokens has 64 meta embeddings: returning all tokens would take 17 times the
bytes.

Shape letters: T tokens of a prompt, R its meta embeddings, H hidden width.
"""

from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.pooler import DispatchPooler, PoolingParamsUpdate
from vllm.model_executor.layers.pooler.tokwise import AllPool, pooler_for_token_embed
from vllm.model_executor.models.adapters import as_embedding_model
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.transformers_utils.repo_utils import get_hf_file_bytes
from vllm.v1.pool.metadata import PoolingMetadata


class MetaRows(AllPool):
    """Selects the rows of a prompt at its side's meta tokens.

    Args:
        first_id: token id of the first meta token; the others follow.
        num_query: number of query tokens.
        num_candidate: number of candidate tokens, which follow them.
    """

    def __init__(self, first_id: int, num_query: int, num_candidate: int):
        super().__init__()
        self.first_candidate = first_id + num_query
        self.first_id, self.end = first_id, first_id + num_query + num_candidate

    def get_pooling_updates(self, task: Any) -> PoolingParamsUpdate:
        """The token ids of each prompt are needed."""
        return PoolingParamsUpdate(requires_token_ids=True)

    def forward(
        self, hidden_states: Tensor, pooling_metadata: PoolingMetadata
    ) -> list[Tensor | None]:
        """(R, H) of each prompt; None until the last part of a prompt that is read in parts."""
        states = super().forward(hidden_states, pooling_metadata)
        prompts = pooling_metadata.get_prompt_token_ids_cpu()
        return [
            None if found is None else found[self.rows(ids).to(found.device)]
            for found, ids in zip(states, prompts, strict=True)
        ]

    def rows(self, ids: Tensor) -> Tensor:
        """Positions of a prompt's own meta tokens, without query tokens of a candidate."""
        is_candidate = (ids >= self.first_candidate) & (ids < self.end)
        is_query = (ids >= self.first_id) & (ids < self.first_candidate)
        own = is_candidate if bool(is_candidate.any()) else is_query
        return own.nonzero(as_tuple=True)[0]


def _pooler(vllm_config: VllmConfig) -> DispatchPooler:
    settings = vllm_config.model_config
    pooler = pooler_for_token_embed(settings.pooler_config, _projection(settings))
    pooler.pooling = MetaRows(**settings.hf_config.metaembed)
    return DispatchPooler({"token_embed": pooler})


def _projection(settings: Any) -> nn.Module | None:
    """The folder's projection, if it has one."""
    file = "projection/projection.safetensors"
    found = get_hf_file_bytes(file, settings.model, settings.revision)
    if found is None:
        return None
    weight = load(found)["projection"].to(settings.head_dtype)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer.to(get_current_vllm_config().device_config.device)


class _Pooled:
    """The pooler of all models."""

    def _init_pooler(self, vllm_config: VllmConfig, prefix: str = "") -> DispatchPooler:
        return _pooler(vllm_config)


class MetaEmbedQwen2VL(_Pooled, as_embedding_model(Qwen2VLForConditionalGeneration)):
    """Qwen2-VL."""


class MetaEmbedQwen2_5_VL(_Pooled, as_embedding_model(Qwen2_5_VLForConditionalGeneration)):
    """Qwen2.5-VL."""


class MetaEmbedQwen3VL(_Pooled, as_embedding_model(Qwen3VLForConditionalGeneration)):
    """Qwen3-VL."""
