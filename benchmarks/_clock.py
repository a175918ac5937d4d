"""Profile a step by the device's own clock."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from metaembed_pl.model.embedder import MetaEmbedder


class Clock:
    """Marks on a device's timeline; each names what happens from there to the next one.

    On CUDA a mark is an event in the stream, so nothing waits for it, and what the CPU does while
    the GPU is busy counts as nothing.

    Args:
        device: `cpu` or `cuda`.

    >>> clock = Clock("cpu")
    >>> for name in ("data", "loss", "end"):
    ...     clock.mark(name)
    >>> sorted(clock.seconds())
    ['data', 'loss']
    """

    def __init__(self, device: str):
        self._on_gpu = device.startswith("cuda")
        self._marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """From now on it is this."""
        now: Any = time.perf_counter()
        if self._on_gpu:
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((name, now))

    def seconds(self) -> dict[str, float]:
        """The time of each name; what follows the last mark is not counted."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, float] = defaultdict(float)
        for (name, start), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            found[name] += start.elapsed_time(end) / 1e3 if self._on_gpu else end - start
        return dict(found)


@contextmanager
def marking_vision(model: MetaEmbedder, clock: Clock) -> Iterator[None]:
    """While open, a forward pass marks where its vision tower begins and where it ends."""
    tower = model.backbone.get_submodule(model.processing.family.vision_module)
    hooks = [
        tower.register_forward_pre_hook(lambda *_: clock.mark("vision")),
        tower.register_forward_hook(lambda *_: clock.mark("text")),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fastest(run: Any, device: str, at_least_s: float) -> float:
    """Seconds of the fastest of some runs, at least two; the first one is not counted."""
    run()
    times: list[float] = []
    while len(times) < 2 or sum(times) < at_least_s:
        clock = Clock(device)
        clock.mark("run")
        run()
        clock.mark("end")
        times.append(clock.seconds()["run"])
    return min(times)
