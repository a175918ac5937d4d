"""Out-of-memory errors: the step, its estimated memory, and the keys to lower."""

import os
from dataclasses import asdict
from typing import Any

import lightning.pytorch as pl
import torch

from metaembed_pl.data.collate import TrainBatch
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.training.activations import Rows, num_patches
from metaembed_pl.training.memory import GIB, Running, Step, estimate
from metaembed_pl.training.memory_advice import memory_advice

CPU_WORDS = "DefaultCPUAllocator: "  # how torch's CPU allocator begins its RuntimeError
CACHE = "model.gradient_cache.max_tokens"
LOWERED = 0.8
"""If a step did not fit although the estimate did, advice aims at this share of the estimate."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, of torch on a GPU or a CPU, or of Python."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and CPU_WORDS in str(error)
    )


class OutOfMemory(pl.Callback):
    """Adds advice to an out-of-memory error, as a note for the command line.

    Args:
        strategy: its name in the recipe.
    """

    def __init__(self, strategy: str):
        self._strategy = strategy
        self._batch: TrainBatch | None = None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: TrainBatch, batch_idx: int
    ) -> None:
        """The batch that may be too large."""
        self._batch = batch

    def on_train_batch_end(self, *_: Any) -> None:
        """It was not."""
        self._batch = None

    def on_exception(self, trainer: pl.Trainer, pl_module: Any, exception: BaseException) -> None:
        """Adds the advice."""
        if self._batch is None or not is_out_of_memory(exception):
            return
        backbone = pl_module.backbone_config
        running = Running(
            num_gpus=trainer.world_size,
            strategy=self._strategy,
            precision=str(trainer.precision),
            is_checkpointed=backbone.gradient_checkpointing,
            has_mask=backbone.attention != "flash_attention_2",
            on_gpu=pl_module.device.type == "cuda",
            is_quantized=backbone.quantization is not None,
            max_chunk_tokens=pl_module.max_chunk_tokens,
        )
        step = step_of(self._batch, pl_module.embedder, pl_module.loss.both_directions)
        hint = advice(pl_module.embedder, step, running, limit_bytes(pl_module.device))
        exception.add_note(
            f"step {self._batch.step} of source {self._batch.source}, {len(self._batch.keys)} "
            f"pairs on this rank, rows of {step.query.num_tokens} and "
            f"{step.candidate.num_tokens} tokens: {hint}"
        )


def step_of(batch: TrainBatch, model: MetaEmbedder, both_directions: bool) -> Step:
    """The work of a rank for a batch."""
    vision: Any = model.backbone.config.vision_config
    return Step(
        num_pairs=batch.num_positives,
        num_negatives=0 if batch.negatives_of is None else batch.negatives_of.shape[1],
        num_questions=len(batch.keys) / batch.num_positives,
        query=_row(batch.queries, vision.patch_size),
        candidate=_row(batch.candidates, vision.patch_size),
        both_directions=both_directions,
    )


def _row(inputs: Any, patch_size: int) -> Rows:
    """The mean row of a batch, with the length of the longest one."""
    pieces = [inputs] if isinstance(inputs, dict) else [chunk.inputs for chunk in inputs]
    count = sum(len(piece["input_ids"]) for piece in pieces)
    num_tokens = max(piece["input_ids"].shape[1] for piece in pieces)
    pixels = [piece["pixel_values"] for piece in pieces if "pixel_values" in piece]
    patches = sum(num_patches(p, patch_size) for p in pixels)
    return Rows(1, num_tokens, -(-patches // count), sum(p.nbytes for p in pixels) // count)


def limit_bytes(device: torch.device) -> int:
    """The memory of a GPU, or the limit of this process."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    import resource  # not on Windows

    allowed = resource.getrlimit(resource.RLIMIT_AS)[0]
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return there if allowed == resource.RLIM_INFINITY else min(there, allowed)


def advice(model: MetaEmbedder, step: Step, running: Running, limit: int) -> str:
    """The estimate by part, and the keys to lower, cheapest first."""
    memory = estimate(model, step, running)
    parts = sorted(asdict(memory).items(), key=lambda part: -part[1])
    held = ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts if size > GIB / 20)
    settings = memory_advice(model, step, running, min(limit, round(LOWERED * memory.total)))
    if not any(setting.startswith(CACHE) for setting in settings):
        settings.insert(*_smaller_chunks(step, running, settings))
    settings += ["fewer data.num_negatives"] * (step.num_negatives > 0)
    settings.append("a lower model.backbone.max_pixels or max_text_tokens (shorter rows)")
    return (
        f"estimated {memory.total / GIB:.1f} GiB ({held}) of {limit / GIB:.1f}; change one of, "
        f"cheapest first: {'; '.join(settings)}"
    )


def _smaller_chunks(step: Step, running: Running, settings: list[str]) -> tuple[int, str]:
    """A key that does not change the gradient, and its place before those that change the batch."""
    if running.max_chunk_tokens is not None:
        return 0, f"{CACHE}: {running.max_chunk_tokens // 2} (smaller chunks, the same gradient)"
    tokens = max(rows.num_rows * rows.num_tokens for rows in step.calls)
    place = next((i for i, s in enumerate(settings) if s.startswith("data.")), len(settings))
    return place, f"{CACHE}: {tokens // 4} (the same gradient, slower by about a third)"
