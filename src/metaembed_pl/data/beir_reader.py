"""Reading a retrieval set from disk; the layout stands in beir.py."""

import json
import logging
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.item import Item

log = logging.getLogger(__name__)

CORPUS, QUERIES, MANIFEST = "corpus.jsonl", "queries.jsonl", "manifest.json"
HEADER = ("query-id", "corpus-id", "score")


class StoredItems(Sequence[Item]):
    """The items of a `corpus.jsonl` or `queries.jsonl`, by number.

    Every line is read and checked once; then only ids and places stay in memory, so that a million
    pages with their text take some 100 MB, and an instance is cheap to send to workers.

    Args:
        path: the file; image paths start at its folder and may not leave it.

    Raises:
        UserError: a missing file, or a line that holds no item; names file and line.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.ids: list[str] = []
        self._starts = array("q")
        lines: dict[str, int] = {}
        for number, start, record in _read_json_lines(self.path):
            try:
                item = _item_of(record, self.path.parent)
                if lines.setdefault(item.uid, number) != number:
                    raise UserError(f"_id {item.uid!r} was used before, in line {lines[item.uid]}")
            except UserError as error:
                raise UserError(f"{self.path}:{number}: {error}") from error
            self.ids.append(item.uid)
            self._starts.append(start)
        if not self.ids:
            raise UserError(f"{self.path} is empty: expected one JSON object a line")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> Item:
        return _item_of(self.record(i), self.path.parent)

    def record(self, i: int) -> dict[str, Any]:
        """All that the line of item `i` says."""
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
) -> RetrievalSet:
    """Read a retrieval set. Its pictures stay in their files until they are asked for.

    A score above 0 makes a candidate right, and is its gain. Of judgements that stand twice the
    highest counts. Queries without a right candidate are left out and counted, as in pytrec_eval.

    Args:
        folder: in the layout above; a plain BEIR download is one.
        name: how metrics call it; None takes the manifest's, or else the folder's.
        split: of `qrels` and `candidates`.
        where: keep only queries with these values in their metadata, such as a language.

    Raises:
        UserError: a file missing, a line that is not valid, ids that do not match, a candidate list
            without the positive; names the file, and the line or the id.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(
            f"no folder {folder}: expected a retrieval set, with {CORPUS}, {QUERIES} and qrels/"
        )
    candidates, queries = StoredItems(folder / CORPUS), StoredItems(folder / QUERIES)
    places = [{id: i for i, id in enumerate(side.ids)} for side in (queries, candidates)]
    gains = _read_judgements(folder, split, *places)
    lists = _read_lists(folder, split, *places)
    wanted = [i for i in range(len(queries)) if not where or _matches(queries.record(i), where)]
    if not wanted:
        raise UserError(f"{queries.path}: none of {len(queries)} queries has {where}")
    asked = [query for query in wanted if query in gains]
    name = name or str(_read_manifest(folder).get("name") or folder.resolve().name)
    if not asked:
        raise UserError(
            f"{name}: not one of {len(wanted)} queries has a candidate with a score above 0 in "
            f"qrels/{split}.tsv"
        )
    num_left_out = len(wanted) - len(asked)
    if num_left_out:
        log.info("%s: %d queries have no right candidate and are left out", name, num_left_out)
    if lists is not None:
        _check_lists(
            folder, split, queries.ids, candidates.ids, {q: gains[q] for q in asked}, lists
        )
    return RetrievalSet(
        name,
        [queries[query] for query in asked],
        candidates,
        [sorted(gains[query]) for query in asked],
        [[gains[query][index] for index in sorted(gains[query])] for query in asked],
        None if lists is None else [lists[query] for query in asked],
        num_left_out,
    )


def _item_of(record: dict[str, Any], folder: Path) -> Item:
    id: Any = record.get("_id")
    if type(id) is int:
        id = str(id)  # as the judgements, being text, will name it
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
    folder: Path, split: str, queries: Mapping[str, int], candidates: Mapping[str, int]
) -> dict[int, dict[int, float]]:
    """For each query that has any, its right candidates and their gains."""
    path = folder / "qrels" / f"{split}.tsv"
    gains: dict[int, dict[int, float]] = {}
    for number, line in _read_lines(path):
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
        query = _place(queries, fields[0], QUERIES, f"{path}:{number}")
        candidate = _place(candidates, fields[1], CORPUS, f"{path}:{number}")
        if score > 0:
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
    folder: Path, split: str, queries: Mapping[str, int], candidates: Mapping[str, int]
) -> dict[int, list[int]] | None:
    """For each query its own candidates, each once; None where all search the whole pool."""
    path = folder / "candidates" / f"{split}.jsonl"
    if not path.exists():
        return None
    lists: dict[int, list[int]] = {}
    for number, _, record in _read_json_lines(path):
        where, ids = f"{path}:{number}", record.get("corpus-ids")
        if "query-id" not in record or not isinstance(ids, list):
            raise UserError(f'{where}: expected {{"query-id": "...", "corpus-ids": ["...", ...]}}')
        query = _place(queries, str(record["query-id"]), QUERIES, where)
        if query in lists:
            raise UserError(f"{where}: query {record['query-id']!r} has a list already")
        lists[query] = list(dict.fromkeys(_place(candidates, str(id), CORPUS, where) for id in ids))
    return lists


def _check_lists(
    folder: Path,
    split: str,
    query_ids: Sequence[str],
    candidate_ids: Sequence[str],
    gains: Mapping[int, Mapping[int, float]],
    lists: Mapping[int, list[int]],
) -> None:
    path = folder / "candidates" / f"{split}.jsonl"
    for query, right in gains.items():
        id = query_ids[query]
        if query not in lists:
            raise UserError(f"{path} has no list for query {id!r}: every query needs one")
        missing = set(right) - set(lists[query])
        if missing:
            raise UserError(
                f"{path}: the list of query {id!r} does not hold {candidate_ids[min(missing)]!r}, "
                f"which qrels/{split}.tsv says is right"
            )


def _place(places: Mapping[str, int], id: str, file: str, where: str) -> int:
    if id not in places:
        raise UserError(f"{where}: {file} has no _id {id!r}")
    return places[id]


def _matches(record: Mapping[str, Any], where: Mapping[str, str]) -> bool:
    return all(record.get(key) == value for key, value in where.items())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.exists():
        return {}
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(manifest).__name__}")
    return manifest


def _read_json_lines(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The number, the first byte and the content of each line that is not blank."""
    start = 0
    for number, line in _read_lines(path):
        if line.strip():
            try:
                record = json.loads(line.removeprefix("\ufeff"))  # from editors on Windows
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not a line of JSON: {error}") from error
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise UserError(f"{path}:{number}: expected a JSON object, got a {kind}")
            yield number, start, record
        start += len(line.encode())


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """The number and the text of each line."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode()
                except UnicodeDecodeError as error:
                    raise UserError(f"{path}:{number}: not UTF-8: {error}") from error
    except FileNotFoundError as error:
        there = sorted(file.name for file in path.parent.glob("*")) if path.parent.exists() else []
        raise UserError(
            f"{path} is missing: a retrieval set needs {CORPUS}, {QUERIES} and qrels/SPLIT.tsv"
            + (f"; there are {', '.join(there[:8])}" if there else "")
        ) from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
