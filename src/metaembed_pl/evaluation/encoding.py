"""Meta embeddings of a task: candidates in a store, queries in memory.

Candidates are encoded once for all budgets, and for all tasks with the same corpus. A killed run
resumes with the next batch. Under torchrun every rank encodes its share of the candidates and of
the queries.

Q: queries    Rq: vectors of a query    D: width
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from metaembed_pl.data.beir import StoredItems
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.scoring import uids
from metaembed_pl.item import Item
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.encoder import Encoder
from metaembed_pl.model.encoding import Pace
from metaembed_pl.model.identity import identity_of
from metaembed_pl.ranks import wait_for_ranks
from metaembed_pl.retrieval.embedding import Entry, Prepare, embed
from metaembed_pl.retrieval.store import Store

OnProgress = Callable[[str, int, int], None]
"""Called with the kind of items, the number done, and their total number."""


def digest_of(items: Sequence[Item]) -> str:
    """A digest that identifies a corpus: of all its content, or of its file."""
    if isinstance(items, StoredItems):
        return hashlib.sha256(items.path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for item in items:
        digest.update(f"{item.uid} {item.instruction} {replace(item, id=None).uid}\n".encode())
    return digest.hexdigest()


def digest_of_set(task: RetrievalSet) -> str:
    """A digest that identifies a task: its corpus, its queries and its judgements."""
    parts = digest_of(task.candidates), digest_of(task.queries)
    judged = str((task.relevant, task.gains, task.lists)).encode()
    judged += str(task.itself).encode() if task.itself else b""
    return hashlib.sha256(" ".join(parts).encode() + judged).hexdigest()


def encode_candidates(
    model: Encoder,
    task: RetrievalSet,
    folder: Path,
    pace: Pace,
    dtype: str,
    on_progress: OnProgress,
) -> tuple[Store, list[str]]:
    """A store of the candidates of a task; candidates that it already contains are not encoded.

    Args:
        model: encodes the candidates.
        task: has the candidates.
        folder: of all stores of the evaluation.
        pace: how many are encoded at a time, on each rank.
        dtype: of the stored vectors.
        on_progress: called after each batch.

    Returns:
        The store, and, on rank 0, the candidates that could not be read, with the reason.
    """
    name = re.sub(r"[^\w.-]+", "_", _corpus_name(task))
    folder = folder / f"{name}-{digest_of(task.candidates)[:12]}"
    ids, skipped = uids(task.candidates), []
    if not isinstance(model, MetaEmbedder):
        return _encode_simply(model, task.candidates, ids, folder, pace, dtype, on_progress)
    store = Store.open_for(model, folder, dtype)
    read = task.candidates.__getitem__
    entries = (Entry.read(id, partial(read, i)) for i, id in enumerate(ids))
    for progress in embed(store, model, entries, pace, skip_bad=True, previews=False):
        skipped = progress.skipped
        on_progress("candidates", progress.seen, len(ids))
    wait_for_ranks()  # rank 0 writes
    return Store.open(folder), skipped


def encode_queries(
    model: Encoder, queries: Sequence[Item], pace: Pace, on_progress: OnProgress
) -> tuple[Float[Tensor, "Q Rq D"], dict[int, str]]:
    """Meta embeddings of queries.

    Returns:
        The embeddings, zeros for a query that cannot be read, and these queries with the reasons.
    """
    found = torch.zeros(len(queries), model.groups[-1].r_q, model.width)
    bad: dict[int, str] = {}
    if not isinstance(model, MetaEmbedder):
        for places, items in _readable(queries, range(len(queries)), pace, bad):
            if items:
                found[places] = model.encode_query(items)
            on_progress("queries", max(places, default=-1) + 1, len(queries))
        return found, bad
    read = queries.__getitem__
    entries = (Entry.read(str(i), partial(read, i)) for i in range(len(queries)))
    windows = pace.windows(entries, lambda entry: entry.is_text)
    process = model.processor()
    prepare = Prepare(process, "query", pace.chunk_tokens, skip_bad=True, previews=False)
    done = 0
    for window, vectors in model.encoded(windows, prepare, "query", pace.num_workers):
        found[[int(id) for id in window.about.ids]] = vectors
        bad |= {int(id): reason for id, reason in window.about.skipped}
        done += window.num_items + len(window.about.skipped)
        on_progress("queries", done, len(queries))
    return found, bad


def _encode_simply(
    model: Encoder,
    candidates: Sequence[Item],
    ids: list[str],
    folder: Path,
    pace: Pace,
    dtype: str,
    on_progress: OnProgress,
) -> tuple[Store, list[str]]:
    """A store for a model of another library: batch by batch, in this process."""
    if not folder.exists():
        Store.create(folder, model.groups, model.width, identity_of(model), dtype)
    store = Store.open(folder)
    known = set(store.ids)
    new = [place for place, id in enumerate(ids) if id not in known]
    bad: dict[int, str] = {}
    with store.writing():
        for places, items in _readable(candidates, new, pace, bad):
            if items:
                none = [None] * len(items)
                some = [ids[place] for place in places]
                store.add(some, model.encode_candidate(items), [{} for _ in some], none)
            on_progress("candidates", max(places, default=-1) + 1, len(ids))
    return store, [f"{ids[place]}: {reason}" for place, reason in bad.items()]


def _readable(
    items: Sequence[Item], places: Sequence[int], pace: Pace, bad: dict[int, str]
) -> Iterator[tuple[list[int], list[Item]]]:
    """Batches of the readable items, decoded; the reasons for the others go to `bad`."""
    for start in range(0, len(places), pace.batch_size):
        found: dict[int, Item] = {}
        for place in places[start : start + pace.batch_size]:
            try:
                item = items[place]
                found[place] = replace(item, image=item.load_image())
            except UserError as error:
                bad[place] = str(error)
        yield list(found), list(found.values())


def _corpus_name(task: RetrievalSet) -> str:
    """The name of a corpus, equal for all tasks that search it."""
    if isinstance(task.candidates, StoredItems):
        return task.candidates.path.resolve().parent.name
    return task.name
