"""The parts of gpu_day.sh: each answers a question of a machine with a GPU, and writes as it goes.

    python benchmarks/gpu_day.py train --out gpu_day       # one part; gpu_day.sh runs them in order

roof     TFLOP/s of a large bf16 matrix product: what the others are a share of
train    qwen3b's step at its real shape, random weights made on the device: does it run, memory
         against `check`, tokens a second, share of the roof
peers    the same rows through sentence-transformers' and colpali-engine's models and losses, on
         the same backbone shape with the same LoRA, in the same process as `train`
loss     the MMR loss at 2048 x 3584, against its matrix products alone
zero     `fit` under ZeRO-3 on one rank: three steps, a checkpoint, two more from it
search   scoring 100,000 candidates at each budget

On a CPU all of it runs on tiny stand-ins. A row that fails says why and the next one follows.
"""

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import _shapes as shapes
import _train_step as train_step
import gpu
import torch
import yaml
from _clock import fastest
from _peers import HiddenStates, without_torchvision
from _results import machine
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from metaembed_pl.model.family import family_of
from metaembed_pl.model.lora import LoraConfig, set_trainable
from metaembed_pl.training.activations import Rows
from metaembed_pl.training.memory import Running, Step, estimate

Row = dict[str, Any]
NUM_PAIRS, NUM_STEPS = 8, 5


def roof(options: argparse.Namespace) -> Iterator[Row]:
    """The fastest bf16 product of square matrices."""
    size = 256 if options.tiny else 8192
    left, right = (
        torch.randn(size, size, device=options.device, dtype=torch.bfloat16) for _ in range(2)
    )
    seconds = fastest(lambda: left @ right, options.device, options.min_s)
    yield {"what": f"{size}^3 product", "tflops": 2 * size**3 / seconds / 1e12}


def train(options: argparse.Namespace) -> Iterator[Row]:
    """Our step first, so that its answer is there whatever the peers do."""
    (peak,) = roof(options)
    case = shapes.Case("3B")
    yield _row("metaembed_pl", lambda: _ours(case, options, peak["tflops"]))
    peers = {"sentence-transformers": _SentenceTransformers, "colpali-engine": _Colpali}
    for name, make in peers.items():
        yield _row(name, lambda make=make: _peer(make, case, options))


def _row(name: str, run: Callable[[], Row]) -> Row:
    """A row, or why there is none: a peer that is missing must not cost the other answers."""
    return gpu.attempt({"what": name}, run, Exception)


def _ours(case: shapes.Case, options: argparse.Namespace, roof_tflops: float) -> Row:
    found = train_step.measure(
        case, options.device, NUM_PAIRS, options.steps, roof_tflops * 1e12, options.tiny
    )
    row = {
        name: found[name]
        for name in ("step_s", "pairs_per_s", "tokens_per_s", "memory_bytes", "parts_s")
    }
    estimate = _check_bytes(case, options)
    row |= {"share_of_roof": found["mfu"], "check_bytes": estimate}
    return row | {"memory_of_check": row["memory_bytes"] and row["memory_bytes"] / estimate}


def _check_bytes(case: shapes.Case, options: argparse.Namespace) -> int:
    """What `check` expects of such a step, rows as long as the longest of the batch."""
    model = shapes.build(case, "meta", options.tiny)
    batch = _batch(case, options.tiny)
    rows = {side: _longest(inputs) for side, inputs in batch.items()}
    step = Step(NUM_PAIRS, 1, rows["query"], rows["candidate"])
    running = Running(precision="bf16-mixed", is_checkpointed=case.is_checkpointed)
    return estimate(model, step, running).total


def _longest(inputs: dict[str, Tensor]) -> Rows:
    patches = inputs["image_grid_thw"].prod(dim=1) if "image_grid_thw" in inputs else torch.zeros(1)
    most, pixels = int(patches.max()), inputs.get("pixel_values")
    width = 0 if pixels is None else pixels.shape[1] * pixels.element_size()
    return Rows(1, inputs["input_ids"].shape[1], most, most * width)


@cache
def _batch(case: shapes.Case, is_tiny: bool) -> dict[Any, Any]:
    """The first batch that `train` computes, by side."""
    model = shapes.build(case, "meta", is_tiny)
    with tempfile.TemporaryDirectory() as folder:
        pairs = Path(folder) / "pairs"
        shapes.write_pairs(pairs, max(64, 2 * NUM_PAIRS), is_tiny)
        made = shapes.batches(pairs, model, case, NUM_PAIRS)
        batch = made.load(0)
    return {"query": batch.queries, "candidate": batch.candidates}


def _peer(make: Callable[[Any], nn.Module], case: shapes.Case, options: argparse.Namespace) -> Row:
    """Steps of a peer on the rows that our first batch has, with AdamW and autocast."""
    device = options.device
    rows = _batch(case, options.tiny)
    trainee = (
        make(AutoConfig.for_model(**shapes.config_of(case.size, options.tiny))).to(device).train()
    )
    trained = [p for p in trainee.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-5)
    batch = {
        side: {k: v.to(device) for k, v in inputs.items() if k != "slot_index"}
        for side, inputs in rows.items()
    }

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(device, torch.bfloat16):
            loss = trainee(batch["query"], batch["candidate"])
        loss.backward()
        optimizer.step()

    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = fastest(step, device, options.min_s)
    tokens = sum(int(inputs["attention_mask"].sum()) for inputs in rows.values())
    memory = torch.cuda.max_memory_allocated() if device == "cuda" else None
    return {
        "step_s": seconds,
        "pairs_per_s": NUM_PAIRS / seconds,
        "tokens_per_s": tokens / seconds,
        "memory_bytes": memory,
    }


def _plain_backbone(config: Any, kind: Any = AutoModel.from_config, **given: Any) -> Any:
    """As a peer's user has it: plain transformers, LoRA on the language model, checkpointing."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = kind(config, **given)
    model.to(torch.bfloat16)
    set_trainable(model, family_of(config.model_type), LoraConfig(), train_vision=False)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


class _SentenceTransformers(nn.Module):
    """One vector an item, the last token's, as sentence-transformers trains such models."""

    def __init__(self, config: Any):
        super().__init__()
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
        from sentence_transformers.sentence_transformer.modules import Normalize, Pooling

        backbone = _plain_backbone(config, dtype=torch.bfloat16, attn_implementation="sdpa")
        width = config.get_text_config().hidden_size
        modules = [HiddenStates(backbone), Pooling(width, pooling_mode="lasttoken"), Normalize()]
        self.model = SentenceTransformer(modules=modules, device="cpu")
        self.loss = MultipleNegativesRankingLoss(self.model)

    def forward(self, queries: dict[str, Tensor], candidates: dict[str, Tensor]) -> Tensor:
        """The loss of their own class over queries and candidates of two forward calls."""
        embedded = [self.model(dict(rows))["sentence_embedding"] for rows in (queries, candidates)]
        count = len(embedded[0])
        parts = [embedded[0], embedded[1][:count], embedded[1][count:]]
        return self.loss.compute_loss_from_embeddings(parts, torch.empty(0))


class _Colpali(nn.Module):
    """A vector of 128 for every token and patch, as colpali-engine trains ColQwen2.5."""

    def __init__(self, config: Any):
        super().__init__()
        without_torchvision()
        from colpali_engine.loss import ColbertPairwiseCELoss  # pyright: ignore
        from colpali_engine.models.qwen2_5.colqwen2_5.modeling_colqwen2_5 import (  # pyright: ignore
            ColQwen2_5,
        )

        self.model = _plain_backbone(copy.deepcopy(config), ColQwen2_5)
        self.loss = ColbertPairwiseCELoss()

    def forward(self, queries: dict[str, Tensor], candidates: dict[str, Tensor]) -> Tensor:
        """Their loss of queries and their positives."""
        embedded = [self.model(**_unpacked(rows)) for rows in (queries, candidates)]
        return self.loss(embedded[0], embedded[1][: len(embedded[0])])


def _unpacked(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Their model takes the patches of each image as a row of its own."""
    if "pixel_values" not in rows:
        return rows
    counts = rows["image_grid_thw"].prod(dim=1).tolist()
    parts = rows["pixel_values"].split(counts)
    return {**rows, "pixel_values": nn.utils.rnn.pad_sequence(list(parts), batch_first=True)}


def zero(options: argparse.Namespace) -> Iterator[Row]:
    """Training under ZeRO-3, interrupted and resumed."""
    yield _row("deepspeed_stage_3, one rank", lambda: _zero(options))


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


def _zero_recipe(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
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


PARTS: dict[str, Callable[[argparse.Namespace], Iterator[Row]]] = {
    "roof": roof,
    "train": train,
    "loss": gpu.loss_rows,
    "zero": zero,
    "search": gpu.search_rows,
}


def main(arguments: list[str] | None = None) -> None:
    """Runs one part; appends each row to OUT/PART.jsonl as soon as it is there."""
    parser = argparse.ArgumentParser(description="One part of a day with a GPU.")
    add = parser.add_argument
    add("part", choices=list(PARTS))
    add("--out", type=Path, default=Path("gpu_day"))
    add("--steps", type=int, default=NUM_STEPS)
    add("--min_s", type=float, default=1.0, help="how long short things are repeated")
    options = parser.parse_args(arguments)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    options.tiny = options.device == "cpu"
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / f"{options.part}.jsonl").open("a", encoding="utf-8") as file:
        for row in PARTS[options.part](options):
            line = json.dumps({"machine": machine(options.device), **row})
            print(line, flush=True)
            file.write(line + "\n")
            file.flush()


if __name__ == "__main__":
    main()
