"""Filters on a store's items, without parsing every item's JSON for every query.

The values of a key are read from the metadata once, into two Arrow columns, texts and numbers,
since items of a store may have different metadata. Arrow evaluates the conditions, and the result
is cached until the store changes.

N: items
"""

# pyright: reportAttributeAccessIssue=false
# (Arrow defines its functions at import.)

import io
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj
import torch
from jaxtyping import Bool

from metaembed_pl.retrieval.snapshot import Matching, Snapshot
from metaembed_pl.retrieval.where import Condition, parse_where, spelled

CACHED_FILTERS = 32
"""Each takes a bit per item and, once used with an index, a bit per vector."""
EXACT_INTEGERS = 2**53
_COMPARE = {
    "=": pc.equal,
    "!=": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}


@dataclass(frozen=True)
class Column:
    """The values of items under a key, by place.

    Args:
        texts: null for items whose value is not a text.
        numbers: null for items whose value is not a number; booleans are numbers, as in Python.
        others: other values, and those that Arrow cannot hold exactly.
    """

    texts: pa.ChunkedArray | pa.Array
    numbers: pa.ChunkedArray | pa.Array
    others: dict[int, Any]

    def holds(self, condition: Condition) -> Bool[np.ndarray, " N"]:
        """The items for which a condition holds."""
        compare = _COMPARE[condition.comparison]
        found = _mask(compare(self.texts, pa.scalar(condition.text, pa.large_string())))
        number = spelled(condition.text)
        if _is_number(number):
            found |= _mask(compare(self.numbers, pa.scalar(float(number))))
        elif isinstance(number, int):  # not exact as float64: Python compares
            values = self.numbers.to_pylist()
            found |= np.array([condition.holds({condition.key: value}) for value in values])
        elif condition.comparison == "!=":
            found |= _mask(pc.is_valid(self.numbers))  # a number differs from every text
        for place, value in self.others.items():
            found[place] = condition.holds({condition.key: value})
        return found


class Filters:
    """Filters on one generation of a store."""

    def __init__(self, snapshot: Snapshot):
        self._snapshot = snapshot
        self._columns: dict[str, Column] = {}
        self._cache: OrderedDict[tuple[Condition, ...], Matching] = OrderedDict()

    def matching(self, where: str | Sequence[str]) -> Matching:
        """The items for which all conditions hold.

        Raises:
            UserError: not conditions.
        """
        conditions = tuple(parse_where(where))
        if not conditions:
            return self._snapshot.every
        found = self._cache.get(conditions)
        if found is None:
            holds = np.ones(len(self._snapshot.table), dtype=bool)
            for condition in conditions:
                holds &= self._column(condition.key).holds(condition)
            places = self._snapshot.places
            found = Matching(places[torch.from_numpy(holds[places.numpy()])], len(holds))
            self._cache[conditions] = found
            while len(self._cache) > CACHED_FILTERS:
                self._cache.popitem(last=False)
        return found

    def _column(self, key: str) -> Column:
        if key not in self._columns:
            self._columns[key] = column_of(self._snapshot.checked("metadata"), key)
        return self._columns[key]


def column_of(metadata: pa.ChunkedArray, key: str) -> Column:
    """The values of a key, from JSON objects.

    Arrow's JSON reader is used if all values are texts or all are numbers, Python's otherwise.
    """
    nothing = partial(pa.nulls, len(metadata))
    for type_ in (pa.large_string(), pa.float64()):
        values = _read_by_arrow(metadata, key, type_)
        if values is None:
            continue
        if type_ == pa.large_string():
            return Column(values, nothing(pa.float64()), {})
        largest = pc.max(pc.abs(values)).as_py()
        if largest is None or largest < EXACT_INTEGERS:
            return Column(nothing(pa.large_string()), values, {})
    return _read_by_python(metadata, key)


def _read_by_arrow(
    metadata: pa.ChunkedArray, key: str, type_: pa.DataType
) -> pa.ChunkedArray | None:
    """The values of a key, if all have this type."""
    if not len(metadata):
        return None
    lines = io.BytesIO("\n".join(metadata.to_pylist()).encode())
    options = pj.ParseOptions(
        explicit_schema=pa.schema([(key, type_)]), unexpected_field_behavior="ignore"
    )
    try:
        found = pj.read_json(lines, parse_options=options)[key]
    except (pa.ArrowException, KeyError):
        return None
    return found if len(found) == len(metadata) else None


def _read_by_python(metadata: pa.ChunkedArray, key: str) -> Column:
    texts: list[str | None] = []
    numbers: list[float | None] = []
    others: dict[int, Any] = {}
    for place, text in enumerate(metadata.to_pylist()):
        value = spelled(text).get(key)
        is_text, is_number = _is_text(value), _is_number(value)
        texts.append(value if is_text else None)
        numbers.append(float(value) if is_number else None)
        if value is not None and not is_text and not is_number:
            others[place] = value
    return Column(pa.array(texts, pa.large_string()), pa.array(numbers, pa.float64()), others)


def _is_text(value: Any) -> bool:
    """Whether Arrow can hold it: a lone surrogate is not valid Unicode."""
    return isinstance(value, str) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _is_number(value: Any) -> bool:
    """Whether float64 is exact."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < EXACT_INTEGERS)


def _mask(holds: pa.ChunkedArray | pa.Array) -> Bool[np.ndarray, " N"]:
    return pc.fill_null(holds, False).to_numpy(zero_copy_only=False).copy()
