"""What an evaluation leaves behind: values of every query, at every budget, as files.

    results.json       what was evaluated, with what; the means and their intervals
    tasks/TASK.json    the values of each query, and what some of them found

Q: queries
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.benchmarks import OVERALL
from metaembed_pl.evaluation.statistics import Interval, interval_of, resampled_means
from metaembed_pl.files import read_json_object, write_text

RESULTS = "results.json"
Hits = list[list[tuple[int, float]]] | list[list[list[float]]]


@dataclass(frozen=True)
class TaskOutcome:
    """One task, evaluated.

    Args:
        name: the task's.
        metric: what it is judged by.
        labels: of the means it counts in.
        data: a digest of what was asked, so that other data are not taken for the same.
        queries: ids, in order.
        num_candidates: in the pool, or in all lists together.
        num_left_out: queries of the source that have no right candidate.
        bad_queries: that could not be read, with the reason; each counts as 0.
        bad_candidates: likewise; no query finds them, and where one is right that counts as missed.
        deviation: from the published set, if it deviates.
        values: for each metric and budget, such as `ndcg@5/4x8`, one value a query.
        hits: for the smallest and the largest budget what each query found first: candidates, by
            their index, and scores.
        diversity: how alike an item's vectors are, by side; see diversity.py.
        seconds: that encoding and ranking took.
    """

    name: str
    metric: str
    labels: tuple[str, ...]
    data: str
    queries: list[str]
    num_candidates: int
    num_left_out: int
    bad_queries: list[str]
    bad_candidates: list[str]
    deviation: str | None
    values: dict[str, list[float]]
    hits: dict[str, Hits]
    diversity: dict[str, list[list[float]]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def score(self, budget: str, metric: str | None = None) -> float:
        """The mean over queries of a metric, by default the task's own."""
        values = self.values[f"{metric or self.metric}/{budget}"]
        return sum(values) / len(values)

    def save(self, folder: Path) -> None:
        """Keep it in an evaluation's folder."""
        (folder / "tasks").mkdir(exist_ok=True)
        write_text(_task_file(folder, self.name), json.dumps(asdict(self)) + "\n")

    @classmethod
    def load(cls, folder: Path, name: str) -> "TaskOutcome | None":
        """A task that was kept; None: it was not."""
        file = _task_file(folder, name)
        if not file.exists():
            return None
        kept: Any = read_json_object(file)
        try:
            return cls(**kept | {"labels": tuple(kept["labels"])})
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{file} is damaged ({error}): remove it, and evaluate again"
            ) from error


@dataclass(frozen=True)
class Outcome:
    """A benchmark, evaluated.

    Args:
        benchmark: its name.
        title: for readers.
        budgets: that were evaluated, smallest first.
        about: of the model, versions, settings.
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
        """What means are taken over; the overall mean last, if there are several tasks."""
        labels = dict.fromkeys(label for task in self.tasks for label in task.labels)
        return [*labels, OVERALL]

    def labelled(self, label: str) -> list[TaskOutcome]:
        """The tasks of a mean."""
        return [task for task in self.tasks if label == OVERALL or label in task.labels]

    def mean(self, label: str, budget: str) -> Interval:
        """The plain mean over the tasks of a label, each by its own metric, with its interval."""
        chosen = [i for i, task in enumerate(self.tasks) if label in (OVERALL, *task.labels)]
        for i in chosen:
            if (i, budget) not in self._resampled:
                task = self.tasks[i]
                values = task.values[f"{task.metric}/{budget}"]
                self._resampled[i, budget] = resampled_means(values, seed=i)
        means = [self.tasks[i].score(budget) for i in chosen]
        return interval_of(means, [self._resampled[i, budget] for i in chosen])

    def metrics(self) -> dict[str, float]:
        """Every mean, named as in training: `evaluate/TASK/ndcg@5/4x8`."""
        named = {
            f"evaluate/{task.name}/{key}": sum(values) / len(values)
            for task in self.tasks
            for key, values in task.values.items()
        }
        for label in self.labels:
            for budget in self.budgets:
                named[f"evaluate/{label}/{budget}"] = self.mean(label, budget).mean
        return named

    def save(self, folder: Path) -> None:
        """Keep everything but the tasks, which are kept one by one."""
        means = {
            label: {budget: asdict(self.mean(label, budget)) for budget in self.budgets}
            for label in self.labels
        }
        kept = {
            "benchmark": self.benchmark,
            "title": self.title,
            "budgets": self.budgets,
            "about": self.about,
            "tasks": [task.name for task in self.tasks],
            "means": means,
            "metrics": self.metrics(),
        }
        write_text(folder / RESULTS, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Outcome":
        """An evaluation that was kept.

        Raises:
            UserError: there is none, or a task of it is missing.
        """
        file = Path(folder) / RESULTS
        try:
            kept = json.loads(file.read_text())
            tasks = [TaskOutcome.load(folder, name) for name in kept["tasks"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{folder} is not a finished evaluation ({error}): expected what `evaluate --out` "
                "writes"
            ) from error
        found = [task for task in tasks if task is not None]
        if len(found) != len(tasks):
            raise UserError(f"{folder}: a task of {RESULTS} is missing: evaluate again")
        return cls(kept["benchmark"], kept["title"], kept["budgets"], kept["about"], found)


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
