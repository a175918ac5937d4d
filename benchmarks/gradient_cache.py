"""Gradient caching compared with the plain step: time, and memory as the batch grows.

    python benchmarks/gradient_cache.py [--save] [--num_threads 1]

A Qwen2.5-VL from scratch (2 layers, 128 wide), texts of 4 to 40 words, groups to 4x8. Each number
is measured in a process of its own: the second step's seconds, and the most memory that the first
takes beside model, gradients and inputs (the resident set's high-water mark, on Linux).
--save writes benchmarks/results/gradient-cache-MACHINE.json.
"""

import argparse
import json
import random
import time
from typing import Any

import torch
from _results import machine, measured_alone, peak_bytes, save

from metaembed_pl.data.collate import Side
from metaembed_pl.item import Item
from metaembed_pl.model.backbone import (
    BackboneConfig,
    ScratchTokenizer,
    build_backbone,
    train_tokenizer,
)
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.family import family_of
from metaembed_pl.model.processing import Processing
from metaembed_pl.training.gradient_cache import GradientCache
from metaembed_pl.training.loss import MMRLoss

BATCHES = (128, 512, 1024, 2048)
PLAIN_UP_TO = 512
MAX_TOKENS = 4096
WORDS = "red green blue round square small large apple flag cat tree star moon sun".split()
CONFIG = {
    "model_type": "qwen2_5_vl",
    "text_config": {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12]},
    },
    "vision_config": {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 128},
}


def model() -> MetaEmbedder:
    """The model, in training."""
    torch.manual_seed(0)
    family = family_of("qwen2_5_vl")
    tokenizer = train_tokenizer(WORDS * 3, 400, family)
    processing = Processing(family, tokenizer, family.image_processor(CONFIG, None, None))
    config = BackboneConfig(scratch=CONFIG, tokenizer=ScratchTokenizer(400, ["none"]))
    return MetaEmbedder(build_backbone(config, processing), processing, ["1x1", "2x4", "4x8"])


def items(count: int, seed: int) -> list[Item]:
    """Texts of mixed lengths."""
    draw = random.Random(seed)
    return [Item(" ".join(draw.choices(WORDS, k=draw.randint(4, 40)))) for _ in range(count)]


def measure(how: str, batch: int) -> dict[str, float]:
    """Time and memory of a step, in this process."""
    made = model()
    process, loss_of = made.processor(), MMRLoss(made.groups)
    sides: dict[Side, list[Item]] = {"query": items(batch, 1), "candidate": items(batch, 2)}
    inputs: dict[Side, Any] = {s: process(of_side, s) for s, of_side in sides.items()}
    chunks: dict[Side, Any] = {
        s: process.in_chunks(of_side, s, MAX_TOKENS) for s, of_side in sides.items()
    }

    def plain() -> None:
        loss_of(*(made(tensors, side) for side, tensors in inputs.items())).loss.backward()

    def cached() -> None:
        cache = GradientCache(made)
        found: dict[Side, Any] = {s: cache.encode(of_side, s) for s, of_side in chunks.items()}
        gradients = torch.autograd.grad(loss_of(*found.values()).loss, list(found.values()))
        for part in cache.surrogates(dict(zip(found, gradients, strict=True))):
            part.backward()

    step = plain if how == "plain" else cached
    for parameter in made.parameters():
        parameter.grad = torch.zeros_like(parameter)
    memory = peak_bytes("cpu", step)
    start = time.perf_counter()
    step()
    return {"time_s": time.perf_counter() - start, "memory_bytes": memory}


def main() -> None:
    """Measure all batches, print a table, save it if asked to."""
    parser = argparse.ArgumentParser(description="Gradient caching against the plain step.")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--batches", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    name, rows = machine("cpu"), []
    print(f"{name}, {options.num_threads} threads, torch {torch.__version__}")
    line = "{:>6}   {:>9} {:>9} {:>6}   {:>9} {:>9}"
    print(line.format("pairs", "plain", "cached", "ratio", "plain", "cached"))
    for batch in options.batches:
        row: dict = {"pairs": batch}
        for how in ("plain", "cached"):
            if how == "cached" or batch <= PLAIN_UP_TO:
                flags = "--num_threads", options.num_threads
                row[how] = measured_alone(__file__, [how, batch], *flags)
        rows.append(row)
        plain, cached = row.get("plain"), row["cached"]
        print(
            line.format(
                batch,
                f"{plain['time_s']:.2f} s" if plain else "",
                f"{cached['time_s']:.2f} s",
                f"{cached['time_s'] / plain['time_s']:.2f}" if plain else "",
                f"{plain['memory_bytes'] / 1e6:.0f} MB" if plain else "",
                f"{cached['memory_bytes'] / 1e6:.0f} MB",
            ),
            flush=True,
        )
    if options.save:
        result = {"machine": name, "num_threads": options.num_threads, "torch": torch.__version__}
        save("gradient-cache", {**result, "max_tokens": MAX_TOKENS, "rows": rows})


if __name__ == "__main__":
    main()
