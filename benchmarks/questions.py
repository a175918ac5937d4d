"""The cost of several questions per candidate in a batch: time, FLOPs and memory by K.

    python data_prep/openmoji.py --out data/emoji
    python benchmarks/questions.py [--save] [--candidates 64] [--num_threads 1]

The quickstart's model takes a training step over scenes of nine pictures that are each asked for K
of them, in fp32 (FLOPs are counted by torch's FlopCounterMode, forward and backward). Each K is
measured in a process of its own: the median of five steps, and the most memory that the first step
takes beside model and inputs. Ratios are to K = 1, where a pair costs a scene each.
--save writes benchmarks/results/questions-MACHINE.json.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from loss import RESULTS, machine, peak_bytes
from torch.utils.flop_counter import FlopCounterMode

from metaembed_pl.cli.recipe_faults import read_recipe
from metaembed_pl.data.batches import TrainingBatches
from metaembed_pl.data.collate import TrainBatch
from metaembed_pl.data.plan import Plan
from metaembed_pl.data.recipe_sources import TrainSource
from metaembed_pl.data.shards import ShardedPairs

RECIPE = Path(__file__).parents[1] / "recipes" / "emoji.yaml"
SCENES = "data/emoji/train/emoji_scene"
QUESTIONS = (1, 2, 3, 6, 9)
NUM_STEPS = 5


def measure(questions: int, num_candidates: int) -> dict[str, float]:
    """A training step with so many questions to a candidate, in this process."""
    module = read_recipe(RECIPE).model
    assert module is not None
    torch.manual_seed(0)
    module.configure_model()
    module.train()
    shards = ShardedPairs(SCENES)
    planned = TrainSource(SCENES, questions=questions).planned(shards)
    process = module.embedder.processor()
    batches = TrainingBatches([shards], [0], Plan([planned], num_candidates), process)
    found = [batches.load(step) for step in range(NUM_STEPS)]

    def step(batch: TrainBatch) -> None:
        queries = module.embedder(batch.queries, "query")
        candidates = module.embedder(batch.candidates, "candidate")
        module.loss(queries, **batch.loss_inputs(candidates)).loss.backward()

    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    memory = peak_bytes("cpu", lambda: step(found[0]))
    with FlopCounterMode(display=False) as counter:
        step(found[0])
    times = []
    for batch in found:
        start = time.perf_counter()
        step(batch)
        times.append(time.perf_counter() - start)
    return {
        "time_s": statistics.median(times),
        "pairs": len(found[0].keys),
        "flops": counter.get_total_flops(),
        "memory_bytes": memory,
    }


def main() -> None:
    """Measure all K, print a table, save it if asked to."""
    parser = argparse.ArgumentParser(description="What several questions to a candidate cost.")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--candidates", type=int, default=64, help="of a batch (64)")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    if options.one:
        print(json.dumps(measure(options.one, options.candidates)))
        return
    name, rows = machine("cpu"), []
    print(f"{name}, {options.num_threads} threads, torch {torch.__version__}")
    line = "{:>9} {:>8} {:>8} {:>10} {:>7} {:>13} {:>7} {:>9}"
    heads = ("questions", "pairs", "step", "pairs/s", "ratio", "MFLOP a pair", "ratio", "memory")
    print(line.format(*heads))
    for questions in QUESTIONS:
        command = [sys.executable, __file__, "--one", str(questions)]
        command += ["--candidates", str(options.candidates)]
        command += ["--num_threads", str(options.num_threads)]
        row = json.loads(subprocess.check_output(command, text=True)) | {"questions": questions}
        rows.append(row)
        speed, cost = row["pairs"] / row["time_s"], row["flops"] / row["pairs"]
        first = rows[0]
        print(
            line.format(
                questions,
                row["pairs"],
                f"{row['time_s']:.2f} s",
                f"{speed:.0f}",
                f"{speed / (first['pairs'] / first['time_s']):.2f}",
                f"{cost / 1e6:.0f}",
                f"{cost / (first['flops'] / first['pairs']):.2f}",
                f"{row['memory_bytes'] / 1e6:.0f} MB",
            ),
            flush=True,
        )
    if options.save:
        slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
        result = {"machine": name, "num_threads": options.num_threads, "torch": torch.__version__}
        file = RESULTS / f"questions-{slug}.json"
        file.write_text(json.dumps({**result, "candidates": options.candidates, "rows": rows}))


if __name__ == "__main__":
    main()
