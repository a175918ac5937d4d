"""Training steps on the real path: shards, workers, preprocessing, model, MMR loss, AdamW."""

import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import _shapes as shapes
import torch
import torch.distributed as dist
from _clock import Clock, marking_vision
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader

from metaembed_pl.budget import PAPER_GROUPS
from metaembed_pl.data.collate import Side, TrainBatch
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.training.activations import Rows
from metaembed_pl.training.flops import training_flops
from metaembed_pl.training.gradient_cache import GradientCache
from metaembed_pl.training.loss import MMRLoss

WARM_UP = 2  # steps that are not timed; one of a tiny stand-in


class Trainee(nn.Module):
    """The embedder and its loss, as one module for DDP.

    Args:
        embedder: what is trained.
    """

    def __init__(self, embedder: MetaEmbedder):
        super().__init__()
        self.embedder = embedder
        self.loss = MMRLoss(PAPER_GROUPS)
        self.clock: Clock | None = None

    def forward(self, batch: TrainBatch) -> Tensor:
        """The loss of a batch whose rows are encoded all at once."""
        self.mark("text")
        queries = self.embedder(_on(self.embedder.device, batch.queries), "query")
        self.mark("text")
        candidates = self.embedder(_on(self.embedder.device, batch.candidates), "candidate")
        for embeddings in (queries, candidates):
            embeddings.register_hook(lambda _gradient: self.mark("text backward"))
        self.mark("loss")
        return self.of(queries, candidates, batch)

    def of(self, queries: Tensor, candidates: Tensor, batch: TrainBatch) -> Tensor:
        """The loss of meta embeddings."""
        return self.loss(queries, **batch.to(queries.device).loss_inputs(candidates)).loss

    def mark(self, name: str) -> None:
        """Tells the clock, if there is one."""
        if self.clock is not None:
            self.clock.mark(name)


def _on(device: torch.device, inputs: Any) -> dict[str, Tensor]:
    return {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}


def measure(
    case: shapes.Case, device: str, num_pairs: int, num_steps: int, peak: float | None, tiny: bool
) -> dict[str, Any]:
    """Speed, memory and where the time goes, of steps on one rank.

    Args:
        case: how the steps are run.
        device: `cpu` or `cuda`.
        num_pairs: of a rank's batch.
        num_steps: that are timed.
        peak: operations a second that the device can do at most; None: not known.
        tiny: a stand-in of two narrow layers.

    Returns:
        Means over the steps; memory in bytes, None on the CPU.
    """
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model = shapes.build(case, device, tiny)
    trainee = Trainee(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    world = dist.get_world_size() if dist.is_initialized() else 1
    wrapped = DistributedDataParallel(trainee) if world > 1 else trainee
    with tempfile.TemporaryDirectory() as folder:
        shapes.write_pairs(Path(folder) / "pairs", max(64, 2 * num_pairs * world), tiny)
        loader = _loader(shapes.batches(Path(folder) / "pairs", model, case, num_pairs * world))
        taken = iter(loader)
        for _ in range(1 if tiny else WARM_UP):
            _step(case, trainee, wrapped, optimizer, next(taken), device)
        _wait_for(device)
        trainee.clock = clock = Clock(device)
        batches, start = [], time.perf_counter()
        with marking_vision(model, clock):
            for _ in range(num_steps):
                clock.mark("data")
                batches.append(next(taken))
                _step(case, trainee, wrapped, optimizer, batches[-1], device)
            clock.mark("end")
            _wait_for(device)
        took_s = (time.perf_counter() - start) / num_steps
        trainee.clock = None
        communication_s = None
        if world > 1:
            batch = next(taken)
            communication_s = _communication(
                lambda: _step(case, trainee, wrapped, optimizer, batch, device)
            )
        del taken  # ends its workers
    parts = {name: seconds / num_steps for name, seconds in clock.seconds().items()}
    rows = [
        row
        for batch in batches
        for side in (batch.queries, batch.candidates)
        for piece in shapes.pieces(side)
        for row in rows_of(piece)
    ]
    needed = training_flops(model, rows, is_checkpointed=False) / num_steps
    return {
        "case": str(case),
        "pairs_a_rank": num_pairs,
        "ranks": world,
        "step_s": took_s,
        "pairs_per_s": num_pairs * world / took_s,
        "tokens_per_s": world * sum(row.num_tokens for row in rows) / num_steps / took_s,
        "flops_a_step": needed,
        "mfu": needed / took_s / peak if peak else None,
        "memory_bytes": torch.cuda.max_memory_allocated() if device == "cuda" else None,
        "parts_s": parts,
        "communication_s": communication_s,
    }


def rows_of(inputs: dict[str, Tensor]) -> list[Rows]:
    """The rows of a forward call without padding, and apart from them its images."""
    texts = [Rows(1, length) for length in inputs["attention_mask"].sum(dim=1).tolist()]
    if "image_grid_thw" not in inputs:
        return texts
    return texts + [Rows(1, 0, n) for n in inputs["image_grid_thw"].prod(dim=1).tolist()]


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _loader(batches: Any) -> DataLoader:
    batches.first, batches.last = 0, 10**6
    if dist.is_initialized():
        batches.rank, batches.num_ranks = dist.get_rank(), dist.get_world_size()
    on_gpu = torch.cuda.is_available()
    # On the CPU the cores are needed for the step itself.
    workers = min(8, (os.cpu_count() or 1) - 1) if on_gpu else 0
    return DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=on_gpu)


def _step(
    case: shapes.Case,
    trainee: Trainee,
    wrapped: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: TrainBatch,
    device: str,
) -> None:
    optimizer.zero_grad()
    with torch.autocast(device, torch.bfloat16):
        if case.chunk_tokens is None:
            loss = wrapped(batch)
    if case.chunk_tokens is None:
        loss.backward()
    else:
        _cached_step(trainee, wrapped, batch, device)
    trainee.mark("optimizer")
    optimizer.step()


def _cached_step(trainee: Trainee, wrapped: nn.Module, batch: TrainBatch, device: str) -> None:
    """Gradient caching, as `MetaEmbedModule` does it on one rank."""
    cache = GradientCache(trainee.embedder)
    with torch.autocast(device, torch.bfloat16):
        trainee.mark("text")
        embeddings: dict[Side, Tensor] = {
            "query": cache.encode(batch.queries, "query"),  # pyright: ignore[reportArgumentType]
            "candidate": cache.encode(batch.candidates, "candidate"),  # pyright: ignore[reportArgumentType]
        }
        trainee.mark("loss")
        loss = trainee.of(embeddings["query"], embeddings["candidate"], batch)
    gradients = torch.autograd.grad(loss, list(embeddings.values()))
    surrogates = cache.surrogates(dict(zip(embeddings, gradients, strict=True)))
    for surrogate in _under_autocast(surrogates, device):
        trainee.mark("text backward")
        surrogate.backward()
        trainee.mark("text")


def _under_autocast(surrogates: Iterator[Tensor], device: str) -> Iterator[Tensor]:
    while True:
        with torch.autocast(device, torch.bfloat16):
            surrogate = next(surrogates, None)
        if surrogate is None:
            return
        yield surrogate


def _communication(step: Any) -> float:
    """Seconds that a step's collectives take on the device, beside what overlaps with them."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        step()
    events = found.key_averages()
    return sum(e.device_time_total for e in events if re.search("nccl", e.key)) / 1e6
