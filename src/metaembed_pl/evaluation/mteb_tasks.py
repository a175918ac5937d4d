"""Benchmarks and tasks of mteb, loaded by mteb and saved as our retrieval sets.

    python -m metaembed_pl evaluate --model M --benchmark jina_vdr
    python -m metaembed_pl evaluate --model M --benchmark mteb:NanoArguAnaRetrieval

mteb loads a task when it is first needed; it is written to `data/mteb/TASK` and read from there.
Each subset (language) of a task is a separate task here. Needs the extra `mteb`.
"""

import difflib
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metaembed_pl.data.beir import RetrievalSetWriter, is_retrieval_set
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.benchmarks import Benchmark, Task
from metaembed_pl.item import Item
from metaembed_pl.model.hub_faults import why_not

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MtebTask(Task):
    """A subset of a task of mteb's.

    Args:
        task: of mteb.
        subset: of the task, such as a language.
        split: of the task.
    """

    task: Any = None
    subset: str = "default"
    split: str = "test"

    def open(self, data: Path) -> RetrievalSet:
        """Its queries and candidates; loaded by mteb if they are not in `data` yet.

        Raises:
            UserError: mteb cannot load it.
        """
        if not is_retrieval_set(data / self.folder):
            self._write(data / self.folder)
        return super().open(data)

    def _write(self, folder: Path) -> None:
        log.info("%s: loaded by mteb, kept in %s", self.name, folder)
        try:
            self.task.load_data()
        except Exception as error:  # any fault of the network or of a dataset's files
            path = self.task.metadata.dataset["path"]
            raise UserError(
                f"{self.name}: mteb could not load {path}: {why_not(path, error)}"
            ) from error
        parts = self.task.dataset[self.subset][self.split]
        with RetrievalSetWriter(folder, self.name, source=self.source) as writer:
            for item in _items(parts["corpus"]):
                writer.add_candidate(item)
            for item in _items(parts["queries"]):
                writer.add_query(item)
            for query, judged in parts["relevant_docs"].items():
                for candidate, score in judged.items():
                    writer.judge(query, candidate, score)
            for query, candidates in (parts.get("top_ranked") or {}).items():
                writer.list_candidates(query, candidates)


def mteb_benchmark(name: str) -> Benchmark:
    """A benchmark or a task of mteb.

    Raises:
        UserError: mteb is not installed, or has no usable benchmark or task of that name.
    """
    if find_spec("mteb") is None:
        raise UserError(f"mteb:{name} needs mteb: pip install metaembed-pl[mteb]")
    import mteb

    try:
        tasks = [mteb.get_task(name)]
    except KeyError:
        tasks = list(_benchmark(mteb, name).tasks)
    usable = [task for task in tasks if task.metadata.is_public and hasattr(task, "load_data")]
    left_out = [task.metadata.name for task in tasks if task not in usable]
    if left_out:
        log.warning("mteb:%s: private sets are left out: %s", name, ", ".join(left_out))
    found = tuple(part for task in usable for part in _parts(task))
    if not found:
        raise UserError(f"mteb:{name} has no public retrieval task")
    return Benchmark(f"mteb:{name}", name, found)


def _benchmark(mteb: Any, name: str) -> Any:
    try:
        return mteb.get_benchmark(name)
    except KeyError as error:
        known = [benchmark.name for benchmark in mteb.get_benchmarks()]
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"; did you mean mteb:{near[0]}?" if near else ""
        raise UserError(f"mteb has no benchmark or task {name!r}{hint}") from error


def _parts(task: Any) -> Iterator[MtebTask]:
    """A task for each subset and split; several of them have a mean of their own."""
    about = task.metadata
    if "retrieval" not in about.type.lower() and about.type not in SEARCHES:
        return
    places = [(subset, split) for subset in task.hf_subsets for split in task.eval_splits]
    for subset, split in places:
        several = len(places) > 1
        name = f"{about.name} {subset}" if several else about.name
        yield MtebTask(
            name=name,
            folder=f"mteb/{name}-{split}".replace(" ", "-"),
            metric=about.main_score.replace("_at_", "@"),
            labels=(about.name,) if several else (),
            source=about.dataset["path"],
            task=task,
            subset=subset,
            split=split,
        )


SEARCHES = ("DocumentUnderstanding", "Any2AnyRetrieval", "Reranking", "InstructionReranking")
"""Types of mteb's tasks, beside those called retrieval, that have queries and a corpus."""


def _items(rows: Any) -> Iterator[Item]:
    """A corpus or queries as items; texts are joined as mteb does."""
    if "image" in rows.features:
        from datasets import Image

        rows = rows.cast_column("image", Image(decode=False))
    for row in rows:
        words = [row.get(name) for name in ("title", "text", "instruction")]
        if not all(word is None or isinstance(word, str) for word in words):
            raise UserError(f"{row['id']}: expected a text, got a conversation")
        picture = row.get("image") or {}
        image = picture.get("bytes") or picture.get("path")
        text = " ".join(word for word in words if word).strip()
        yield Item(
            text or None, image and (image if isinstance(image, bytes) else Path(image)), row["id"]
        )
