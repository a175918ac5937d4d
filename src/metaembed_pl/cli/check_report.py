"""The text report of `check`."""

from typing import Any

GIB = 2**30
PARTS = ("weights", "gradients", "optimizer", "activations", "gathered", "loss", "reserve")


def print_report(path: str, report: dict[str, Any]) -> None:
    """Prints the sections that the report has."""
    lines = [("recipe", path)]
    if "backbone" in report:
        lines.append(("backbone", f"as in {report['backbone']}"))
    for part, count in report.get("parameters", {}).items():
        name = "parameters" if part == "all" else f"  {part}"
        share = f"{count['trained'] / max(1, count['total']):.1%}"
        lines.append((name, f"{count['total']:>16,}  trained {count['trained']:>14,}  {share:>6}"))
    if "tokens" in report:
        lines += _token_lines(report["tokens"])
    if "negatives" in report:
        hard = " or ".join(map(str, report["negatives"]["hard"]))
        lines.append(("negatives", f"{report['negatives']['in_batch']} of the batch, {hard} hard"))
    if report.get("questions", 1) > 1:
        lines.append(("questions", f"{report['questions']} per candidate in a batch, on average"))
    if "steps" in report:
        lines.append(("steps", _steps_in_words(report["steps"])))
    if "memory" in report:
        lines += _running_lines(report)
    lines += [("note", note) for note in report.get("notes", [])]
    for name, text in lines:
        print(f"{name:<18}{text}".rstrip())


def _token_lines(tokens: dict[str, Any]) -> list[tuple[str, str]]:
    lines = [("tokens per item", f"longest {tokens['longest_is']}")]
    for side in ("query", "candidate"):
        found = tokens[side]
        average = "" if found["average"] is None else f"average {found['average']:,}, "
        patches = f", {found['patches']:,} image patches" if found["patches"] else ""
        lines.append((f"  {side}", f"{average}longest {found['longest']:,}{patches}"))
    return lines


def _steps_in_words(steps: dict[str, Any]) -> str:
    size, most = steps["global_batch_size"], steps["max_steps"]
    line = f"of {size:,} pairs" if most in (None, -1) else f"{most:,} of {size:,} pairs"
    if "steps_an_epoch" in steps:
        line += f"; {steps['steps_an_epoch']:,} an epoch of {steps['num_pairs']:,} pairs"
    return line


def _compute_in_words(compute: dict[str, Any], num_gpus: int) -> str:
    """FLOPs per step, and the hours of the run."""
    line = f"{compute['flops_a_step'] / 1e15:.3g} PFLOP per step"
    if compute["is_longest"]:
        line += ", if every row has the maximum length"
    if "hours" in compute:
        most = "at most " if compute["is_longest"] else "about "
        assumed = " (assumed)" if compute["is_assumed"] else ""
        share = f"{compute['utilisation']:.0%} of its peak{assumed}"
        line += f"; {most}{compute['hours']:.3g} hours on {num_gpus} x {compute['gpu']} at {share}"
    return line


def _running_lines(report: dict[str, Any]) -> list[tuple[str, str]]:
    """Compute, data rate and memory."""
    lines = [("compute", _compute_in_words(report["compute"], report["memory"]["gpus"]))]
    if report["data_path"]:
        lines.append(("data path", _data_path_in_words(report["data_path"])))
    return lines + _memory_lines(report["memory"])


def _data_path_in_words(found: dict[str, Any]) -> str:
    """The rate of a worker, and the number of workers that a GPU needs."""
    text = (
        f"{found['pairs_a_worker']:.3g} pairs ({found['pictures_a_worker']:.3g} pictures) per "
        f"second and worker, measured on {found['measured']} pairs"
    )
    if "workers_needed" not in found:
        return f"{text}; this run has {_workers(found['workers'])} per rank"
    needed, workers = found["workers_needed"], found["workers"]
    text += f"; a GPU takes {found['pairs_a_gpu']:.3g}: {_workers(needed)} per rank"
    if needed <= workers:
        return f"{text}, and it has {workers}"
    return f"{text}, and it has {workers}: set data.num_workers, or the GPU waits for data"


def _workers(count: int) -> str:
    return f"{count} worker{'s' * (count != 1)}"


def _memory_lines(memory: dict[str, Any]) -> list[tuple[str, str]]:
    limit = f" of {memory['limit'] / GIB:.1f}" if "limit" in memory else ""
    where = f"{memory['gpus']} x {memory['pairs_a_gpu']} pairs, {memory['strategy']}"
    lines = [
        (
            "memory per GPU",
            f"{memory['total'] / GIB:8.2f}{limit} GiB, estimated: {where}, {memory['precision']}",
        )
    ]
    return [*lines, *((f"  {part}", f"{memory[part] / GIB:8.2f}") for part in PARTS)]
