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
from typing import Any

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
class Settings:
    """How to evaluate; nothing here but `dtype` changes a number.

    Args:
        data: the folder of all data.
        out: where results and stores go.
        pace: how many items are encoded at a time.
        dtype: of stored vectors; bf16 takes half the disk of fp32.
        on_progress: called with the progress of a side.
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
    model: Encoder, benchmark: Benchmark, budgets: Sequence[Budget], settings: Settings
) -> Outcome | None:
    """Evaluate a model on a benchmark; what was kept of an earlier run is not done again.

    Args:
        model: on the device to use.
        benchmark: its files are there.
        budgets: smallest first.
        settings: the rest.

    Returns:
        The outcome, kept in the settings' folder; None on all ranks but the first.

    Raises:
        UserError: the folder holds another model's or benchmark's evaluation, or data are not
            valid.
    """
    rank, _ = rank_and_world()
    about = _begin(model, benchmark, settings) if rank == 0 else {}
    done = []
    for number, task in enumerate(benchmark.tasks, start=1):
        found = task.open(settings.data)
        kept = _kept(task, found, budgets, settings.out)
        if kept is None:
            started = time.perf_counter()
            kept = _evaluate_task(model, task, found, budgets, settings)
            took = time.perf_counter() - started
            if kept is not None:
                _say(f"{number} of {len(benchmark.tasks)}", kept, budgets[-1], f"{took:.0f} s")
        elif rank == 0:
            _say(f"{number} of {len(benchmark.tasks)}", kept, budgets[-1], "kept")
        done.append(kept)
    if rank:
        return None
    names = [str(budget) for budget in budgets]
    tasks = [task for task in done if task is not None]
    outcome = Outcome(benchmark.name, benchmark.title, names, about, tasks)
    outcome.save(settings.out)
    return outcome


def _begin(model: Encoder, benchmark: Benchmark, settings: Settings) -> dict[str, Any]:
    """Refuse to mix two evaluations in one folder; say what this one depends on."""
    key = {
        "benchmark": benchmark.name,
        "identity": identity_of(model),
        "dtype": settings.dtype,
    }
    file = settings.out / ABOUT
    if file.exists():
        kept = read_json_object(file)
        for name, value in key.items():
            if kept.get(name) != value:
                raise UserError(
                    f"{settings.out} contains an evaluation with {name} {kept.get(name)!r}, not "
                    f"{value!r}: choose another --out"
                )
    settings.out.mkdir(parents=True, exist_ok=True)
    about = key | about_model(model) | {"batch_size": settings.pace.batch_size}
    write_text(file, json.dumps(about, indent=2) + "\n")
    return about


def _kept(
    task: Task, found: RetrievalSet, budgets: Sequence[Budget], out: Path
) -> TaskOutcome | None:
    """What an earlier run kept of the same task, where it has all the budgets."""
    kept = TaskOutcome.load(out, task.name)
    if kept is None or kept.data != digest_of_set(found):
        return None
    has_all = all(f"{task.metric}/{budget}" in kept.values for budget in budgets)
    ends = {str(budgets[0]), str(budgets[-1])}
    return kept if has_all and ends <= set(kept.hits) else None


def _evaluate_task(
    model: Encoder,
    task: Task,
    found: RetrievalSet,
    budgets: Sequence[Budget],
    settings: Settings,
) -> TaskOutcome | None:
    started = time.perf_counter()
    stores = settings.out / "stores"
    store, bad_candidates = encode_candidates(
        model, found, stores, settings.pace, settings.dtype, settings.on_progress
    )
    # Every rank asks its share of the queries; where there are fewer than ranks, some ask none.
    rank, world = rank_and_world()
    share = torch.arange(len(found.queries)).tensor_split(world)[rank].tolist()
    of_ranks = gather_objects(_ask(model, found.asking(share), store, budgets, settings))
    wait_for_ranks()  # no rank ends before rank 0 has what it sent
    if rank:
        return None
    answers = [answer for answer in of_ranks if answer is not None]
    ranking_s = answers[0].ranking_s
    kept = TaskOutcome.of(
        task,
        found,
        {
            budget: Ranked.joined([answer.ranked[budget] for answer in answers])
            for budget in budgets
        },
        bad_queries=[line for answer in answers for line in answer.bad],
        bad_candidates=bad_candidates,
        diversity=alikeness(torch.cat([answer.first for answer in answers]), store),
        seconds={
            "encoding": time.perf_counter() - started - ranking_s,
            "ranking": ranking_s,
        },
    )
    kept.save(settings.out)
    return kept


@dataclass(frozen=True)
class _Answer:
    """What a rank's share of a task's queries found.

    Args:
        ranked: at each budget; a query that cannot be read has 0 everywhere.
        bad: these queries, with the reason.
        first: embeddings of the first queries.
        ranking_s: time.
    """

    ranked: dict[Budget, Ranked]
    bad: list[str]
    first: Tensor
    ranking_s: float


def _ask(
    model: Encoder,
    share: RetrievalSet,
    store: Store,
    budgets: Sequence[Budget],
    settings: Settings,
) -> _Answer | None:
    """Encode and rank; None where there is no query."""
    if not share.queries:
        return None
    queries, bad = encode_queries(model, share.queries, settings.pace, settings.on_progress)
    is_good = torch.ones(len(queries))
    is_good[list(bad)] = 0
    started = time.perf_counter()
    ranked = {}
    for number, budget in enumerate(budgets, start=1):
        found = rank_task(share, queries.to(model.device), store, budget)
        values = {name: per_query * is_good for name, per_query in found.values.items()}
        hits = [[] if query in bad else of_query for query, of_query in enumerate(found.hits)]
        ranked[budget] = Ranked(values, hits)
        settings.on_progress("budgets", number, len(budgets))
    unreadable = [f"{share.queries[i].uid}: {why}" for i, why in sorted(bad.items())]
    return _Answer(ranked, unreadable, queries[:NUM_ITEMS].clone(), time.perf_counter() - started)


def _say(place: str, task: TaskOutcome, budget: Budget, how: str) -> None:
    name = f"{task.metric}/{budget}"
    log.info("%s: %s, %s %.3f (%s)", place, task.name, name, task.score(str(budget)), how)
    unread = len(task.bad_queries) + len(task.bad_candidates)
    if unread:
        log.warning("%s: %d items cannot be read and count as missed", task.name, unread)
    if task.deviation:
        log.warning("%s is not as published: %s", task.name, task.deviation)
