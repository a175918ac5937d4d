"""What a recipe trains and evaluates on: shards, tables and retrieval sets."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from metaembed_pl.data.beir import is_retrieval_set, read_retrieval_set
from metaembed_pl.data.collate import (
    Instructions,
)
from metaembed_pl.data.plan import PlannedSource
from metaembed_pl.data.recipe_tables import RecipeTable
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.data.shards import ShardedPairs
from metaembed_pl.errors import UserError

log = logging.getLogger(__name__)

Questions = int | Literal["all"]
"""Queries that come with a candidate at once."""


@dataclass
class TrainSource:
    """A folder of shards to train on, or a table, of which shards are made at the first `fit`.

    Args:
        path: the folder, or its address, such as `s3://bucket/pets`; of a table a file (Parquet,
            JSON Lines, CSV), a folder, an address, ORG/NAME of the hub, or `preset:NAME`.
        name: how logs call it; None takes the folder's manifest's.
        weight: share of the batches relative to the other sources; None for all: by size.
        num_negatives: hard negatives a query; None takes the data module's.
        questions: a candidate comes with up to so many of its queries at once, and is encoded
            once; `all` for all it has. None takes the data module's.
        first_step: the source joins the mixture at this step: names before scenes, say.
        last_step: the source leaves the mixture at this step; None: it stays.
        max_pairs: use only so many of its pairs; None for all.
        instruction: the model reads it before each query's text.
        candidate_instruction: likewise before each candidate's.
        columns: of a table: which column is what, such as `{query: question, positive: answer}`.
        files: of a table: pattern of its files, such as `data/train-*`.
        held_out: of a table: share of its candidates that only evaluation uses.
    """

    path: str
    name: str | None = None
    weight: float | None = None
    num_negatives: int | None = None
    questions: Questions | None = None
    first_step: int = 0
    last_step: int | None = None
    max_pairs: int | None = None
    instruction: str | None = None
    candidate_instruction: str | None = None
    columns: dict[str, str] | None = None
    files: str = "*"
    held_out: float = 0.0

    @property
    def table(self) -> RecipeTable | None:
        """The table it names; None: shards."""
        return RecipeTable.of(self.path, self.columns, self.files, self.held_out)

    @property
    def folder(self) -> str:
        """Its shards."""
        return self.path if self.table is None else str(self.table.shards("train"))

    def planned(self, shards: ShardedPairs, questions: Questions = 1) -> PlannedSource:
        """The source as the plan sees it, with so many questions where it does not say."""
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

    @property
    def instructions(self) -> Instructions:
        """Of both sides."""
        return Instructions(self.instruction, self.candidate_instruction)


@dataclass
class EvalSource:
    """What to evaluate on: a folder of shards, or a retrieval set as beir.py describes it.

    The queries of shards search the pool of their positives; those of a retrieval set its whole
    corpus, or where it has `candidates/` each its own list.

    Args:
        path: the folder; or a table, as in training.
        name: the DATASET of metric names; None takes the folder's manifest's.
        max_queries: only the first so many; None for all.
        max_candidates: a query searches no more than so many, its right ones included; None: all.
        where: only queries with these metadata, such as `{language: english}`; of retrieval sets.
        instruction: as in training.
        candidate_instruction: likewise.
        columns: of a table, as in training.
        files: likewise.
        held_out: the share that training leaves out, which is evaluated on; 0: everything.
    """

    path: str
    name: str | None = None
    max_queries: int | None = None
    max_candidates: int | None = None
    where: dict[str, str] | None = None
    instruction: str | None = None
    candidate_instruction: str | None = None
    columns: dict[str, str] | None = None
    files: str = "*"
    held_out: float = 0.0

    @property
    def table(self) -> RecipeTable | None:
        """The table it names; None: a folder."""
        return RecipeTable.of(self.path, self.columns, self.files, self.held_out)

    @property
    def folder(self) -> str:
        """Its shards or retrieval set."""
        return self.path if self.table is None else str(self.table.shards("test"))

    @property
    def instructions(self) -> Instructions:
        """Of both sides."""
        return Instructions(self.instruction, self.candidate_instruction)


def open_eval_set(source: EvalSource) -> RetrievalSet:
    """The queries and candidates of an evaluation source.

    Raises:
        UserError: there is neither a shard nor a retrieval set, or it is not valid.
    """
    if is_retrieval_set(Path(source.folder)):
        found = read_retrieval_set(Path(source.folder), source.name, where=source.where)
        found = found.subset(source.max_queries, source.max_candidates)
        instructed = source.instructions.with_instruction
        queries = [instructed(query, "query") for query in found.queries]
        candidates = (
            found.candidates
        )  # in their file until they are needed, unless all get an instruction
        if source.candidate_instruction:
            candidates = [instructed(candidate, "candidate") for candidate in candidates]
        return replace(found, queries=queries, candidates=candidates)
    if source.where:
        raise UserError(f"{source.path}: `where` chooses queries of retrieval sets, not of shards")
    shards = ShardedPairs(source.folder)
    pairs = map(source.instructions.on, shards)
    pool = RetrievalSet.from_pairs(source.name or shards.name, pairs, source.max_queries)
    return pool.subset(max_candidates=source.max_candidates)
