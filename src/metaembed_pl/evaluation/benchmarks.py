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
        folder: where its files are, below the folder of all data.
        metric: what it is judged by.
        labels: of the means it counts in, such as a meta-task.
        source: the hub's id.
        where: only queries with these metadata.
        num_queries: as published; None where it is not known.
        num_candidates: likewise.
        prepare: the command that writes its files, but for --out, the folder of its folder.
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
            UserError: the files are not there or not valid.
        """
        folder = data / self.folder
        if is_retrieval_set(folder):
            return read_retrieval_set(folder, self.name, where=self.where)
        return RetrievalSet.from_pairs(self.name, ShardedPairs(folder))

    def deviation(self, found: RetrievalSet) -> str | None:
        """How a set differs from the published one in size; None: it does not, as far as known."""
        sizes = (
            ("queries", self.num_queries, len(found.queries)),
            ("candidates", self.num_candidates, len(found.candidates)),
        )
        said = [
            f"{count:,} {what} instead of {published:,}"
            for what, published, count in sizes
            if published is not None and count != published
        ]
        return " and ".join(said) or None


@dataclass(frozen=True)
class Reference:
    """What somebody else's model scored, in points of 100.

    Args:
        model: its name, with who says so where it is not the paper.
        budget: vectors it spent; empty for single vectors or where it has no choice.
        score: the overall mean; None where only tasks are known.
        tasks: by task or label, where known.
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
        """What means are taken over, the mean over all tasks last."""
        return [*dict.fromkeys(label for task in self.tasks for label in task.labels), OVERALL]

    def labelled(self, label: str) -> list[Task]:
        """The tasks of a mean."""
        return [task for task in self.tasks if label == OVERALL or label in task.labels]

    def check_files(self, data: Path) -> None:
        """Refuse to begin where files are missing.

        Raises:
            UserError: names every one that is, where it comes from and the command that gets it.
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
