"""Find settings that bring the memory per GPU under a limit."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from metaembed_pl.errors import UserError
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.training.gradient_cache import GradientCacheConfig
from metaembed_pl.training.memory import GIB, Memory, Running, Step, estimate

CHUNK_TOKENS = GradientCacheConfig().max_tokens


def parse_gib(text: str) -> int:
    """Bytes of a GPU's memory such as 80GB, 80 or 24GiB; GB is 2^30 bytes, as GPUs are sold.

    >>> parse_gib("80GB") == 80 * 2**30
    True
    """
    number = text.strip().lower().removesuffix("b").removesuffix("i").removesuffix("g")
    try:
        value = float(number)
    except ValueError:
        value = 0.0
    if not 0 < value < 10**6:
        raise UserError(f"the memory of a GPU is written 80GB, got {text!r}")
    return round(value * GIB)


def memory_advice(model: MetaEmbedder, step: Step, running: Running, limit: int) -> list[str]:
    """Settings that each bring the memory of a GPU under the limit, cheapest first.

    If there is none: all of them together, with the largest batch that then fits.
    """

    def fits(step: Step = step, **changes: Any) -> bool:
        return estimate(model, step, replace(running, **changes)).total <= limit

    num_gpus, alone, together = running.num_gpus, [], {}
    for name, changes in _settings(step, running):
        together |= {key: (name, value) for key, value in changes.items()}
        if fits(**changes):
            alone.append(name)
    if batch := _largest_batch(step, num_gpus, fits):
        alone.append(batch)
    factors = (factor for factor in (2, 4, 8) if step.num_pairs % factor == 0)
    alone += [
        f"{num_gpus * factor} GPUs with the same global batch"
        for factor in factors
        if fits(replace(step, num_pairs=step.num_pairs // factor), num_gpus=num_gpus * factor)
    ][:1]
    if alone or not together:
        return alone
    changes = {key: value for key, (_, value) in together.items()}
    names = [name for name, _ in together.values()]
    if fits(**changes):
        return [" and ".join(names)]
    batch = _largest_batch(step, num_gpus, lambda smaller: fits(smaller, **changes))
    return [" and ".join([*names, batch])] if batch else []


def last_resort(memory: Memory, limit: int) -> str:
    """What to change if even one pair per GPU is too much for `limit` bytes."""
    of_model = memory.weights + memory.gradients + memory.optimizer + memory.reserve
    if of_model > limit:
        return (
            f"no batch, since weights, gradients, optimizer and reserve take {of_model / GIB:.1f}: "
            "share them among more GPUs (trainer.strategy: deepspeed_stage_3), or give a smaller "
            "model.backbone.path; with model.lora, model.backbone.quantization: nf4"
        )
    return (
        "not even one pair a GPU fits: lower model.backbone.max_pixels, "
        "model.backbone.max_text_tokens or data.num_negatives"
    )


def _settings(step: Step, running: Running) -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings other than the batch, with the fields of `Running` that they change."""
    if not running.is_checkpointed:
        name = "model.backbone.gradient_checkpointing: true (slower by about a third)"
        yield name, {"is_checkpointed": True}
    most = max(rows.num_rows * rows.num_tokens for rows in step.calls)
    if running.max_chunk_tokens is None and most > CHUNK_TOKENS:
        name = f"model.gradient_cache.max_tokens: {CHUNK_TOKENS} (slower by about a third)"
        yield name, {"max_chunk_tokens": CHUNK_TOKENS}
    if running.num_gpus > 1:
        for stage in range(max(2, running.stage + 1), 4):
            name = f"deepspeed_stage_{stage}"
            yield f"trainer.strategy: {name}", {"strategy": name}
    if not running.is_half:
        yield "trainer.precision: bf16-true", {"precision": "bf16-true"}


def _largest_batch(step: Step, num_gpus: int, fits: Callable[[Step], bool]) -> str | None:
    for num_pairs in range(step.num_pairs - 1, 0, -1):
        size = num_pairs * num_gpus
        if size > 1 and fits(replace(step, num_pairs=num_pairs)):
            return f"data.global_batch_size: {size} (fewer in-batch negatives)"
    return None
