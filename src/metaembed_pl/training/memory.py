"""Estimate of GPU memory in training, by part.

weights      in their dtype, or this rank's share of them
gradients    of trained weights; twice with DDP (its buckets)
optimizer    AdamW's two moments; DeepSpeed's fp32 copy of bf16 weights
activations  tensors kept for the backward pass, and the peak of computing one layer; with gradient
             caching those of one chunk, and the outputs of a frozen vision tower for all images
gathered     meta embeddings of all ranks' positives, and of the rank's own queries and candidates
loss         argmax indices, logits and one tile of products
reserve      CUDA, NCCL and fragmentation; a rule of thumb
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import Tensor, nn

from metaembed_pl.late_interaction import CPU_TILE_ELEMENTS, GPU_TILE_ELEMENTS
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.training.activations import FP32_BYTES, Precision, Rows, activation_bytes

GIB = 2**30
CUDA_BYTES = 1.5 * GIB  # context, cuBLAS workspaces, NCCL buffers
FRAGMENTED = 0.1  # of the activations
LIVE_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters
BUCKET_ELEMENTS = 2 * 10**8  # Lightning's reduce and all-gather buckets of DeepSpeed
NF4_BYTES = 4.127 / 8  # a weight in 4 bits with its double-quantized scales (QLoRA, section 3)


@dataclass(frozen=True)
class Step:
    """The work of one rank in a step.

    Args:
        num_pairs: candidates of this rank, each with at least one query.
        num_negatives: hard negatives a query.
        query: one query's row; `num_rows` is ignored.
        candidate: likewise.
        both_directions: see `MMRLoss`.
        num_questions: queries a candidate has, on average.
    """

    num_pairs: int
    num_negatives: int
    query: Rows
    candidate: Rows
    both_directions: bool = False
    num_questions: float = 1

    @property
    def num_queries(self) -> int:
        """Queries of this rank."""
        return round(self.num_pairs * self.num_questions)

    @property
    def calls(self) -> tuple[Rows, Rows]:
        """The two forward calls."""
        num_candidates = self.num_pairs + self.num_queries * self.num_negatives
        return (
            replace(self.query, num_rows=self.num_queries),
            replace(self.candidate, num_rows=num_candidates),
        )


@dataclass(frozen=True)
class Running:
    """The setting in which a step runs.

    Args:
        num_gpus: ranks.
        strategy: Lightning's name, such as `ddp` or `deepspeed_stage_3`.
        precision: Lightning's name, such as `bf16-mixed`.
        is_checkpointed: gradient checkpointing.
        has_mask: attention saves a mask; False for flash attention.
        on_gpu: on the CPU dropout saves more, tiles are smaller and CUDA needs no memory.
        is_quantized: frozen linear layers have 4 bits.
        max_chunk_tokens: of gradient caching; None: all rows at once.
    """

    num_gpus: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    is_checkpointed: bool = False
    has_mask: bool = True
    on_gpu: bool = True
    is_quantized: bool = False
    max_chunk_tokens: int | None = None

    @property
    def stage(self) -> int:
        """DeepSpeed's ZeRO stage: from 1 on it shards the optimiser, 2 gradients, 3 weights."""
        return int(self.strategy.split("_stage_")[1][0]) if "_stage_" in self.strategy else 0

    @property
    def is_offloaded(self) -> bool:
        """Whether the optimiser state is in CPU memory."""
        return "offload" in self.strategy

    @property
    def is_half(self) -> bool:
        """Whether matrix products run in 16 bits."""
        return "16" in self.precision


@dataclass(frozen=True)
class Memory:
    """Bytes of a GPU, by part."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    gathered: int
    loss: int
    reserve: int

    @property
    def total(self) -> int:
        """All parts, at the peak of a step after the first."""
        return sum(getattr(self, field.name) for field in fields(self))


def estimate(model: MetaEmbedder, step: Step, running: Running) -> Memory:
    """The memory of one GPU.

    Args:
        model: may be on the meta device.
        step: what a rank computes; lengths of the longest rows give the largest memory.
        running: number of GPUs, strategy and so on.
    """
    activations = max(
        activation_bytes(
            model.backbone,
            model.processing.family,
            calls,
            number_widths(model, running),
            running.is_checkpointed,
            running.has_mask,
        )
        for calls in _graphs(step, running)
    )
    if running.max_chunk_tokens is not None:
        activations += _seen_bytes(model, step, running)
    return Memory(
        weights=_weight_bytes(model, running),
        gradients=_gradient_bytes(model, running),
        optimizer=_optimizer_bytes(model, running),
        activations=activations,
        gathered=_gathered_bytes(model, step, running),
        loss=_loss_bytes(model, step, running),
        reserve=round(CUDA_BYTES + FRAGMENTED * activations) if running.on_gpu else 0,
    )


def _graphs(step: Step, running: Running) -> list[tuple[Rows, ...]]:
    """Forward calls whose graphs are alive together: all, or with gradient caching one chunk."""
    if running.max_chunk_tokens is None:
        return [step.calls]
    chunks = []
    for rows in step.calls:
        fitting = max(1, running.max_chunk_tokens // rows.num_tokens)
        chunks.append((replace(rows, num_rows=min(fitting, rows.num_rows)),))
    return chunks


def _seen_bytes(model: MetaEmbedder, step: Step, running: Running) -> int:
    """Bytes of a frozen vision tower's outputs for all images, for the second pass."""
    if not model.vision_is_frozen:
        return 0
    merged = 4 if model.processing.family.packs_images else 1  # patches that become one token
    tokens = sum(rows.num_rows * rows.num_patches // merged for rows in step.calls)
    text: Any = model.backbone.config.get_text_config()
    return tokens * text.hidden_size * number_widths(model, running).compute_bytes


def number_widths(model: MetaEmbedder, running: Running) -> Precision:
    """The sizes of numbers in the backbone, from its weights and the precision."""
    held = _held_bytes(next(model.backbone.get_input_embeddings().parameters()), running)
    mixed = "mixed" in running.precision and running.is_half and not running.stage
    return Precision(
        compute_bytes=2 if running.is_half else held,
        residual_bytes=held,
        dropped_bytes=1 if running.on_gpu else FP32_BYTES,
        has_autocast=mixed,
    )


def _held_bytes(weight: Tensor, running: Running) -> int:
    """Bytes per number in the run: DeepSpeed and `true` precisions cast all floating-point ones."""
    cast = running.is_half and (running.stage or "true" in running.precision)
    return 2 if cast and weight.is_floating_point() else weight.element_size()


def _sizes(model: nn.Module, running: Running, trained: bool) -> Iterator[tuple[int, int]]:
    for weight in model.parameters():
        if weight.requires_grad or not trained:
            yield weight.numel(), _held_bytes(weight, running)


def _weight_bytes(model: MetaEmbedder, running: Running) -> int:
    sizes = list(_sizes(model, running, trained=False))
    held = sum(count * size for count, size in sizes)
    if running.is_quantized:
        in_4_bits = [
            module.weight
            for module in model.backbone.modules()
            if isinstance(module, nn.Linear) and not module.weight.requires_grad
        ]
        held -= sum(w.numel() * w.element_size() for w in in_4_bits)
        held += round(sum(w.numel() for w in in_4_bits) * NF4_BYTES)
    if running.stage < 3:
        return held
    count = sum(count for count, _ in sizes)
    return held // running.num_gpus + min(count, LIVE_PARAMETERS) * held // count


def _gradient_bytes(model: MetaEmbedder, running: Running) -> int:
    sizes = list(_sizes(model, running, trained=True))
    held = sum(count * size for count, size in sizes)
    if running.stage >= 2:
        bucket = min(sum(count for count, _ in sizes), BUCKET_ELEMENTS) * 2
        return held // running.num_gpus + bucket
    return held * (2 if running.num_gpus > 1 else 1)


def _optimizer_bytes(model: MetaEmbedder, running: Running) -> int:
    if running.is_offloaded:
        return 0
    sizes = list(_sizes(model, running, trained=True))
    if running.stage and running.is_half:
        return sum(count for count, _ in sizes) * 3 * FP32_BYTES // running.num_gpus
    share = running.num_gpus if running.stage else 1
    return sum(2 * count * size for count, size in sizes) // share


def _gathered_bytes(model: MetaEmbedder, step: Step, running: Running) -> int:
    r_q, r_c, _ = model.groups[-1]
    own = step.num_queries * (r_q + r_c * step.num_negatives) + step.num_pairs * r_c
    gathered = step.num_pairs * running.num_gpus * r_c if running.num_gpus > 1 else 0
    if step.both_directions and running.num_gpus > 1:
        gathered += step.num_queries * running.num_gpus * r_q
    return 2 * (own + gathered) * model.width * FP32_BYTES  # with their gradients


def _loss_bytes(model: MetaEmbedder, step: Step, running: Running) -> int:
    r_q, r_c, _ = model.groups[-1]
    num_positives = step.num_pairs * running.num_gpus
    pairs = step.num_queries * num_positives
    times = 2 if step.both_directions else 1
    winners = pairs * sum(group.r_q for group in model.groups) * (1 if r_c <= 256 else 4)
    logits = 4 * len(model.groups) * (pairs + step.num_queries * step.num_negatives) * FP32_BYTES
    most = GPU_TILE_ELEMENTS if running.on_gpu else CPU_TILE_ELEMENTS
    tile = 2 * min(most, pairs * r_q * r_c) * FP32_BYTES
    # A tile's gradient of the candidates, before it is added to that of all.
    of_tile = min(num_positives, max(1, most // (r_q * r_c * step.num_queries)))
    tile += of_tile * r_c * model.width * FP32_BYTES
    own = 2 * step.num_queries * step.num_negatives * r_q * r_c * FP32_BYTES
    return times * (winners + logits) + tile + own
