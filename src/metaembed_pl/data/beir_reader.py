"""Read a retrieval set from disk; beir.py describes the layout."""

import json
import logging
import math
import unicodedata
from array import array
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.files import read_json_object, read_lines
from metaembed_pl.item import Item, as_id, json_lines

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
    strict: bool = False,
) -> RetrievalSet:
    """Read a retrieval set. Its pictures stay in their files until they are asked for.

    A score above 0 makes a candidate right, and is its gain. Of judgements that stand twice the
    highest counts. Queries without a right candidate are left out and counted, as in pytrec_eval.
    Judgements of a candidate that the corpus lacks are counted and reported; nobody finds it, as in
    BEIR and mteb. A query that stands in the corpus under its own id, with its own text, does not
    search itself there, nor does any of a set whose manifest has `"ignore_identical_ids": true`.

    Args:
        folder: in the layout above; a plain BEIR download is one.
        name: how metrics call it; None takes the manifest's, or else the folder's.
        split: of `qrels` and `candidates`.
        where: keep only queries with these values in their metadata, such as a language.
        strict: refuse judgements and lists that name what is not there.

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
    unknown = _Unknown(strict)
    places = _places(queries.ids), _places(candidates.ids)
    gains = _read_judgements(folder, split, *places, unknown)
    lists = _read_lists(folder, split, *places, unknown)
    unknown.warn()
    wanted = [i for i in range(len(queries)) if not where or _matches(queries.record(i), where)]
    if not wanted:
        raise UserError(f"{queries.path}: none of {len(queries)} queries has {where}")
    asked = [query for query in wanted if query in gains]
    manifest = _read_manifest(folder)
    name = name or str(manifest.get("name") or folder.resolve().name)
    if not any(index >= 0 for query in asked for index in gains[query]):
        raise UserError(
            f"{name}: not one of {len(wanted)} queries has a candidate with a score above 0 in "
            f"qrels/{split}.tsv"
        )
    num_left_out = len(wanted) - len(asked)
    if num_left_out:
        log.info("%s: %d queries have no right candidate and are excluded", name, num_left_out)
    if lists is not None:
        _check_lists(
            folder, split, queries.ids, candidates.ids, {q: gains[q] for q in asked}, lists
        )
    itself = _itself(name, queries, candidates, asked, places[1], manifest)
    for query, same in zip(asked, itself or (), strict=False):
        if same in gains[query]:  # right, and not to be found
            gains[query][min([0, *gains[query]]) - 1] = gains[query].pop(same)
    return RetrievalSet(
        name,
        [queries[query] for query in asked],
        candidates,
        [sorted(gains[query]) for query in asked],
        [[gains[query][index] for index in sorted(gains[query])] for query in asked],
        None if lists is None else [lists[query] for query in asked],
        num_left_out,
        itself,
    )


def _itself(
    name: str,
    queries: StoredItems,
    candidates: StoredItems,
    asked: list[int],
    places: Mapping[str, int],
    manifest: Mapping[str, Any],
) -> list[int] | None:
    """For each query the candidate that it is itself, or -1."""
    wanted = manifest.get("ignore_identical_ids")
    if wanted is False:
        return None
    found, others = [], 0
    for query in asked:
        same = places.get(queries.ids[query], -1)
        if same >= 0 and not wanted:
            said = [side.record(i) for side, i in ((queries, query), (candidates, same))]
            if any(said[0].get(key) != said[1].get(key) for key in ("text", "image")):
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
    """For each query that has any, its right candidates and their gains; below 0: not there."""
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
    """For each query its own candidates, each once; None where all search the entire pool."""
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
        missing = {index for index in right if index >= 0} - set(lists[query])
        if missing:
            raise UserError(
                f"{path}: the list of query {id!r} does not contain "
                f"{candidate_ids[min(missing)]!r}, a right answer in qrels/{split}.tsv"
            )


def _places(ids: Sequence[str]) -> dict[str, int]:
    """The place of each id; also by its composed form, where that is another."""
    composed = {_composed(id): i for i, id in enumerate(ids) if not id.isascii()}
    return composed | {id: i for i, id in enumerate(ids)}


def _composed(id: str) -> str:
    return unicodedata.normalize("NFC", id)


class _Unknown:
    """Ids that judgements and lists name and no file has; each gets a number below 0.

    Args:
        strict: refuse the first one.
    """

    def __init__(self, strict: bool):
        self._strict = strict
        self._found: dict[tuple[str, str], tuple[int, str]] = {}

    def place(self, places: Mapping[str, int], id: str, file: str, where: str) -> int:
        """Where an id stands among those of a file."""
        index = places.get(id, places.get(_composed(id)))
        if index is not None:
            return index
        if self._strict:
            raise UserError(f"{where}: {file} has no _id {id!r}")
        return self._found.setdefault((file, id), (-1 - len(self._found), where))[0]

    def warn(self) -> None:
        """Say how many there were."""
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


def _matches(record: Mapping[str, Any], where: Mapping[str, str]) -> bool:
    return all(record.get(key) == value for key, value in where.items())


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    return read_json_object(path) if path.exists() else {}


def _read_records(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The number, the first byte and the content of each line that is not blank."""
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
