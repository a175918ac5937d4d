"""The cost of training and search on a GPU: real shapes, random weights. Not yet run on one.

    bash benchmarks/gpu_day.sh                            # all parts, each with a time limit
    python benchmarks/gpu.py train --sizes 7B --variants  # one part
    torchrun --nproc-per-node 8 benchmarks/gpu.py train   # with communication

roof     TFLOP/s of a large bf16 matrix product, the peak that others are compared with
train    LoRA of Qwen2.5-VL as the paper's recipes have it, on mixed texts and pictures: memory
         against the estimate of `check`, tokens a second, share of the roof, where the time goes.
         --variants: also flash attention, no gradient checkpointing, gradient caching
peers    the same rows through sentence-transformers' and colpali-engine's models and losses, with
         the same backbone shape and LoRA
loss     the MMR loss, forward and backward, against its three matrix products alone and against
         one einsum per group
zero     `fit` under ZeRO-3 on one rank: three steps, a checkpoint, two more from it
search   scoring 100,000 candidates at each budget, beside the paper's efficiency table

Each row is printed as JSON, and appended to OUT/PART.jsonl. A row that fails gives the reason, and
the next one follows. On a CPU all parts run on tiny stand-ins. Tested on a CPU alone, with torch
2.11 and 2.13, transformers 5.17 and 5.23.
"""

import argparse
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import _shapes as shapes
import loss
import torch
import torch.distributed as dist
import transformers
import yaml
from _clock import fastest
from _gpu_peers import PEERS, measure_peer
from _results import machine, peak_bytes
from _train_step import measure
from torch import Tensor

from metaembed_pl.budget import PAPER_GROUPS, Budget
from metaembed_pl.retrieval.planes import Plane
from metaembed_pl.retrieval.scoring import scan
from metaembed_pl.training.activations import Rows
from metaembed_pl.training.memory import Running, Step, estimate

Row = dict[str, Any]
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


def roof(options: argparse.Namespace) -> Iterator[Row]:
    """The fastest bf16 product of square matrices."""
    yield {"tflops": _roof_flops(options) / 1e12}


def _roof_flops(options: argparse.Namespace) -> float:
    size = 256 if options.tiny else 8192
    left, right = (
        torch.randn(size, size, device=options.device, dtype=torch.bfloat16) for _ in range(2)
    )
    return 2 * size**3 / fastest(lambda: left @ right, options.device, options.min_s)


def cases(options: argparse.Namespace) -> list[shapes.Case]:
    """How steps are run: the first of each size as the recipe has it, the others changed once."""
    changes: list[dict[str, Any]] = [{}]
    if options.variants:
        changes += [{"attention": "flash_attention_2"}, {"is_checkpointed": False}]
        if not dist.is_initialized():  # with more ranks the strategy caches gradients
            changes += [{"chunk_tokens": 512 if options.tiny else CHUNK_TOKENS}]
    return [shapes.Case(size, **change) for size in options.sizes for change in changes]


def train(options: argparse.Namespace) -> Iterator[Row]:
    """Steps of ours."""
    peak = _roof_flops(options)
    for case in cases(options):
        yield attempt({"case": str(case)}, partial(_step, case, options, peak))


def _step(case: shapes.Case, options: argparse.Namespace, peak: float) -> Row:
    row = measure(case, options.device, options.pairs, options.steps, peak, options.tiny)
    row["check_bytes"] = _check_bytes(case, options)
    memory = row["memory_bytes"]
    return row | {"memory_of_check": memory and memory / row["check_bytes"]}


def _check_bytes(case: shapes.Case, options: argparse.Namespace) -> int:
    """What `check` expects of such a step, rows as long as the longest of the batch."""
    model = shapes.build(case, "meta", options.tiny)
    batch = shapes.first_batch(case, options.pairs, options.tiny)
    step = Step(options.pairs, 1, _longest(batch["query"]), _longest(batch["candidate"]))
    running = Running(
        num_gpus=dist.get_world_size() if dist.is_initialized() else 1,
        precision="bf16-mixed",
        is_checkpointed=case.is_checkpointed,
        has_mask=case.attention == "sdpa",
        max_chunk_tokens=case.chunk_tokens,
    )
    return estimate(model, step, running).total


def _longest(inputs: dict[str, Tensor]) -> Rows:
    patches = inputs["image_grid_thw"].prod(dim=1) if "image_grid_thw" in inputs else torch.zeros(1)
    most, pixels = int(patches.max()), inputs.get("pixel_values")
    width = 0 if pixels is None else pixels.shape[1] * pixels.element_size()
    return Rows(1, inputs["input_ids"].shape[1], most, most * width)


def peers(options: argparse.Namespace) -> Iterator[Row]:
    """Steps of other libraries on the rows of our first batch."""
    for size in options.sizes:
        batch = shapes.first_batch(shapes.Case(size), options.pairs, options.tiny)
        config = shapes.config_of(size, options.tiny)
        for name in PEERS:
            measured = partial(measure_peer, name, config, batch, options.device, options.min_s)
            yield attempt({"case": f"{size}, {name}"}, measured)


def loss_rows(options: argparse.Namespace) -> Iterator[Row]:
    """The MMR loss at each shape."""
    for num_queries, num_candidates, width in [(8, 16, 64)] if options.tiny else LOSS_SHAPES:
        row: Row = {"shape": [num_queries, num_candidates, width]}
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


def zero(options: argparse.Namespace) -> Iterator[Row]:
    """Training under ZeRO-3, interrupted and resumed."""
    yield attempt({"case": "deepspeed_stage_3, one rank"}, partial(_zero, options))


def _zero(options: argparse.Namespace) -> Row:
    from metaembed_pl.cli.train import run

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shapes.write_pairs(folder / "pairs", 64, is_tiny=True)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(_zero_recipe(folder, options)))
        start = time.perf_counter()
        fit = ["fit", "--config", str(recipe)]
        run([*fit, "--trainer.max_steps=3"])
        run([*fit, "--trainer.max_steps=5", "--ckpt_path=last"])
        has_model = (folder / "runs" / "zero" / "model" / "metaembed.json").is_file()
        return {"steps": 5, "seconds": time.perf_counter() - start, "has_model": has_model}


def _zero_recipe(folder: Path, options: argparse.Namespace) -> Row:
    values = shapes.config_of("3B", options.tiny)
    if not options.tiny:  # real widths, a few layers
        values["text_config"] |= {"num_hidden_layers": 4}
        values["vision_config"] |= {"depth": 4, "fullatt_block_indexes": [3]}
    for key in ("architectures", "transformers_version", "torch_dtype", "dtype"):
        values.pop(key, None)
    pairs = str(folder / "pairs")
    accelerator = "gpu" if options.device == "cuda" else "cpu"
    return {
        "run": {"name": "zero", "folder": str(folder / "runs")},
        "model": {
            "backbone": {
                "scratch": values,
                "tokenizer": {"vocab_size": 400, "sources": [pairs]},
                "max_pixels": shapes.TINY_PIXELS,
                "gradient_checkpointing": True,
            },
            "lora": {"r": 32},
            "train_vision": False,
        },
        "data": {"train": [{"path": pairs}], "global_batch_size": 8},
        "trainer": {
            "accelerator": accelerator,
            "devices": 1,
            "strategy": "deepspeed_stage_3",
            "precision": "bf16-mixed" if accelerator == "gpu" else "32-true",
            "logger": False,
        },
    }


def search_rows(options: argparse.Namespace) -> Iterator[Row]:
    """Scoring one query in bf16, candidates on the device."""
    count, width = (500, 64) if options.tiny else (100_000, 3584)
    for budget in PAPER_GROUPS:
        row: Row = {"budget": str(budget), "candidates": count, "width": width}
        row["gflops"], row["index_bytes"] = scoring_cost(budget, count, width)
        row |= dict(
            zip(("paper_gflops", "paper_ms", "paper_gib"), PAPER_SEARCH[budget], strict=True)
        )
        yield attempt(row, partial(_score, budget, count, width, options))


def scoring_cost(budget: Budget, count: int, width: int) -> tuple[float, int]:
    """GFLOPs of scoring a query, and bytes of the index, by the paper's formula."""
    gflops = (2 * width - 1) * budget.r_q * budget.r_c * count / 1e9
    return gflops, 2 * width * budget.r_c * count


def _score(budget: Budget, count: int, width: int, options: argparse.Namespace) -> Row:
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


def attempt(row: Row, run: Callable[[], Row]) -> Row:
    """The row with what was measured, or with the fault that prevented it."""
    try:
        return row | run()
    except Exception as error:  # a missing peer must not cost the other answers
        reason = (str(error).splitlines() or [""])[0]
        return row | {"failed": f"{type(error).__name__}: {reason}"}
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "roof": roof,
    "train": train,
    "peers": peers,
    "loss": loss_rows,
    "zero": zero,
    "search": search_rows,
}


def main() -> None:
    """Measure one part, print its rows and write them."""
    options = _parser().parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.tiny = options.device == "cpu"
    is_first = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if options.device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if options.device == "cuda" else "gloo")
        is_first = dist.get_rank() == 0
    about = {
        "machine": machine(options.device),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    for row in PARTS[options.part](options):
        if is_first:
            line = json.dumps(about | row)
            print(line, flush=True)
            with (options.out / f"{options.part}.jsonl").open("a", encoding="utf-8") as file:
                file.write(line + "\n")
    if dist.is_initialized():
        dist.destroy_process_group()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What training and search cost on a GPU.")
    add = parser.add_argument
    add("part", choices=list(PARTS))
    add("--sizes", nargs="+", choices=["3B", "7B"], default=["3B"], help="of the backbone (3B)")
    add("--variants", action="store_true", help="train: also other ways to run a step")
    add("--pairs", type=int, default=8, help="pairs of a rank's batch (8)")
    add("--steps", type=int, default=5, help="training steps that are timed (5)")
    add("--min_s", type=float, default=1.0, help="how long short runs are repeated (1)")
    add("--out", type=Path, default=Path("gpu_day"), help="folder of the results (gpu_day)")
    return parser


if __name__ == "__main__":
    main()
