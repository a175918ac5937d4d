"""The outcome of an evaluation, in files: values and hits of every query at every budget.

    results.json       what was evaluated, and how; the means and their intervals
    tasks/TASK.json    the values and first hits of each query

Q: queries
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from metaembed_pl.budget import Budget
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.environment import commit, versions
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.benchmarks import OVERALL, Task
from metaembed_pl.evaluation.diversity import mean_cosine
from metaembed_pl.evaluation.encoding import digest_of_set
from metaembed_pl.evaluation.scoring import uids
from metaembed_pl.evaluation.statistics import Interval, interval_of, resampled_means
from metaembed_pl.files import read_json_object, write_text
from metaembed_pl.model.encoder import Encoder
from metaembed_pl.ranking import Hits, Ranked

RESULTS = "results.json"


@dataclass(frozen=True)
class TaskOutcome:
    """The outcome of one task.

    Args:
        name: of the task.
        metric: its main metric.
        labels: the means that it counts in.
        data: a digest of the task's data, so that other data are not taken for the same.
        queries: ids, in order.
        num_candidates: in the pool, or in all lists together.
        num_left_out: queries of the source that have no right candidate.
        deviation: how the set differs in size from the published one, if it does.
        values: for each metric and budget, such as `ndcg@5/4x8`, one value per query.
        hits: for the smallest and the largest budget the first candidates of each query, by index,
            with their scores.
        bad_queries: queries that could not be read, with the reason; each scores 0.
        bad_candidates: likewise; no query finds them, and a right one counts as missed.
        diversity: how similar an item's vectors are, by side; see diversity.py.
        seconds: time that encoding and ranking took.
    """

    name: str
    metric: str
    labels: tuple[str, ...]
    data: str
    queries: list[str]
    num_candidates: int
    num_left_out: int
    deviation: str | None
    values: dict[str, list[float]]
    hits: dict[str, Hits]
    bad_queries: list[str] = field(default_factory=list)
    bad_candidates: list[str] = field(default_factory=list)
    diversity: dict[str, list[list[float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, task: Task, pool: RetrievalSet, ranked: Mapping[Budget, Ranked], **more: Any
    ) -> "TaskOutcome":
        """The outcome of a task whose queries were ranked at some budgets, smallest first."""
        budgets = list(ranked)
        return cls(
            name=task.name,
            metric=task.metric,
            labels=task.labels,
            data=digest_of_set(pool),
            queries=uids(pool.queries),
            num_candidates=len(pool.candidates),
            num_left_out=pool.num_left_out,
            deviation=task.deviation(pool),
            values={
                f"{name}/{budget}": values.tolist()
                for budget, found in ranked.items()
                for name, values in found.values.items()
            },
            hits={str(budget): ranked[budget].hits for budget in (budgets[0], budgets[-1])},
            **more,
        )

    def rank(self, query: int, budget: str) -> float:
        """The rank of a query's first right candidate; infinity if none was found."""
        reciprocal = self.values[f"mrr/{budget}"][query]
        return round(1 / reciprocal) if reciprocal else math.inf

    def score(self, budget: str, metric: str | None = None) -> float:
        """The mean over queries of a metric, by default the task's own."""
        values = self.values[f"{metric or self.metric}/{budget}"]
        return sum(values) / len(values)

    def save(self, folder: Path) -> None:
        """Save it in an evaluation's folder."""
        (folder / "tasks").mkdir(parents=True, exist_ok=True)
        write_text(_task_file(folder, self.name), json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path, name: str) -> "TaskOutcome | None":
        """A saved task; None if it was not saved."""
        file = _task_file(folder, name)
        if not file.exists():
            return None
        saved: Any = read_json_object(file)
        try:
            hits = {
                budget: [[(int(i), score) for i, score in found] for found in of_queries]
                for budget, of_queries in saved["hits"].items()
            }
            return cls(**saved | {"labels": tuple(saved["labels"]), "hits": hits})
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{file} is damaged ({error}): remove it, and evaluate again"
            ) from error


@dataclass(frozen=True)
class Outcome:
    """The outcome of a benchmark.

    Args:
        benchmark: its name.
        title: shown in reports.
        budgets: the evaluated ones, smallest first.
        about: model, versions and settings.
        tasks: in the benchmark's order.
    """

    benchmark: str
    title: str
    budgets: list[str]
    about: dict[str, Any]
    tasks: list[TaskOutcome]
    _resampled: dict[tuple[int, str], Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def labels(self) -> list[str]:
        """The groups of tasks that have a mean; the overall mean is last."""
        labels = dict.fromkeys(label for task in self.tasks for label in task.labels)
        return [*labels, OVERALL]

    def labelled(self, label: str) -> list[TaskOutcome]:
        """The tasks that a mean is taken over."""
        return [task for task in self.tasks if label == OVERALL or label in task.labels]

    def of_task(self, number: int, budget: str) -> Interval:
        """The mean over the queries of a task, by its own metric, with its interval."""
        return self._mean([number], budget)

    def mean(self, label: str, budget: str) -> Interval:
        """The plain mean over the tasks of a label, each by its own metric, with its interval."""
        chosen = [i for i, task in enumerate(self.tasks) if label in (OVERALL, *task.labels)]
        return self._mean(chosen, budget)

    def _mean(self, chosen: Sequence[int], budget: str) -> Interval:
        for i in chosen:
            if (i, budget) not in self._resampled:
                task = self.tasks[i]
                values = task.values[f"{task.metric}/{budget}"]
                self._resampled[i, budget] = resampled_means(values, seed=i)
        means = [self.tasks[i].score(budget) for i in chosen]
        return interval_of(means, [self._resampled[i, budget] for i in chosen])

    def task_metrics(self, stage: str) -> dict[str, float]:
        """The means of every task, named as in training: `test/TASK/ndcg@5/4x8`.

        Also how similar an item's vectors are: `test/TASK/cosine/query`.
        """
        found = {
            f"{stage}/{task.name}/{key}": sum(values) / len(values)
            for task in self.tasks
            for key, values in task.values.items()
        }
        for task in self.tasks:
            for side, cosine in task.diversity.items():
                mean = mean_cosine(cosine, len(cosine))
                if mean is not None:
                    found[f"{stage}/{task.name}/cosine/{side}"] = mean
        return found

    def metrics(self) -> dict[str, float]:
        """Every mean: `evaluate/TASK/ndcg@5/4x8`, and `evaluate/LABEL/4x8` over tasks."""
        named = self.task_metrics("evaluate")
        for label in self.labels:
            for budget in self.budgets:
                named[f"evaluate/{label}/{budget}"] = self.mean(label, budget).mean
        return named

    def save(self, folder: Path) -> None:
        """Save the outcome and its tasks."""
        for task in self.tasks:
            task.save(folder)
        means = {
            label: {budget: asdict(self.mean(label, budget)) for budget in self.budgets}
            for label in self.labels
        }
        content = {
            "benchmark": self.benchmark,
            "title": self.title,
            "budgets": self.budgets,
            "about": self.about,
            "tasks": [task.name for task in self.tasks],
            "means": means,
            "metrics": self.metrics(),
        }
        write_text(folder / RESULTS, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Outcome":
        """A saved evaluation.

        Raises:
            UserError: there is none, or a task of it is missing.
        """
        file = Path(folder) / RESULTS
        try:
            saved = json.loads(file.read_text())
            tasks = [TaskOutcome.load(folder, name) for name in saved["tasks"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is not a finished evaluation ({error}): expected an output folder of "
                "`evaluate`"
            ) from error
        found = [task for task in tasks if task is not None]
        if len(found) != len(tasks):
            raise UserError(f"{folder}: a task of {RESULTS} is missing: evaluate again")
        return cls(saved["benchmark"], saved["title"], saved["budgets"], saved["about"], found)


def about_model(model: Encoder) -> dict[str, Any]:
    """The model, the versions and the machine, which an outcome depends on besides the data."""
    return {
        "width": model.width,
        "groups": [str(group) for group in model.groups],
        "model": model.settings(),
        "versions": versions(),
        "commit": commit(),
        "torch_threads": torch.get_num_threads(),
        "device": str(model.device),
    }


def unread(lines: Sequence[str]) -> set[str]:
    """The ids of items that could not be read, from `bad_queries` or `bad_candidates`."""
    return {line.partition(": ")[0] for line in lines}


def by_task(outcome: Outcome, budget: str, metric: str | None = None) -> dict[str, Sequence[float]]:
    """The values of each task's queries at a budget.

    Raises:
        UserError: the evaluation has no such budget or metric.
    """
    found = {}
    for task in outcome.tasks:
        name = f"{metric or task.metric}/{budget}"
        if name not in task.values:
            raise UserError(
                f"{outcome.benchmark}, {task.name}: no {name}; there are {', '.join(task.values)}"
            )
        found[task.name] = task.values[name]
    return found


def _task_file(folder: Path, name: str) -> Path:
    return folder / "tasks" / f"{name.replace('/', '_')}.json"
