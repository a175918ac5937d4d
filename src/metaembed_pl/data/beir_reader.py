"""Read a retrieval set from disk; beir.py describes the layout."""

import json
import logging
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.files import read_json_object, read_lines
from metaembed_pl.item import Item, as_id, json_lines

log = logging.getLogger(__name__)

CORPUS, QUERIES, MANIFEST = "corpus.jsonl", "queries.jsonl", "manifest.json"
HEADER = ("query-id", "corpus-id", "score")
SHOWN = 8
"""Values that an error names."""


class StoredItems(Sequence[Item]):
    """The items of a `corpus.jsonl` or `queries.jsonl`, by number.

    Every line is read and checked once; then only ids and offsets stay in memory: some 100 MB for a
    million pages with their text. An instance is cheap to send to workers.

    Args:
        path: the file; image paths are relative to its folder and may not leave it.

    Raises:
        UserError: the file is missing, or a line is not a valid item; names file and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.ids: list[str] = []
        self._starts = array("q")
        lines: dict[str, int] = {}
        for number, start, record in _read_records(self.path):
            try:
                item = _item_of(record, self.path.parent)
                if lines.setdefault(item.uid, number) != number:
                    raise UserError(f"_id {item.uid!r} was used before, in line {lines[item.uid]}")
            except UserError as error:
                raise UserError(f"{self.path}:{number}: {error}") from error
            self.ids.append(item.uid)
            self._starts.append(start)
        if not self.ids:
            raise UserError(f"{self.path} is empty: expected one JSON object per line")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Item:
        return _item_of(self.record(i), self.path.parent)

    def record(self, i: int) -> dict[str, Any]:
        """The JSON of item `i`, metadata included."""
        with self.path.open("rb") as file:
            file.seek(self._starts[i])
            return json.loads(file.readline().decode("utf-8-sig"))


def is_retrieval_set(folder: Path) -> bool:
    """Whether a folder looks like a retrieval set."""
    return (folder / CORPUS).exists() or (folder / QUERIES).exists()


def read_retrieval_set(
    folder: Path,
    name: str | None = None,
    *,
    split: str = "test",
    where: Mapping[str, str] | None = None,
    strict: bool = False,
) -> RetrievalSet:
    """Read a retrieval set. Its pictures are read from their files when they are needed.

    A score above 0 makes a candidate right, and is its gain; of repeated judgements the highest
    counts. Queries without a right candidate are left out and counted, as in pytrec_eval.
    Judgements of a candidate that the corpus lacks are counted and reported; no query finds it, as
    in BEIR and mteb. A query that is also in the corpus, with the same id and text, is left out of
    its own results; with `"ignore_identical_ids": true` in the manifest the id alone decides.

    Args:
        folder: in the layout of beir.py; a plain BEIR download has it.
        name: in metrics; None takes the manifest's, or else the folder's.
        split: of `qrels` and `candidates`.
        where: keep only queries with these values in their metadata, such as a language.
        strict: refuse judgements and lists with unknown ids.

    Raises:
        UserError: a file is missing, a line is not valid, ids do not match, or a candidate list
            lacks a right candidate; names the file, and the line or the id.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: expected a retrieval set, with {CORPUS}, {QUERIES} and qrels/"
        )
    candidates, queries = StoredItems(folder / CORPUS), StoredItems(folder / QUERIES)
    unknown = _Unknown(strict)
    places = _places(queries.ids), _places(candidates.ids)
    gains = _read_judgements(folder, split, *places, unknown)
    lists = _read_lists(folder, split, *places, unknown)
    unknown.warn()
    wanted = list(range(len(queries)))
    if where:
        wanted = [i for i in wanted if _has(queries.record(i), where)]
    if where and not wanted:
        raise UserError(
            f"{queries.path}: none of {len(queries)} queries has {where}; {_there(queries, where)}"
        )
    judged = [query for query in wanted if query in gains]
    manifest = read_json_object(folder / MANIFEST) if (folder / MANIFEST).exists() else {}
    name = name or str(manifest.get("name") or folder.resolve().name)
    if not any(index >= 0 for query in judged for index in gains[query]):
        raise UserError(
            f"{name}: not one of {len(wanted)} queries has a candidate with a score above 0 in "
            f"qrels/{split}.tsv"
        )
    num_left_out = len(wanted) - len(judged)
    if num_left_out:
        log.info("%s: %d queries have no right candidate and are excluded", name, num_left_out)
    if lists is not None:
        file = folder / "candidates" / f"{split}.jsonl"
        _check_lists(file, queries.ids, candidates.ids, {q: gains[q] for q in judged}, lists)
    itself = _itself(name, queries, candidates, judged, places[1], manifest)
    for query, same in zip(judged, itself or (), strict=False):
        if same in gains[query]:  # right, and not to be found
            gains[query][min([0, *gains[query]]) - 1] = gains[query].pop(same)
    return RetrievalSet(
        name,
        [queries[query] for query in judged],
        candidates,
        [sorted(gains[query]) for query in judged],
        [[gains[query][index] for index in sorted(gains[query])] for query in judged],
        None if lists is None else [lists[query] for query in judged],
        num_left_out,
        itself,
    )


def _itself(
    name: str,
    queries: StoredItems,
    candidates: StoredItems,
    judged: list[int],
    places: Mapping[str, int],
    manifest: Mapping[str, Any],
) -> list[int] | None:
    """For each query its own place among the candidates, or -1."""
    wanted = manifest.get("ignore_identical_ids")
    if wanted is False:
        return None
    found, others = [], 0
    for query in judged:
        same = places.get(queries.ids[query], -1)
        if same >= 0 and not wanted:
            one, other = queries.record(query), candidates.record(same)
            if any(one.get(key) != other.get(key) for key in ("text", "image")):
                same, others = -1, others + 1
        found.append(same)
    count = sum(same >= 0 for same in found)
    if count:
        log.warning(
            "%s: %d queries are also in the corpus, and are excluded from their own results",
            name,
            count,
        )
    if others:
        log.warning(
            "%s: %d queries share an id with a different candidate, which stays in their "
            'results: put "ignore_identical_ids": true into manifest.json if they should not',
            name,
            others,
        )
    return found if count else None


def _item_of(record: dict[str, Any], folder: Path) -> Item:
    id: Any = as_id(record.get("_id"))  # as the judgements, being text, will name it
    if id is None:
        raise UserError(f'expected an "_id", got the keys {", ".join(record) or "none"}')
    parts = [record.get("title"), record.get("text")]
    for part in parts:
        if part is not None and not isinstance(part, str):
            raise UserError(f"title and text must be strings, not {type(part).__name__}")
    text = " ".join(part for part in parts if part).strip()
    if not text and not record.get("image"):
        # BEIR's own corpora hold empty documents. They stay in the pool as pictures that do not
        # decode: counted where they are encoded, and found by no query.
        return Item(image=b"", id=id)
    known = {name: record.get(name) for name in ("image", "instruction")}
    return Item.parse({"text": text or None, "id": id, **known}, folder)


def _read_judgements(
    folder: Path,
    split: str,
    queries: Mapping[str, int],
    candidates: Mapping[str, int],
    unknown: "_Unknown",
) -> dict[int, dict[int, float]]:
    """The right candidates of each query with their gains; unknown ids have numbers below 0."""
    path = folder / "qrels" / f"{split}.tsv"
    gains: dict[int, dict[int, float]] = {}
    _refuse_missing(path)
    for number, _, line in read_lines(path):
        fields = line.rstrip("\r\n").split("\t")
        if number == 1:
            _check_header(path, fields)
            continue
        if len(fields) != 3:
            raise UserError(
                f"{path}:{number}: expected query-id, corpus-id and score with tabs between, got "
                f"{len(fields)} columns"
            )
        score = _score(fields[2])
        if score is None:
            raise UserError(f"{path}:{number}: the score must be a number, got {fields[2]!r}")
        query = unknown.place(queries, fields[0], QUERIES, f"{path}:{number}")
        candidate = unknown.place(candidates, fields[1], CORPUS, f"{path}:{number}")
        if score > 0 and query >= 0:
            of_query = gains.setdefault(query, {})
            of_query[candidate] = max(score, of_query.get(candidate, 0))
    return gains


def _check_header(path: Path, fields: list[str]) -> None:
    # A file without a header would lose its first judgement and nobody would notice.
    if len(fields) != 3 or _score(fields[2]) is not None:
        raise UserError(
            f"{path}:1: expected the header query-id, corpus-id, score with tabs between, got "
            f"{fields}"
        )


def _score(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _read_lists(
    folder: Path,
    split: str,
    queries: Mapping[str, int],
    candidates: Mapping[str, int],
    unknown: "_Unknown",
) -> dict[int, list[int]] | None:
    """For each query its own candidates, each once; None if all search the entire pool."""
    path = folder / "candidates" / f"{split}.jsonl"
    if not path.exists():
        return None
    lists: dict[int, list[int]] = {}
    for number, _, record in _read_records(path):
        where, ids = f"{path}:{number}", record.get("corpus-ids")
        if "query-id" not in record or not isinstance(ids, list):
            raise UserError(f'{where}: expected {{"query-id": "...", "corpus-ids": ["...", ...]}}')
        query = unknown.place(queries, str(record["query-id"]), QUERIES, where)
        if query < 0:
            continue
        if query in lists:
            raise UserError(f"{where}: query {record['query-id']!r} has two lists")
        searched = dict.fromkeys(unknown.place(candidates, str(id), CORPUS, where) for id in ids)
        lists[query] = [index for index in searched if index >= 0]
    return lists


def _check_lists(
    file: Path,
    query_ids: Sequence[str],
    candidate_ids: Sequence[str],
    gains: Mapping[int, Mapping[int, float]],
    lists: Mapping[int, list[int]],
) -> None:
    for query, right in gains.items():
        id = query_ids[query]
        if query not in lists:
            raise UserError(f"{file} has no list for query {id!r}: every query needs one")
        missing = {index for index in right if index >= 0} - set(lists[query])
        if missing:
            raise UserError(
                f"{file}: the list of query {id!r} does not contain "
                f"{candidate_ids[min(missing)]!r}, a right answer in qrels/{file.stem}.tsv"
            )


def _places(ids: Sequence[str]) -> dict[str, int]:
    """The number of each id, and of its composed form if that differs."""
    composed = {normalize("NFC", id): i for i, id in enumerate(ids) if not id.isascii()}
    return composed | {id: i for i, id in enumerate(ids)}


class _Unknown:
    """Ids in judgements and lists that are in no file; each gets a number below 0.

    Args:
        strict: refuse them.
    """

    def __init__(self, strict: bool):
        self._strict = strict
        self._found: dict[tuple[str, str], tuple[int, str]] = {}

    def place(self, places: Mapping[str, int], id: str, file: str, where: str) -> int:
        """The number of an id in a file."""
        index = places.get(id, places.get(normalize("NFC", id)))
        if index is not None:
            return index
        if self._strict:
            raise UserError(f"{where}: {file} has no _id {id!r}")
        return self._found.setdefault((file, id), (-1 - len(self._found), where))[0]

    def warn(self) -> None:
        """Log how many there are."""
        for file in (QUERIES, CORPUS):
            found = [(id, where) for (of, id), (_, where) in self._found.items() if of == file]
            if found:
                log.warning(
                    "%s: %d ids are not in %s, such as %r: no search can find them",
                    found[0][1],
                    len(found),
                    file,
                    found[0][0],
                )


def _has(record: Mapping[str, Any], where: Mapping[str, str]) -> bool:
    """Whether a query has these metadata; numbers are compared as text."""
    return all(key in record and str(record[key]) == value for key, value in where.items())


def _there(queries: StoredItems, where: Mapping[str, str]) -> str:
    """The keys of the queries, or the values of the first key that none has with that value."""
    records = [queries.record(i) for i in range(len(queries))]
    keys = sorted({key for record in records for key in record})
    for key, value in where.items():
        if key not in keys:
            return f"no query has the key {key!r}, but {', '.join(keys)}"
        values = list(dict.fromkeys(str(record[key]) for record in records if key in record))
        if value not in values:
            more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
            return f"its values of {key!r} are {', '.join(values[:SHOWN])}{more}"
    return "each value occurs, but not all in one query"


def _read_records(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The number, the offset and the content of each line that is not blank."""
    _refuse_missing(path)
    for number, start, record in json_lines(path):
        if not isinstance(record, dict):
            kind = type(record).__name__
            raise UserError(f"{path}:{number}: expected a JSON object, got a {kind}")
        yield number, start, record


def _refuse_missing(path: Path) -> None:
    if not path.exists():
        there = sorted(file.name for file in path.parent.glob("*"))
        raise UserError(
            f"{path} is missing: a retrieval set needs {CORPUS}, {QUERIES} and qrels/SPLIT.tsv"
            + (f"; there are {', '.join(there[:8])}" if there else "")
        )
