"""The cost of training and search on a GPU: real shapes, random weights. Not yet run on one.

    python benchmarks/gpu.py --save                       # all of it, on the first GPU
    python benchmarks/gpu.py --parts train --sizes 7B     # only some
    torchrun --nproc-per-node 8 benchmarks/gpu.py --parts train    # with communication
    python benchmarks/gpu.py                              # no GPU: tiny stand-ins, in seconds

train    LoRA of Qwen2.5-VL (3B, 7B) as the paper's recipes have it, on mixed texts and pictures:
         pairs and tokens a second, model-FLOP utilisation, peak memory, where the time goes; sdpa
         against flash attention, gradient checkpointing on and off, what gradient caching costs
loss     the MMR loss, forward and backward, against its three matrix products alone (the roof) and
         against one einsum per group
search   scoring 100,000 candidates at each budget, beside the paper's efficiency table

Utilisation: the operations that a step needs (training/flops.py has the formula), over the time it
took, over what the GPU can do in dense bf16. --save writes benchmarks/results/gpu-MACHINE.json.
Tested on a CPU alone, with torch 2.11 and 2.13, transformers 5.17 and 5.23.
"""

import argparse
import gc
import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import loss
import torch
import torch.distributed as dist
import transformers
from _clock import fastest
from _results import RESULTS, machine, peak_bytes, save
from _shapes import Case
from _train_step import PARTS, measure

from metaembed_pl.budget import PAPER_GROUPS, Budget
from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.planes import Plane
from metaembed_pl.retrieval.scoring import scan

CHUNK_TOKENS = 16384
# Queries of a rank, candidates of all, width: a global batch of 2048 on eight GPUs and on one.
LOSS_SHAPES = [(256, 2048, 3584), (2048, 2048, 3584)]
# GFLOPs, milliseconds and GiB of the paper's efficiency table (7B, one A100); None: not given.
PAPER_SEARCH: dict[Budget, tuple[float, float | None, float]] = {
    Budget(1, 1): (0.71, 1.67, 0.68),
    Budget(2, 4): (5.73, None, 2.67),
    Budget(4, 8): (22.93, None, 5.34),
    Budget(8, 16): (91.75, 1.92, 10.68),
    Budget(16, 64): (733.89, 6.25, 42.72),
}


# Dense bf16, without sparsity, by a part of the device's name.
TFLOPS = {"B200": 2250, "H200": 989, "H100": 989, "A100": 312, "L40S": 362, "4090": 165, "A10": 125}


def train_cases(sizes: list[str], tiny: bool) -> list[Case]:
    """The cases: each differs from the first of its size in one setting."""
    chunk = 512 if tiny else CHUNK_TOKENS
    return [
        case
        for size in sizes
        for case in (
            Case(size),
            Case(size, attention="flash_attention_2"),
            Case(size, is_checkpointed=False),
            Case(size, chunk_tokens=chunk),
        )
    ]


def train(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the table of training steps."""
    peak = options.peak_tflops and options.peak_tflops * 1e12
    if peak is None and options.device == "cuda":
        name = torch.cuda.get_device_name()
        peak = next((1e12 * found for known, found in TFLOPS.items() if known in name), None)
    for case in train_cases(options.sizes, options.tiny):
        if case.chunk_tokens and dist.is_initialized():
            continue  # strategies do that in training; here one rank shows the overhead
        yield attempt(
            {"case": str(case)},
            lambda case=case: measure(
                case, options.device, options.pairs, options.steps, peak, options.tiny
            ),
        )


def loss_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the table of the MMR loss."""
    for num_queries, num_candidates, width in [(8, 16, 64)] if options.tiny else LOSS_SHAPES:
        row: dict[str, Any] = {"shape": [num_queries, num_candidates, width]}
        r_q, r_c, _ = PAPER_GROUPS[-1]
        for form in ("ours", "einsums", "roof"):
            queries = loss.vectors(num_queries, r_q, width, device=options.device)
            candidates = loss.vectors(num_candidates, r_c, width, device=options.device)
            run = partial(loss.step, form, queries, candidates, PAPER_GROUPS)
            if form == "roof":
                run = partial(matrix_products, queries, candidates)
            row[form] = attempt({}, lambda run=run: _time_and_memory(run, options))
            del queries, candidates, run
        yield row


def matrix_products(queries: torch.Tensor, candidates: torch.Tensor) -> None:
    """The three products, in fp32 as in the loss, that every form of it needs."""
    with torch.no_grad():
        q, c = queries.flatten(0, 1), candidates.flatten(0, 1)
        products = c @ q.T
        _ = products @ q, products.T @ c


def _time_and_memory(run: Callable[[], None], options: argparse.Namespace) -> dict[str, float]:
    run()
    memory = peak_bytes(options.device, run)
    return {"time_s": fastest(run, options.device, options.min_s), "memory_bytes": memory}


def search_rows(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rows of the table of scoring: one query, bf16, candidates on the device."""
    count, width = (500, 64) if options.tiny else (100_000, 3584)
    for budget in PAPER_GROUPS:
        row: dict[str, Any] = {"budget": str(budget), "candidates": count, "width": width}
        row["gflops"], row["index_bytes"] = scoring_cost(budget, count, width)
        row |= dict(
            zip(("paper_gflops", "paper_ms", "paper_gib"), PAPER_SEARCH[budget], strict=True)
        )
        yield attempt(row, lambda b=budget: _score(b, count, width, options))


def scoring_cost(budget: Budget, count: int, width: int) -> tuple[float, int]:
    """GFLOPs of scoring a query, and bytes of the index, by the paper's formula."""
    gflops = (2 * width - 1) * budget.r_q * budget.r_c * count / 1e9
    return gflops, 2 * width * budget.r_c * count


def _score(budget: Budget, count: int, width: int, options: argparse.Namespace) -> dict[str, Any]:
    device = options.device
    held = torch.empty(count, budget.r_c, width, dtype=torch.bfloat16, device=device)
    planes = [Plane(0, held.normal_(), None)]
    queries = torch.randn(1, budget.r_q, width, device=device)
    rows = torch.arange(count)

    def score(at_a_time: int) -> None:
        for start in range(0, count, at_a_time):
            for _ in scan(planes, queries, budget.r_c, rows[start : start + at_a_time], held.dtype):
                pass

    all_s = fastest(lambda: score(count), device, options.min_s)
    by_1000_s = fastest(lambda: score(1000), device, options.min_s)
    read = scoring_cost(budget, count, width)[1]
    return {"ms": 1e3 * all_s, "ms_by_1000": 1e3 * by_1000_s, "gb_per_s": read / all_s / 1e9}


def attempt(
    row: dict[str, Any],
    run: Callable[[], dict[str, Any]],
    faults: Any = (torch.OutOfMemoryError, UserError),
) -> dict[str, Any]:
    """The row with what was measured, or with the fault that prevented it."""
    try:
        return row | run()
    except faults as error:
        reason = (str(error).splitlines() or [""])[0]
        return row | {"failed": f"{type(error).__name__}: {reason}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def show_train(row: dict[str, Any]) -> str:
    """A line of the first table."""
    if "failed" in row:
        return f"{row['case']:58} {row['failed']}"
    mfu = f"{row['mfu']:.0%}" if row["mfu"] else "?"
    memory = f"{row['memory_bytes'] / 2**30:.1f}" if row["memory_bytes"] else "?"
    total = sum(row["parts_s"].values())
    shares = ", ".join(f"{p} {row['parts_s'].get(p, 0) / total:.0%}" for p in PARTS)
    line = f"{row['case']:58} {row['step_s']:8.3f} {row['pairs_per_s']:8.1f}"
    line += f" {row['tokens_per_s']:9.0f} {mfu:>5} {memory:>7}   {shares}"
    if row["communication_s"] is not None:
        line += f"; collectives {row['communication_s'] / row['step_s']:.0%}, partly beside"
    return line


def show_loss(row: dict[str, Any]) -> str:
    """A line of the second table."""
    roof = row["roof"].get("time_s")
    parts = []
    for form in ("ours", "einsums", "roof"):
        found = row[form]
        if "failed" in found:
            parts.append(f"{form}: {found['failed']}")
            continue
        times = f" ({found['time_s'] / roof:.2f} x roof)" if roof and form != "roof" else ""
        parts.append(
            f"{form} {1e3 * found['time_s']:.1f} ms{times}, {found['memory_bytes'] / 1e6:.0f} MB"
        )
    return f"{'x'.join(map(str, row['shape'])):16} {'; '.join(parts)}"


def show_search(row: dict[str, Any]) -> str:
    """A line of the third table."""
    paper = "?" if row["paper_ms"] is None else f"{row['paper_ms']:.2f}"
    start = f"{row['budget']:>6} {row['gflops']:8.2f} {row['index_bytes'] / 2**30:8.2f}"
    if "failed" in row:
        return f"{start} {row['failed']}"
    return (
        f"{start} {row['ms']:9.2f} {row['ms_by_1000']:12.2f} {row['gb_per_s']:8.0f}   "
        f"{row['paper_gflops']:8.2f} {paper:>6} {row['paper_gib']:7.2f}"
    )


TRAIN_HEAD = f"{'training step':58} {'s':>8} {'pairs/s':>8} {'tokens/s':>9} {'MFU':>5} {'GiB':>7}"
SEARCH_HEAD = (
    f"{'budget':>6} {'GFLOP':>8} {'GiB':>8} {'ms':>9} {'by 1000, ms':>12} {'GB/s':>8}"
    f"   {'paper:':>8} {'ms':>6} {'GiB':>7}"
)
TABLES: dict[str, tuple[str, Callable[..., Iterator[dict]], Callable[[dict], str]]] = {
    "train": (TRAIN_HEAD, train, show_train),
    "loss": ("MMR loss, Q x C x D, groups to 16x64", loss_rows, show_loss),
    "search": (SEARCH_HEAD, search_rows, show_search),
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measures, prints a table for each part, saves them if asked to."""
    options = _parser().parse_args(arguments)
    if options.device is None:
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.tiny = options.tiny or options.device == "cpu"
    first = True
    if "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1:
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
        first = dist.get_rank() == 0
    name = machine(options.device)
    found: dict[str, Any] = {
        "machine": name,
        "device": options.device,
        "is_tiny": options.tiny,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    say = print if first else lambda *_, **__: None
    say(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    for part in options.parts:
        head, measured, shown = TABLES[part]
        say(f"\n{head}")
        found[part] = []
        for row in measured(options):
            found[part].append(row)
            say(shown(row), flush=True)
    if options.save and first:
        save("gpu", found, options.out)
    if dist.is_initialized():
        dist.destroy_process_group()
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What training and search cost on a GPU.")
    add = parser.add_argument
    add("--parts", nargs="+", choices=list(TABLES), default=list(TABLES))
    add("--sizes", nargs="+", choices=["3B", "7B"], default=["3B", "7B"])
    add("--pairs", type=int, default=8, help="pairs of a rank's batch")
    add("--steps", type=int, default=5, help="training steps that are timed")
    add("--min_s", type=float, default=1.0, help="how long loss and scoring are repeated")
    add("--device", choices=["cpu", "cuda"])
    add("--tiny", action="store_true", help="narrow stand-ins also on a GPU")
    add("--peak-tflops", type=float, help="of the GPU in dense bf16, where its name is not known")
    add("--save", action="store_true", help="write a file into --out")
    add("--out", type=Path, default=RESULTS)
    return parser


if __name__ == "__main__":
    main()
