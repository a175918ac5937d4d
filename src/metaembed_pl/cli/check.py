"""`python -m metaembed_pl check`: would this recipe run, and on what?

    python -m metaembed_pl check --config recipes/qwen7b.yaml --gpus 8 --gpu H100
    python -m metaembed_pl check --config qwen7b --gpus 2 --data.global_batch_size=16

No weights are loaded: the model is built on the meta device. The report goes
to standard output, faults to standard error; the status is 0 only if the recipe would run.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metaembed_pl.cli.check_report import GIB, print_report
from metaembed_pl.cli.model import refuse_ignored
from metaembed_pl.cli.recipe_path import find_recipe, recipe_folder
from metaembed_pl.errors import UserError

if TYPE_CHECKING:
    from metaembed_pl.cli.check_data import Data, Lengths
    from metaembed_pl.cli.recipe_faults import Recipe
    from metaembed_pl.model.weightless import WeightlessModel
    from metaembed_pl.training.memory import Memory, Running, Step


# Models whose shapes come with the package, and whose weights the hub gives to those who ask.
GATED = (
    "google/gemma-3-4b-it",
    "google/paligemma-3b-pt-448",
    "meta-llama/Llama-3.2-11B-Vision-Instruct",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of the verb."""
    add = parser.add_argument
    add(
        "--config",
        required=True,
        action="append",
        metavar="RECIPE",
        help="a recipe file, or the name of a built-in recipe; repeatable: later ones override",
    )
    add("--gpus", type=int, metavar="N", help="total number of GPUs (default: as in the recipe)")
    add(
        "--gpu",
        metavar="NAME",
        help="A100, H100 or H200: checks its memory and estimates the hours",
    )
    add("--gpu-memory", metavar="80GB", help="memory per GPU; exceeding it is reported as a fault")
    add(
        "--utilisation",
        type=float,
        metavar="SHARE",
        help="share of the GPU's peak that training reaches, for the hours (default: 0.4, assumed)",
    )
    add(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a key; the flags of `fit` work, too; repeatable",
    )
    add("--json", action="store_true", help="one JSON object instead of a report")


def run(args: argparse.Namespace) -> None:
    """Check a recipe and print its cost; raise a UserError if it cannot run."""
    if args.gpus is not None and args.gpus < 1:
        raise UserError(f"--gpus must be at least 1, got {args.gpus}")
    paths = [Path(find_recipe(config)) for config in args.config]
    path = ", ".join(map(str, paths))
    from metaembed_pl.cli.recipe_faults import read_recipe

    target = _target(args)
    recipe = read_recipe(paths, args.set)
    report, faults = _checked(recipe, target)
    faults = [*recipe.faults, *faults]
    if args.json:
        print(json.dumps({"recipe": path, **report, "faults": faults}, indent=2))
    else:
        print_report(path, report)
        for fault in faults:
            print(f"fault: {fault}", file=sys.stderr)
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{path} would not run: {count}")


@dataclass(frozen=True)
class Target:
    """The GPUs that a recipe is checked for.

    Args:
        num_gpus: None: as in the recipe.
        gpu: name of the GPU; None: unknown.
        limit: memory of a GPU in bytes; None: no limit.
        utilisation: share of the GPU's peak; None: the default.
    """

    num_gpus: int | None
    gpu: str | None
    limit: int | None
    utilisation: float | None


def _target(args: argparse.Namespace) -> Target:
    from metaembed_pl.training.flops import GPUS
    from metaembed_pl.training.memory_advice import parse_gib

    if args.gpu is None:
        refuse_ignored(args, "needs --gpu NAME, whose peak it is a share of", "utilisation")
    name = args.gpu and args.gpu.upper()
    if name is not None and name not in GPUS:
        raise UserError(f"--gpu must be one of {', '.join(GPUS)}, got {args.gpu}")
    if args.utilisation is not None and not 0 < args.utilisation <= 1:
        raise UserError(f"--utilisation is a share above 0 and at most 1, got {args.utilisation}")
    limit = GPUS[name].memory_bytes if name else None
    if args.gpu_memory is not None:
        limit = parse_gib(args.gpu_memory)
    return Target(args.gpus, name, limit, args.utilisation)


def _checked(recipe: "Recipe", target: Target) -> tuple[dict[str, Any], list[str]]:
    """The report by section, and the faults beyond those of the recipe itself."""
    from metaembed_pl.cli.check_data import look_at, measure
    from metaembed_pl.cli.check_faults import hardware, loss_faults, run_faults
    from metaembed_pl.model.weightless import count_parameters

    faults: list[str] = []
    report: dict[str, Any] = {}
    if recipe.config is None:
        return report, faults
    trainer = recipe.config.trainer
    faults += run_faults(recipe)
    count, on_gpu = hardware(trainer, target.num_gpus, faults)
    data = None
    if recipe.data is not None:
        data = look_at(recipe.data, count)
        faults += data.faults
        if not (recipe.data.train_sources or _has_fault(recipe, "data.train")):
            faults.append("data.train: the recipe names no training source")
    made = _weightless_model(recipe, faults)
    if recipe.model is not None:
        faults += loss_faults(recipe.model, made, data)
    if made is not None:
        report["backbone"] = made.source
        report["parameters"] = count_parameters(made.model)
    if data is not None:
        report |= _of_data(recipe, data)
        report["notes"] += _of_licence(recipe)
    if made is not None and data is not None:
        lengths = measure(made.model, data.sources)
        report["tokens"] = _of_lengths(lengths, made)
        step, running = _step(recipe, data, lengths, count), _running(recipe, count, on_gpu)
        report["memory"] = _of_memory(made, step, running, target.limit, faults)
        report["compute"] = _of_compute(made, step, running, lengths, report["steps"], target)
        report["data_path"] = _of_data_path(recipe, made, data, running, report["compute"])
    return report, faults


def _has_fault(recipe: "Recipe", key: str) -> bool:
    return any(fault.startswith(key) for fault in recipe.faults)


def _weightless_model(recipe: "Recipe", faults: list[str]) -> "WeightlessModel | None":
    """The model on the meta device; None if it cannot be built."""
    from metaembed_pl.model.weightless import weightless_model

    module = recipe.model
    if module is None:
        return None
    backbone = module.backbone_config
    if not (module.start_from or backbone.path or backbone.scratch):
        if not _has_fault(recipe, "model.backbone"):
            faults.append("model.backbone: give a backbone, or a model to start_from")
        return None
    shapes = recipe_folder() / "configs"
    try:
        return weightless_model(module.assemble, backbone, module.prompt, module.start_from, shapes)
    except UserError as error:
        faults.append(str(error) if str(error).startswith("model.") else f"model: {error}")
        return None


def _of_licence(recipe: "Recipe") -> list[str]:
    """A note that the licence of a gated model must be accepted, unless its weights are here."""
    from huggingface_hub import try_to_load_from_cache

    from metaembed_pl.model.hub_faults import must_be_accepted

    path = recipe.model and recipe.model.backbone_config.path
    if path not in GATED or isinstance(try_to_load_from_cache(path, "config.json"), str):
        return []
    return [f"{path}: {must_be_accepted(path)}"]


def _of_data(recipe: "Recipe", data: "Data") -> dict[str, Any]:
    assert recipe.data is not None
    size, trainer = recipe.data.global_batch_size, recipe.config.trainer
    steps: dict[str, Any] = {"global_batch_size": size, "max_steps": trainer.max_steps}
    if trainer.accumulate_grad_batches > 1:
        steps["batches_a_step"] = trainer.accumulate_grad_batches
    if trainer.max_epochs not in (None, -1):
        steps["max_epochs"] = trainer.max_epochs
    if data.steps_per_epoch is not None:
        steps |= {"num_pairs": data.num_pairs, "steps_an_epoch": data.steps_per_epoch}
    negatives = {"in_batch": size - 1, "hard": data.num_negatives}
    questions = round(data.num_questions, 2)
    return {"negatives": negatives, "questions": questions, "steps": steps, "notes": data.notes}


def _of_lengths(lengths: "Lengths", made: "WeightlessModel") -> dict[str, Any]:
    found: dict[str, Any] = {
        side: {
            "average": lengths.average and lengths.average[side].num_tokens,
            "longest": row.num_tokens,
            "patches": row.num_patches,
        }
        for side, row in lengths.longest.items()
    }
    words = "of the data" if lengths.is_sampled else "at the recipe's limits, no data to look at"
    if not made.counts_tokens:
        words += "; words are counted roughly, because no tokenizer is available"
    return {**found, "longest_is": words}


def _step(recipe: "Recipe", data: "Data", lengths: "Lengths", num_gpus: int) -> "Step":
    from metaembed_pl.training.memory import Step

    assert recipe.data is not None
    assert recipe.model is not None
    return Step(
        num_pairs=max(1, recipe.data.global_batch_size // num_gpus),
        num_negatives=max(data.num_negatives),
        query=lengths.longest["query"],
        candidate=lengths.longest["candidate"],
        both_directions=recipe.model.loss.both_directions,
        num_questions=data.num_questions,
    )


def _running(recipe: "Recipe", num_gpus: int, on_gpu: bool) -> "Running":
    from metaembed_pl.training.memory import Running

    assert recipe.model is not None
    trainer, backbone = recipe.config.trainer, recipe.model.backbone_config
    return Running(
        num_gpus=num_gpus,
        strategy=trainer.strategy if isinstance(trainer.strategy, str) else "ddp",
        precision=str(trainer.precision or "32-true"),
        is_checkpointed=backbone.gradient_checkpointing,
        has_mask=backbone.attention != "flash_attention_2",
        on_gpu=on_gpu,
        is_quantized=backbone.quantization is not None,
        max_chunk_tokens=recipe.model.max_chunk_tokens,
    )


def _of_compute(
    made: "WeightlessModel",
    step: "Step",
    running: "Running",
    lengths: "Lengths",
    steps: dict[str, Any],
    target: Target,
) -> dict[str, Any]:
    """FLOPs of a step over all ranks, and the hours of the run if the GPU is known."""
    from metaembed_pl.training.flops import GPUS, UTILISATION, training_flops

    rows = lengths.average or lengths.longest
    calls = replace(step, query=rows["query"], candidate=rows["candidate"]).calls
    flops = running.num_gpus * training_flops(made.model, calls, running.is_checkpointed)
    found: dict[str, Any] = {"flops_a_step": flops, "is_longest": not lengths.is_sampled}
    if target.gpu is None:
        return found
    share = target.utilisation or UTILISATION
    found |= {"gpu": target.gpu, "utilisation": share}
    found["is_assumed"] = target.utilisation is None
    if (count := _num_batches(steps)) is not None:
        rate = running.num_gpus * GPUS[target.gpu].flops * share
        found["hours"] = count * flops / rate / 3600
    return found


def _of_data_path(
    recipe: "Recipe",
    made: "WeightlessModel",
    data: "Data",
    running: "Running",
    compute: dict[str, Any],
) -> dict[str, Any] | None:
    """Pairs per second that one worker prepares and one GPU consumes; None without data."""
    from metaembed_pl.cli.check_rate import data_rate
    from metaembed_pl.data.workers import workers_for
    from metaembed_pl.training.flops import GPUS

    assert recipe.data is not None
    rate = data_rate(made.model, data.sources)
    if rate is None:
        return None
    workers = recipe.data.num_workers
    if workers is None:
        workers = workers_for(running.num_gpus) if running.on_gpu else 1
    found = {
        "pairs_a_worker": rate.pairs,
        "pictures_a_worker": rate.pictures,
        "measured": rate.num_pairs,
        "workers": workers,
    }
    if "gpu" in compute and running.on_gpu:
        of_gpu = GPUS[compute["gpu"]].flops * compute["utilisation"]
        pairs = recipe.data.global_batch_size / compute["flops_a_step"]
        found |= {"pairs_a_gpu": of_gpu * pairs}
        found["workers_needed"] = math.ceil(found["pairs_a_gpu"] / rate.pairs)
    return found


def _num_batches(steps: dict[str, Any]) -> int | None:
    """Batches of the run, if known from the recipe or its data."""
    limits = []
    if steps["max_steps"] not in (None, -1):
        limits.append(steps["max_steps"] * steps.get("batches_a_step", 1))
    if "max_epochs" in steps and "steps_an_epoch" in steps:
        limits.append(steps["max_epochs"] * steps["steps_an_epoch"])
    return min(limits, default=None)


def _of_memory(
    made: "WeightlessModel", step: "Step", running: "Running", limit: int | None, faults: list[str]
) -> dict[str, Any]:
    from metaembed_pl.training.memory import estimate
    from metaembed_pl.training.memory_advice import last_resort, memory_advice

    memory: Memory = estimate(made.model, step, running)
    found: dict[str, Any] = {"total": memory.total, **asdict(memory)}
    found |= {"gpus": running.num_gpus, "strategy": running.strategy}
    found |= {"precision": running.precision, "pairs_a_gpu": step.num_pairs}
    if limit is not None:
        found["limit"] = limit
        if memory.total > limit:
            settings = memory_advice(made.model, step, running, limit)
            advice = "; or ".join(settings) or last_resort(memory, limit)
            faults.append(
                f"memory: {memory.total / GIB:.1f} GiB per GPU, more than {limit / GIB:.1f}; "
                f"what would make it fit: {advice}"
            )
    return found
