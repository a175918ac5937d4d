"""A search as one request: each stage of a cascade rescores the results of the previous one.

Q: queries    Rq: their vectors    D: width
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from jaxtyping import Float
from torch import Tensor

from metaembed_pl.errors import UserError
from metaembed_pl.retrieval.cascade import Stage
from metaembed_pl.retrieval.qdrant.layout import Layout, name_of
from metaembed_pl.retrieval.qdrant.packages import models
from metaembed_pl.retrieval.where import Condition, spelled

OVERSAMPLING = 2.0
LARGEST_INTEGER = 2**63
EXACT_INTEGERS = 2**53
"""Up to this size, integers are exact as floating-point numbers, which Qdrant compares."""
RANGES = {"<": "lt", "<=": "lte", ">": "gt", ">=": "gte"}
PLAIN_KEY = re.compile(r"[A-Za-z0-9_-]+")
DATE = re.compile(r"\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d+)?)?(Z|[+-]\d\d:\d\d)?)?")


def search_request(
    layout: Layout,
    query: Float[Tensor, "Rq D"],
    stages: Sequence[Stage],
    conditions: Sequence[Condition] = (),
    exact: bool = False,
) -> models.QueryRequest:
    """The request for one query.

    Args:
        layout: of the collection.
        query: all vectors of the query.
        stages: first to last.
        conditions: on the metadata of items.
        exact: score every item in the first stage, without the index and the coarser copy.
    """
    *before, last = stages
    prefetch = None
    for number, stage in enumerate(before):
        prefetch = models.Prefetch(
            prefetch=prefetch,
            **_scored_at(layout, query, stage, exact and not number),
            filter=None if number else filter_of(conditions),
        )
    return models.QueryRequest(
        prefetch=prefetch,
        **_scored_at(layout, query, last, exact and not before),
        filter=None if before else filter_of(conditions),
        with_payload=["id", "metadata"],
    )


def _scored_at(
    layout: Layout, query: Float[Tensor, "Rq D"], stage: Stage, exact: bool
) -> dict[str, Any]:
    """A stage's part of the request."""
    r_c = stage.budget.r_c
    vectors = stage.query_vectors(query[None])[0].float().cpu()
    # sum_i q_i . c = (sum_i q_i) . c, where there is one c
    value = vectors.sum(dim=0) if r_c == 1 else vectors
    coarse = None
    if layout.quantization and r_c == layout.counts[0]:
        # The coarser copy selects twice as many items, which are rescored with full vectors.
        coarse = models.QuantizationSearchParams(
            ignore=exact, rescore=True, oversampling=OVERSAMPLING
        )
    params = models.SearchParams(exact=exact, quantization=coarse) if exact or coarse else None
    return {
        "query": value.tolist(),
        "using": name_of(r_c),
        "limit": stage.keep,
        "params": params,
    }


def filter_of(conditions: Sequence[Condition]) -> models.Filter | None:
    """Conditions on metadata as Qdrant's filter.

    Raises:
        UserError: Qdrant does not support a condition.
    """
    if not conditions:
        return None
    must: list[Any] = []
    must_not: list[Any] = []
    for condition in conditions:
        key = payload_key(condition.key)
        if condition.comparison == "=":
            must.append(models.Filter(should=[*_equals(key, condition.text)]))
        elif condition.comparison == "!=":
            must_not += _equals(key, condition.text)
            must_not.append(models.IsEmptyCondition(is_empty=models.PayloadField(key=key)))
        else:
            must.append(_compared(key, condition))
    return models.Filter(must=must or None, must_not=must_not or None)


def payload_key(key: str) -> str:
    """The key of a point's payload for a metadata key.

    Raises:
        UserError: the key has a quotation mark.

    >>> payload_key("lang"), payload_key("page.number")
    ('metadata.lang', 'metadata."page.number"')
    """
    if '"' in key:
        raise UserError(f"Qdrant cannot filter by the key {key!r}: it has a quotation mark")
    return f"metadata.{key}" if PLAIN_KEY.fullmatch(key) else f'metadata."{key}"'


def _equals(key: str, text: str) -> list[models.FieldCondition]:
    """Conditions of which one holds if the value equals the text, as text, number or boolean."""
    value = _number(text)
    matches = [models.FieldCondition(key=key, match=models.MatchValue(value=text))]
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) > EXACT_INTEGERS):
        matches.append(models.FieldCondition(key=key, match=models.MatchValue(value=value)))
    elif value is not None:
        # A range finds 3 and 3.0 alike.
        same = models.Range(gte=value, lte=value)
        matches.append(models.FieldCondition(key=key, range=same))
    return matches


def _compared(key: str, condition: Condition) -> models.FieldCondition:
    name, value = RANGES[condition.comparison], _number(condition.text)
    if value is not None and not isinstance(value, bool):
        return models.FieldCondition(key=key, range=models.Range(**{name: value}))
    if DATE.fullmatch(condition.text):
        return models.FieldCondition(
            key=key, range=models.DatetimeRange.model_validate({name: condition.text})
        )
    raise UserError(
        f"{condition.key}{condition.comparison}{condition.text}: Qdrant orders numbers and dates "
        "such as 2026-11-25, not other texts; use = or !="
    )


def _number(text: str) -> float | int | bool | None:
    """A text as a number or boolean, if it is one."""
    value = spelled(text)
    if isinstance(value, int):  # a bool is one
        return value if abs(value) < LARGEST_INTEGER else None
    return value if isinstance(value, float) and math.isfinite(value) else None
