"""A benchmark: tasks, the metric of each, the means over them, and published scores.

registry.py opens one by its name.
"""

from dataclasses import dataclass, field
from pathlib import Path

from metaembed_pl.data.beir import is_retrieval_set, read_retrieval_set
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError

OVERALL = "overall"


@dataclass(frozen=True)
class Task:
    """One set of a benchmark.

    Args:
        name: in tables and metric names.
        folder: of its files, below the folder of all data.
        metric: its main metric.
        labels: the means that it counts in, such as a meta-task.
        source: its id on the hub.
        where: only queries with these metadata.
        num_queries: as published; None: not known.
        num_candidates: likewise.
        prepare: the command that writes its files, without --out (the parent of its folder).
    """

    name: str
    folder: str
    metric: str
    labels: tuple[str, ...] = ()
    source: str = ""
    where: dict[str, str] | None = None
    num_queries: int | None = None
    num_candidates: int | None = None
    prepare: str = ""

    def open(self, data: Path) -> RetrievalSet:
        """Its queries and candidates.

        Raises:
            UserError: the files are missing or not valid.
        """
        folder = data / self.folder
        if is_retrieval_set(folder):
            return read_retrieval_set(folder, self.name, where=self.where)
        return RetrievalSet.from_pairs(self.name, ShardedPairs(folder))

    def deviation(self, found: RetrievalSet) -> str | None:
        """How a set differs in size from the published one; None if it does not, or is unknown."""
        sizes = (
            ("queries", self.num_queries, len(found.queries)),
            ("candidates", self.num_candidates, len(found.candidates)),
        )
        differences = [
            f"{count:,} {what} instead of {published:,}"
            for what, published, count in sizes
            if published is not None and count != published
        ]
        return " and ".join(differences) or None


@dataclass(frozen=True)
class Reference:
    """Published scores of another model, in points of 100.

    Args:
        model: its name, with the source if that is not the paper.
        budget: its vectors; empty for single-vector models or without a choice.
        score: the overall mean; None if only tasks are known.
        tasks: scores by task or label, if known.
    """

    model: str
    budget: str
    score: float | None
    tasks: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Benchmark:
    """Tasks that are reported together.

    Args:
        name: on the command line.
        title: in reports.
        tasks: at least one.
        references: to compare with.
    """

    name: str
    title: str
    tasks: tuple[Task, ...]
    references: tuple[Reference, ...] = ()

    @property
    def labels(self) -> list[str]:
        """The groups of tasks that have a mean; the overall mean is last."""
        return [*dict.fromkeys(label for task in self.tasks for label in task.labels), OVERALL]

    def labelled(self, label: str) -> list[Task]:
        """The tasks that a mean is taken over."""
        return [task for task in self.tasks if label == OVERALL or label in task.labels]

    def check_files(self, data: Path) -> None:
        """Refuse to start if files are missing.

        Raises:
            UserError: names every missing set, its source and the command that downloads it.
        """
        missing = {t.folder: t for t in self.tasks if not (data / t.folder).is_dir()}
        if missing:
            count = len({task.folder for task in self.tasks})
            ids = ", ".join(dict.fromkeys(task.source for task in missing.values()))
            commands = "; ".join(
                dict.fromkeys(
                    f"{task.prepare} --out {(data / folder).parent}"
                    for folder, task in missing.items()
                )
            )
            raise UserError(
                f"{self.name}: {len(missing)} of {count} sets are not in {data}: "
                f"{', '.join(missing)}; on the hub they are {ids}; get them with `{commands}`"
            )
