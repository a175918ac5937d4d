"""What a recipe trains and evaluates on: shards, tables and retrieval sets."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from metaembed_pl.data.beir import is_retrieval_set, read_retrieval_set
from metaembed_pl.data.collate import Instructions
from metaembed_pl.data.plan import PlannedSource
from metaembed_pl.data.recipe_tables import RecipeTable
from metaembed_pl.data.remote import is_remote
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError

log = logging.getLogger(__name__)

Questions = int | Literal["all"]
"""Queries that come with a candidate at once."""


@dataclass
class DataSource:
    """What training and evaluation sources have in common.

    Args:
        path: a folder of shards, or its address, such as `s3://bucket/pets`; or a table: a file
            (Parquet, JSON Lines, CSV), a folder, an address, ORG/NAME on the hub, or `preset:NAME`.
            The first `fit` makes shards of a table.
        name: name in logs and metrics; None: the name in the folder's manifest.
        instruction: placed before the text of each query.
        candidate_instruction: placed before the text of each candidate.
        columns: for a table: its columns by key, such as `{query: question, positive: answer}`.
        files: for a table: pattern of its files, such as `data/train-*`.
        held_out: for a table: share of its candidates to evaluate on and not to train on, the same
            wherever the recipe names the table; 0: all are used for both.
    """

    path: str
    name: str | None = None
    _: KW_ONLY
    instruction: str | None = None
    candidate_instruction: str | None = None
    columns: dict[str, str] | None = None
    files: str = "*"
    held_out: float = 0.0

    split: ClassVar[str]

    @property
    def table(self) -> RecipeTable | None:
        """The table that it names; None: a folder."""
        return RecipeTable.of(self.path, self.columns, self.files, self.held_out)

    @property
    def folder(self) -> str:
        """Where its shards or its retrieval set are."""
        return self.path if self.table is None else str(self.table.shards(self.split))

    @property
    def instructions(self) -> Instructions:
        """The instructions of both sides."""
        return Instructions(self.instruction, self.candidate_instruction)


@dataclass
class TrainSource(DataSource):
    """A folder of shards, or a table, to train on.

    Args:
        weight: share of the batches relative to the other sources; None for all: by size.
        num_negatives: hard negatives per query; None: `data.num_negatives`.
        questions: queries per candidate in a batch, at most; the candidate is encoded once. `all`:
            every query it has. None: `data.questions`.
        first_step: step at which the source joins the mixture.
        last_step: step at which the source leaves the mixture; None: never.
        max_pairs: use a random sample of this many pairs; None: all.
    """

    weight: float | None = None
    num_negatives: int | None = None
    questions: Questions | None = None
    first_step: int = 0
    last_step: int | None = None
    max_pairs: int | None = None

    split: ClassVar[str] = "train"

    def planned(self, shards: ShardedPairs, questions: Questions = 1) -> PlannedSource:
        """The source for the plan, with so many questions unless it sets its own number."""
        questions = questions if self.questions is None else self.questions
        found = PlannedSource(
            self.name or shards.name,
            tuple(shards.shard_sizes),
            self.weight,
            self.first_step,
            self.last_step,
            self.max_pairs,
            questions=None if questions == "all" else questions,
        )
        if questions == 1:
            return found
        candidates = shards.candidate_numbers()
        if candidates.max() + 1 == len(candidates):
            log.info(
                "%s: each of its candidates has only one question, so `questions` has no effect",
                found.name,
            )
        return replace(found, candidates=candidates)


@dataclass
class EvalSource(DataSource):
    """A folder of shards, a retrieval set (see beir.py) or a table to evaluate on.

    The queries of shards search the pool of their positives; those of a retrieval set its entire
    corpus, or where it has `candidates/` each its own list.

    Args:
        max_queries: use only the first queries, this many; None: all.
        max_candidates: candidates that a query searches, at most, the right ones included; None:
            all.
        where: only queries with these metadata, such as `{language: english}`; for retrieval sets.
    """

    max_queries: int | None = None
    max_candidates: int | None = None
    where: dict[str, str] | None = None

    split: ClassVar[str] = "test"


def is_missing(source: DataSource) -> bool:
    """Whether a source is a folder of this machine that does not exist."""
    is_here = source.table is None and not is_remote(source.path)
    return is_here and not Path(source.path).is_dir()


def refuse_missing(key: str, sources: Sequence[DataSource]) -> None:
    """Refuses folders that do not exist.

    Args:
        key: of the recipe, such as `data.train`.
        sources: its value.

    Raises:
        UserError: names up to three of them.
    """
    missing = [source.path for source in sources if is_missing(source)]
    if missing:
        others = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise UserError(
            f"{key}: {len(missing)} of {len(sources)} folders of shards are missing: "
            f"{', '.join(missing[:3])}{others}; prepare the data first"
        )


def refuse_other_shares(train: Sequence[DataSource], evaluation: Sequence[DataSource]) -> None:
    """Refuses a table with two values of `held_out`: it would be trained on what it is tested with.

    Args:
        train: sources to train on.
        evaluation: sources to evaluate on.

    Raises:
        UserError: names the first such table.
    """
    for source in train:
        for other in evaluation:
            same = source.table and other.table == replace(source.table, held_out=other.held_out)
            if same and source.held_out != other.held_out:
                raise UserError(
                    f"data: {source.path} has held_out {source.held_out:g} to train and "
                    f"{other.held_out:g} to evaluate on, so that some candidates would be in both: "
                    "give it the same held_out everywhere"
                )


def look_at_eval_set(source: EvalSource) -> RetrievalSet | ShardedPairs:
    """What there is of an evaluation source; the pairs of shards are not read.

    Raises:
        UserError: there is neither a shard nor a retrieval set, or it is not valid.
    """
    folder = Path(source.folder)
    if not is_retrieval_set(folder):
        if source.where:
            raise UserError(
                f"{source.path}: `where` chooses queries of retrieval sets, not of shards"
            )
        return ShardedPairs(source.folder)
    found = read_retrieval_set(folder, source.name, where=source.where)
    found = found.subset(source.max_queries, source.max_candidates)
    instructed = source.instructions.with_instruction
    queries = [instructed(query, "query") for query in found.queries]
    candidates = found.candidates
    if source.candidate_instruction:  # else they stay in their file until they are needed
        candidates = [instructed(candidate, "candidate") for candidate in candidates]
    return replace(found, queries=queries, candidates=candidates)


def refuse_same_names(
    key: str, opened: Iterable[tuple[EvalSource, RetrievalSet | ShardedPairs]]
) -> None:
    """Refuses two sets of the same name: metrics and batches are identified by it.

    Args:
        key: of the recipe, such as `data.val`.
        opened: its sources, each with what `look_at_eval_set` gives for it.

    Raises:
        UserError: names the first two.
    """
    paths: dict[str, str] = {}
    for source, one in opened:
        name = source.name or one.name
        if name in paths:
            raise UserError(
                f"{key}: {paths[name]} and {source.path} are both called {name!r}, but each set "
                "needs a name of its own for its metrics: give one of them another `name`"
            )
        paths[name] = source.path


def open_eval_set(
    source: EvalSource, found: RetrievalSet | ShardedPairs | None = None
) -> RetrievalSet:
    """The queries and candidates of an evaluation source.

    Args:
        source: of the recipe.
        found: what `look_at_eval_set` gave; None: it is called now.

    Raises:
        UserError: as `look_at_eval_set`, or the pairs of shards do not fit together.
    """
    found = look_at_eval_set(source) if found is None else found
    if isinstance(found, RetrievalSet):
        return found
    pairs = map(source.instructions.on, found)
    pool = RetrievalSet.from_pairs(source.name or found.name, pairs, source.max_queries)
    return pool.subset(max_candidates=source.max_candidates)
