"""Run a benchmark: encode, rank, save. report.py writes the report.

Finished tasks are kept one by one, so that an interrupted evaluation resumes where it stopped.
"""

import json
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metaembed_pl.budget import Budget, budgets_of, check_budget
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.benchmarks import Benchmark, Task
from metaembed_pl.evaluation.diversity import NUM_ITEMS, alikeness
from metaembed_pl.evaluation.encoding import (
    OnProgress,
    digest_of_set,
    encode_candidates,
    encode_queries,
)
from metaembed_pl.evaluation.outcome import Outcome, TaskOutcome, about_model
from metaembed_pl.evaluation.scoring import rank_task
from metaembed_pl.files import read_json_object, write_text
from metaembed_pl.model.encoder import Encoder
from metaembed_pl.model.encoding import Pace
from metaembed_pl.model.identity import identity_of
from metaembed_pl.ranking import Ranked
from metaembed_pl.ranks import gather_objects, rank_and_world, wait_for_ranks
from metaembed_pl.retrieval.store import Store

log = logging.getLogger(__name__)

ABOUT = "evaluation.json"
ALL = "all"


@dataclass(frozen=True)
class EvaluationOptions:
    """How to evaluate; only `dtype` can change a result.

    Args:
        data: the folder of all data.
        out: the folder for results and stores.
        pace: how many items are encoded at a time.
        dtype: of stored vectors; bf16 takes half the disk space of fp32.
        on_progress: called with the progress on queries, candidates and budgets.
    """

    data: Path
    out: Path
    pace: Pace = field(default_factory=Pace)
    dtype: str = "bf16"
    on_progress: OnProgress = lambda what, done, total: None


def parse_budgets(text: str, groups: Sequence[Budget], widths: Sequence[int] = ()) -> list[Budget]:
    """The budgets of a command line: `all`, or some with commas between; smallest first.

    Raises:
        UserError: one that the model was not trained for.

    >>> [str(b) for b in parse_budgets("4x8,16x1", [Budget(4, 1), Budget(16, 8)])]
    ['16x1', '4x8']
    """
    if text == ALL:
        return list(budgets_of(groups, widths))
    budgets = {check_budget(part, groups, widths) for part in text.split(",")}
    return sorted(budgets, key=lambda of: (of.r_c, of.r_q, of.width or math.inf))


def evaluate(
    model: Encoder, benchmark: Benchmark, budgets: Sequence[Budget], options: EvaluationOptions
) -> Outcome | None:
    """Evaluate a model on a benchmark; tasks that an earlier run finished are not repeated.

    Args:
        model: on the device to use.
        benchmark: its files are there.
        budgets: smallest first.
        options: how to evaluate.

    Returns:
        The outcome, also saved in the folder `options.out`; None on all ranks but the first.

    Raises:
        UserError: the folder holds the evaluation of another model or benchmark, or data are not
            valid.
    """
    rank, _ = rank_and_world()
    about = _begin(model, benchmark, options) if rank == 0 else {}
    tasks = []
    for number, task in enumerate(benchmark.tasks, start=1):
        pool = task.open(options.data)
        finished, how = _finished(task, pool, budgets, options.out), "kept"
        if finished is None:
            started = time.perf_counter()
            finished = _evaluate_task(model, task, pool, budgets, options)
            how = f"{time.perf_counter() - started:.0f} s"
        if rank == 0 and finished is not None:
            _log(f"{number} of {len(benchmark.tasks)}", finished, budgets[-1], how)
            tasks.append(finished)
    if rank:
        return None
    names = [str(budget) for budget in budgets]
    outcome = Outcome(benchmark.name, benchmark.title, names, about, tasks)
    outcome.save(options.out)
    return outcome


def _begin(model: Encoder, benchmark: Benchmark, options: EvaluationOptions) -> dict[str, Any]:
    """Record what this evaluation depends on; refuse the folder of another one."""
    key = {
        "benchmark": benchmark.name,
        "identity": identity_of(model),
        "dtype": options.dtype,
    }
    file = options.out / ABOUT
    if file.exists():
        earlier = read_json_object(file)
        for name, value in key.items():
            if earlier.get(name) != value:
                raise UserError(
                    f"{options.out} contains an evaluation with {name} {earlier.get(name)!r}, not "
                    f"{value!r}: choose another --out"
                )
    options.out.mkdir(parents=True, exist_ok=True)
    about = key | about_model(model) | {"batch_size": options.pace.batch_size}
    write_text(file, json.dumps(about, indent=2) + "\n")
    return about


def _finished(
    task: Task, pool: RetrievalSet, budgets: Sequence[Budget], out: Path
) -> TaskOutcome | None:
    """The outcome of an earlier run on the same task, if it has all the budgets."""
    saved = TaskOutcome.load(out, task.name)
    if saved is None or saved.data != digest_of_set(pool):
        return None
    has_all = all(f"{task.metric}/{budget}" in saved.values for budget in budgets)
    ends = {str(budgets[0]), str(budgets[-1])}
    return saved if has_all and ends <= set(saved.hits) else None


def _evaluate_task(
    model: Encoder,
    task: Task,
    pool: RetrievalSet,
    budgets: Sequence[Budget],
    options: EvaluationOptions,
) -> TaskOutcome | None:
    started = time.perf_counter()
    stores = options.out / "stores"
    store, bad_candidates = encode_candidates(
        model, pool, stores, options.pace, options.dtype, options.on_progress
    )
    # Each rank encodes and ranks its share of the queries, which may be empty.
    rank, world = rank_and_world()
    share = torch.arange(len(pool.queries)).tensor_split(world)[rank].tolist()
    gathered = gather_objects(_rank_share(model, pool.asking(share), store, budgets, options))
    wait_for_ranks()  # no rank ends before rank 0 has what it sent
    if rank:
        return None
    shares = [share for share in gathered if share is not None]
    ranking_s = shares[0].ranking_s
    outcome = TaskOutcome.of(
        task,
        pool,
        {budget: Ranked.joined([share.ranked[budget] for share in shares]) for budget in budgets},
        bad_queries=[line for share in shares for line in share.bad],
        bad_candidates=bad_candidates,
        diversity=alikeness(torch.cat([share.first for share in shares]), store),
        seconds={"encoding": time.perf_counter() - started - ranking_s, "ranking": ranking_s},
    )
    outcome.save(options.out)
    return outcome


class _RankedShare(NamedTuple):
    """The results of one rank's share of the queries.

    Args:
        ranked: by budget; a query that cannot be read scores 0 everywhere.
        bad: the queries that cannot be read, with the reason.
        first: embeddings of the first queries.
        ranking_s: time that ranking took.
    """

    ranked: dict[Budget, Ranked]
    bad: list[str]
    first: Tensor
    ranking_s: float


def _rank_share(
    model: Encoder,
    share: RetrievalSet,
    store: Store,
    budgets: Sequence[Budget],
    options: EvaluationOptions,
) -> _RankedShare | None:
    """Encode a rank's queries and rank their candidates; None if there are no queries."""
    if not share.queries:
        return None
    queries, bad = encode_queries(model, share.queries, options.pace, options.on_progress)
    started = time.perf_counter()
    ranked = {}
    for number, budget in enumerate(budgets, start=1):
        found = rank_task(share, queries.to(model.device), store, budget)
        ranked[budget] = found.finding_nothing(bad)
        options.on_progress("budgets", number, len(budgets))
    unreadable = [f"{share.queries[i].uid}: {why}" for i, why in sorted(bad.items())]
    first = queries[:NUM_ITEMS].clone()
    return _RankedShare(ranked, unreadable, first, time.perf_counter() - started)


def _log(place: str, task: TaskOutcome, budget: Budget, how: str) -> None:
    name = f"{task.metric}/{budget}"
    log.info("%s: %s, %s %.3f (%s)", place, task.name, name, task.score(str(budget)), how)
    unread = len(task.bad_queries) + len(task.bad_candidates)
    if unread:
        log.warning("%s: %d items cannot be read and count as missed", task.name, unread)
    if task.deviation:
        log.warning("%s is not as published: %s", task.name, task.deviation)
