"""The report of an evaluation: numbers for machines, a page and two pictures for people.

    metrics.json   metric name -> number, the same names as in the console and in MLflow
    report.md      a table by dataset and budget, and what the numbers depend on
    budgets.png    quality against bytes a candidate and against scoring time
    gallery.png    queries with what they found

C: candidates    Rq, Rc: vectors of a query, of a candidate    D: width
"""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.budget import Budget
from metaembed_pl.environment import commit, versions
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.budgets_picture import METRIC, Cost, Curve, draw_budgets
from metaembed_pl.evaluation.canvas import report_style, save_picture
from metaembed_pl.evaluation.gallery_picture import draw_gallery
from metaembed_pl.evaluation.result import DatasetResult
from metaembed_pl.files import write_text
from metaembed_pl.late_interaction import maxsim

NUM_TIMED_CANDIDATES = 10_000
TIMED_POOL_BYTES = 2**29
COLUMNS = {"recall@1": "recall@1", "mrr": "MRR", "ndcg@5": "NDCG@5"}


def write_report(
    folder: Path, stage: str, results: Sequence[DatasetResult], groups: Sequence[Budget]
) -> list[Path]:
    """Write the report of some datasets; files of an older one are replaced, each at once.

    Args:
        folder: made if missing.
        stage: first part of the metric names, such as `test`.
        results: one a dataset; all encoded by one model.
        groups: its budgets, smallest first.

    Returns:
        The files written.

    Raises:
        UserError: nothing was evaluated.
    """
    if not results:
        raise UserError("no dataset was evaluated, so there is nothing to report")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    costs = measure_costs(results[0].queries, results[0].candidates, groups)
    metrics = {
        f"{stage}/{result.name}/{name}": float(value)
        for result in results
        for name, value in result.metrics.items()
    }
    metrics_file, page, budgets, gallery = (
        folder / name for name in ("metrics.json", "report.md", "budgets.png", "gallery.png")
    )
    with report_style():
        # Both are drawn before one is saved: a picture that does not decode leaves the old report.
        figures = (
            draw_budgets(_curves(results, groups), groups, costs),
            draw_gallery(results, groups),
        )
        save_picture(figures[0], budgets)
        save_picture(figures[1], gallery)
    write_text(page, _page(stage, results, groups, costs))
    # Last, so that whoever waits for the numbers finds the whole report.
    write_text(metrics_file, json.dumps(metrics, indent=2, sort_keys=True) + "\n")
    return [metrics_file, page, budgets, gallery]


def _curves(results: Sequence[DatasetResult], groups: Sequence[Budget]) -> list[Curve]:
    return [
        Curve(result.name, [result.metrics[f"{METRIC}/{group}"] for group in groups])
        for result in results
    ]


def measure_costs(
    queries: Float[Tensor, "Q Rq D"],
    candidates: Float[Tensor, "C Rc D"],
    budgets: Sequence[Budget],
    num_repeats: int = 15,
) -> list[Cost]:
    """Bytes of a candidate in bf16, and the time to score one query with 10,000 candidates.

    The pool is repeated or cut to that number. Where 10,000 would not fit in half a GiB, fewer are
    timed and the time is scaled: MaxSim is linear in their number. The fastest of several runs
    counts: what else the machine does only ever adds to it.
    """
    width = candidates.shape[2]
    largest = max(r_c for _, r_c in budgets)
    num_timed = min(NUM_TIMED_CANDIDATES, max(1, TIMED_POOL_BYTES // (4 * largest * width)))
    pool = candidates[torch.arange(num_timed) % len(candidates)]
    times_s = [math.inf] * len(budgets)
    for i, (r_q, r_c) in enumerate(budgets):
        # Contiguous, as an index that keeps this budget's vectors would be.
        query, vectors = queries[:1, :r_q].contiguous(), pool[:, :r_c].contiguous()
        for _ in range(num_repeats):
            start = time.perf_counter()
            maxsim(query, vectors)
            times_s[i] = min(times_s[i], time.perf_counter() - start)
    scale = NUM_TIMED_CANDIDATES / num_timed
    return [
        Cost(candidate_bytes=2 * r_c * width, scoring_s=scale * time_s)
        for (_, r_c), time_s in zip(budgets, times_s, strict=True)
    ]


def _page(
    stage: str, results: Sequence[DatasetResult], groups: Sequence[Budget], costs: Sequence[Cost]
) -> str:
    head = ["dataset", "budget", *COLUMNS.values(), "bytes a candidate", "ms a query"]
    rows = [
        [
            result.name.replace("|", "\\|") if group is groups[0] else "",
            str(group),
            *(f"{result.metrics[f'{name}/{group}']:.3f}" for name in COLUMNS),
            f"{cost.candidate_bytes:,}",
            f"{1000 * cost.scoring_s:.1f}",
        ]
        for result in results
        for group, cost in zip(groups, costs, strict=True)
    ]
    sizes = "; ".join(
        f"{result.name}: {len(result.queries):,} queries, {len(result.candidates):,} candidates"
        for result in results
    )
    return "\n".join(
        [
            f"# Report: {stage}",
            "",
            "| " + " | ".join(head) + " |",
            "|---|---|" + "---:|" * (len(head) - 2),
            *("| " + " | ".join(row) + " |" for row in rows),
            "",
            f"{sizes}.",
            "",
            "A budget is query vectors x candidate vectors. Ties count against the model. Bytes: "
            f"bf16, width {results[0].candidates.shape[2]}. Time: one query against "
            f"{NUM_TIMED_CANDIDATES:,} candidates, exact, float32 on the CPU with "
            f"{torch.get_num_threads()} threads, scoring alone, the fastest of several runs.",
            "",
            "![Quality against bytes and time](budgets.png)",
            "",
            "![Queries and what they found](gallery.png)",
            "",
            f"Commit {commit() or 'unknown'}; "
            + ", ".join(f"{name} {version}" for name, version in versions().items())
            + ".",
            "",
        ]
    )
