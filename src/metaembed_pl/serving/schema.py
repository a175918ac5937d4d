"""The JSON schemas of the API, as in `/openapi.json`.

A *plan* is what a search spends: a budget (`4x8`) or the stages of a cascade
(`poolx8:200,8x16:10`).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Shape(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", allow_inf_nan=False)


class SearchPlan(_Shape):
    """A plan, and what it costs a query on this store."""

    plan: str
    """As a search takes it."""
    cost: float
    """Multiplications, as a share of those of the exact search."""
    bytes_read: int
    """Of vectors."""
    recall: float | None
    """Share of the ten best of the exact search that it finds; null: not measured."""
    milliseconds: float | None
    """On the items that were measured; null: not measured."""


class Measurement(_Shape):
    """How far the plans of a store were measured."""

    state: Literal["none", "running", "done", "failed"]
    """Of the store as it is now."""
    used: str | None = None
    """Which queries and items were measured, in words."""
    error: str | None = None
    """Why it failed."""


class StoreInfo(_Shape):
    """The store that is served."""

    name: str
    """Of its folder."""
    items: int
    """How many there are."""
    generation: int
    """Counts the changes of the store."""
    groups: list[str]
    """The nested groups of its model, smallest first."""
    width: int
    """Components of a stored vector."""
    model_width: int
    """Of the model's; more than are stored where the store has a projection."""
    dtype: str
    """Of a stored vector's components."""
    vector_bytes: int
    """Of a stored vector."""
    plans: list[SearchPlan]
    """To choose from, cheapest first."""
    default_plan: str
    """What a search that names no plan spends."""
    measurement: Measurement
    """Where the plans' recall and milliseconds come from."""
    examples: list[str]
    """A few texts of its items, to ask for."""
    max_upload_bytes: int
    """Of a picture."""
    max_text: int
    """Characters of a text."""


class Question(_Shape):
    """A query that was encoded; its vectors are kept for a while."""

    query: str
    """Its id, for searches and explanations; the same text and picture have the same."""
    text: str | None
    """Of the query."""
    has_picture: bool
    """Whether a picture is part of it."""
    milliseconds: float
    """Encoding took; 0 where it was kept."""


class Result(_Shape):
    """An item that was found."""

    id: str
    """Of the item."""
    score: float
    """Higher is better; divided by r_q where that was asked for."""
    text: str | None
    """Of the item."""
    has_preview: bool
    """Whether `/api/preview` has a small picture of it."""
    metadata: dict[str, Any]
    """What the store keeps of it; of files only the name."""


class Answer(_Shape):
    """What a search found, best first."""

    plan: str
    """What was spent; every stage keeps at least what was asked for."""
    note: str
    """Why this plan, where none was named: its measured recall, or why the search was exact."""
    budget: str
    """Of the last stage: the scores are of it."""
    results: list[Result]
    """Best first."""
    milliseconds: float
    """Of the search, without encoding."""
    bytes_read: int
    """Of vectors."""
    items: int
    """In the store."""
    generation: int
    """Of the store."""


class Maps(_Shape):
    """Where on the picture each candidate vector looks."""

    height: int
    """Patches of the picture from top to bottom."""
    width: int
    """And from left to right."""
    weights: list[list[float]]
    """By vector, row by row: attention to a patch, as a multiple of an even share."""
    drawn_from: Literal["picture", "preview"]
    """What the model was shown: the original, or the small picture in the store."""
    agreement: float
    """Least cosine of a vector made now and its like in the store: 1 if nothing differs."""


class Explanation(_Shape):
    """Why an item has its score."""

    item: Result
    """What was found; its score is not divided by r_q."""
    budget: str
    """r_q x r_c, and x components where these are not all."""
    products: list[list[float]]
    """Of each query vector with each candidate vector."""
    winners: list[int]
    """For each query vector the candidate vector of the largest product; they sum to the score."""
    maps: Maps | None
    """Null where there is none."""
    why_no_maps: str | None
    """What is missing, in a sentence."""


class Problem(_Shape):
    """What went wrong."""

    error: str
    """One sentence."""
