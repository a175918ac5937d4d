"""The MMR loss compared with one einsum per group, as other libraries compute it.

    python benchmarks/loss.py [--save] [--num_threads 1]      # on a GPU: benchmarks/gpu.py loss

One step is the scores of every group, their InfoNCE and the gradients of all vectors. Prints for
each shape the time of the fastest of some steps and the most memory a step takes beside its inputs.
Each is measured in a process of its own: memory as the resident set's high-water mark there.
--save writes benchmarks/results/loss-MACHINE.json.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _results import machine, measured_alone, peak_bytes, save
from torch import Tensor
from torch.nn import functional as F

from metaembed_pl.budget import PAPER_GROUPS, Budget
from metaembed_pl.late_interaction import nested_scores

TEMPERATURE = 0.03
MIN_S = 1.0
"""Steps are repeated for about this long; the fastest counts."""

# Queries, candidates, width, number of the paper's groups.
SHAPES = [(128, 128, 128, 3), (128, 128, 128, 4), (128, 128, 128, 5), (512, 512, 128, 4)]
SHAPES += [(512, 512, 128, 5), (16, 256, 2048, 5)]


def ours(queries: Tensor, candidates: Tensor, groups: tuple[Budget, ...]) -> Tensor:
    """One product for all groups, in tiles."""
    return nested_scores(queries, candidates, groups)


def einsums(queries: Tensor, candidates: Tensor, groups: tuple[Budget, ...]) -> Tensor:
    """One product a group, kept completely for autograd."""
    products = (
        torch.einsum("qid,cjd->qcij", queries[:, :r_q], candidates[:, :r_c])
        for r_q, r_c, _ in groups
    )
    return torch.stack([product.amax(dim=3).sum(dim=2) for product in products])


FORMS: dict[str, Callable[..., Tensor]] = {"ours": ours, "einsums": einsums}


def step(form: str, queries: Tensor, candidates: Tensor, groups: tuple[Budget, ...]) -> None:
    """Forward and backward of the InfoNCE summed over groups."""
    queries.grad = candidates.grad = None
    targets = torch.arange(len(queries), device=queries.device)
    scores = FORMS[form](queries, candidates, groups)
    losses = [F.cross_entropy(of_group / TEMPERATURE, targets) for of_group in scores]
    torch.stack(losses).sum().backward()
    if queries.is_cuda:
        torch.cuda.synchronize()


def vectors(*shape: int, device: str = "cpu") -> Tensor:
    """Random unit vectors that want a gradient."""
    generator = torch.Generator().manual_seed(0)
    unit = F.normalize(torch.randn(*shape, generator=generator), dim=-1)
    return unit.to(device).requires_grad_()


def measure(form: str, shape: tuple[int, int, int, int]) -> dict[str, float]:
    """Time and memory of a step, in this process."""
    num_queries, num_candidates, width, num_groups = shape
    groups = PAPER_GROUPS[:num_groups]
    r_q, r_c, _ = groups[-1]
    # A tiny step first: libraries are loaded and threads started at first use.
    step(form, vectors(2, r_q, width), vectors(2, r_c, width), groups)
    queries, candidates = vectors(num_queries, r_q, width), vectors(num_candidates, r_c, width)
    memory = peak_bytes("cpu", lambda: step(form, queries, candidates, groups))
    times = []
    while len(times) < 3 or sum(times) < MIN_S:
        start = time.perf_counter()
        step(form, queries, candidates, groups)
        times.append(time.perf_counter() - start)
    return {"time_s": min(times), "memory_bytes": memory}


def rows(num_threads: int) -> Iterator[dict]:
    """Both forms at every shape, each in a fresh process."""
    for shape in SHAPES:
        row = {"shape": shape[:3], "groups": [str(group) for group in PAPER_GROUPS[: shape[3]]]}
        for form in FORMS:
            row[form] = measured_alone(__file__, [form, shape], "--num_threads", num_threads)
        yield row


def main() -> None:
    """Measure all shapes, print a table, save it if asked to."""
    parser = argparse.ArgumentParser(description="The MMR loss against one einsum per group.")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    name = machine()
    result: dict[str, Any] = {"machine": name, "num_threads": options.num_threads}
    result |= {"torch": torch.__version__, "rows": []}
    print(f"{name}, {options.num_threads} threads, torch {torch.__version__}")
    line = "{:>15} {:>7}   {:>9} {:>9} {:>6}   {:>9} {:>9} {:>6}"
    print(line.format("Q x C x D", "up to", "ours", "einsums", "ratio", "ours", "einsums", "ratio"))
    for row in rows(options.num_threads):
        result["rows"].append(row)
        ours, einsums = row["ours"], row["einsums"]
        print(
            line.format(
                "x".join(map(str, row["shape"])),
                row["groups"][-1],
                f"{1e3 * ours['time_s']:.1f} ms",
                f"{1e3 * einsums['time_s']:.1f} ms",
                f"{einsums['time_s'] / ours['time_s']:.1f}",
                f"{ours['memory_bytes'] / 1e6:.0f} MB",
                f"{einsums['memory_bytes'] / 1e6:.0f} MB",
                f"{einsums['memory_bytes'] / ours['memory_bytes']:.1f}",
            ),
            flush=True,
        )
    if options.save:
        save("loss", result)


if __name__ == "__main__":
    main()
