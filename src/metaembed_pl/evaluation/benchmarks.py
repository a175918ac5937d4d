"""What a benchmark is: sets, the metric of each, what means are taken over, and who scored what.

`open_benchmark` knows the named ones (mmeb.py, vidore.py) and what a user has on disk:
`beir:DIR` and `pairs:DIR`, where DIR is one set, or holds several.
"""

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from metaembed_pl.data.beir import is_retrieval_set, read_retrieval_set
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError

log = logging.getLogger(__name__)

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


def open_benchmark(name: str, data: Path) -> Benchmark:
    """A benchmark by its name, its files checked.

    Args:
        name: one of `NAMED`, `beir:DIR` or `pairs:DIR`.
        data: the folder of all data.

    Raises:
        UserError: there is none of that name, or its files are not there.
    """
    from metaembed_pl.evaluation.mmeb import MMEB, MMEB_V2
    from metaembed_pl.evaluation.vidore import VIDORE_V1, VIDORE_V2, VIDORE_V3

    kind, colon, folder = name.partition(":")
    if colon and kind in ("beir", "pairs"):
        return _of_folder(name, kind, Path(folder))
    known = {one.name: one for one in (MMEB, MMEB_V2, VIDORE_V1, VIDORE_V2, VIDORE_V3)}
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise UserError(
            f"there is no benchmark {name!r}{hint}; known are {', '.join(known)}, beir:DIR and "
            "pairs:DIR"
        )
    known[name].check_files(data)
    return known[name]


def _of_folder(name: str, kind: str, folder: Path) -> Benchmark:
    """A benchmark of one user's sets."""
    metric = "ndcg@10" if kind == "beir" else "recall@1"
    found = [path for path in (folder, *_subfolders(folder)) if _is(kind, path)]
    if not found:
        expected = "corpus.jsonl" if kind == "beir" else "*.tar"
        raise UserError(f"{name}: expected {expected} in {folder} or in a folder right below it")
    tasks = tuple(Task(path.resolve().name, str(path.resolve()), metric) for path in found)
    return Benchmark(name, folder.resolve().name, tasks)


def _subfolders(folder: Path) -> Sequence[Path]:
    return sorted(path for path in folder.glob("*/") if path.is_dir())


def _is(kind: str, folder: Path) -> bool:
    return is_retrieval_set(folder) if kind == "beir" else any(folder.glob("*.tar"))
