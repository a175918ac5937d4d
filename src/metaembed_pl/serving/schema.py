"""The JSON schemas of the API, as in `/openapi.json`.

A *plan* is what a search spends: a budget (`4x8`) or the stages of a cascade
(`poolx8:200,8x16:10`).
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Shape(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True, extra="forbid", allow_inf_nan=False)


class SearchPlan(_Shape):
    """A plan, and its cost per query on this store."""

    plan: str
    """As the parameter of a search."""
    cost: float
    """Multiplications, as a share of those of the exact search."""
    bytes_read: int
    """Bytes of vectors."""
    recall: float | None
    """Share of the exact search's ten best that it finds; null: not measured."""
    milliseconds: float | None
    """On the measured items; null: not measured."""


class Measurement(_Shape):
    """The state of measuring a store's plans."""

    state: Literal["none", "running", "done", "failed"]
    """For the current state of the store."""
    used: str | None = None
    """The queries and items that were used, in words."""
    error: str | None = None
    """The reason for a failure."""


class StoreInfo(_Shape):
    """The store that is served."""

    name: str
    """Name of its folder."""
    items: int
    """Number of items."""
    generation: int
    """Counts the changes of the store."""
    groups: list[str]
    """The nested groups of its model, smallest first."""
    width: int
    """Components of a stored vector."""
    model_width: int
    """Components of the model's vectors; more than stored if the store has a projection."""
    dtype: str
    """Dtype of the stored components."""
    vector_bytes: int
    """Bytes of a stored vector."""
    plans: list[SearchPlan]
    """Plans to choose from, cheapest first."""
    default_plan: str
    """The plan of a search that names none."""
    measurement: Measurement
    """The measurement of recall and milliseconds."""
    examples: list[str]
    """A few texts of its items, as example queries."""
    max_upload_bytes: int
    """Size limit of a picture."""
    max_text: int
    """Length limit of a text, in characters."""


class Question(_Shape):
    """An encoded query; its vectors are remembered for a while."""

    query: str
    """Its id, for searches and explanations; the same for the same text and picture."""
    text: str | None
    """Text of the query."""
    has_picture: bool
    """Whether a picture is part of it."""
    milliseconds: float
    """Time of encoding; 0 if the query was remembered."""


class Result(_Shape):
    """A result of a search."""

    id: str
    """Of the item."""
    score: float
    """Higher is better; divided by r_q if `normalised`."""
    text: str | None
    """Of the item."""
    has_preview: bool
    """Whether `/api/preview` has a small picture of it."""
    metadata: dict[str, Any]
    """Metadata in the store, with the names of files, not their paths."""


class Answer(_Shape):
    """The results of a search."""

    plan: str
    """The plan of the search; every stage keeps at least `top` items."""
    note: str
    """The reason for an automatic plan: its measured recall, or why the search was exact."""
    budget: str
    """Budget of the last stage, and of the scores."""
    results: list[Result]
    """Best first."""
    milliseconds: float
    """Time of the search, without encoding."""
    bytes_read: int
    """Bytes of vectors."""
    items: int
    """Items in the store."""
    generation: int
    """Generation of the store."""


class Maps(_Shape):
    """Attention maps of the candidate vectors on the picture."""

    height: int
    """Patches of the picture from top to bottom."""
    width: int
    """Patches of the picture from left to right."""
    weights: list[list[float]]
    """For each vector, row by row: attention to a patch, as a multiple of the mean."""
    drawn_from: Literal["picture", "preview"]
    """The picture that the model saw: the original, or the store's preview."""
    agreement: float
    """Lowest cosine of a new vector with the stored one: 1 if nothing differs."""


class Explanation(_Shape):
    """Why an item has its score."""

    item: Result
    """The item; its score is not divided by r_q."""
    budget: str
    """r_q x r_c, and x components unless all are used."""
    products: list[list[float]]
    """Dot products of each query vector with each candidate vector."""
    winners: list[int]
    """By query vector, the candidate vector with the largest product; these sum to the score."""
    maps: Maps | None
    """Null if there are none."""
    why_no_maps: str | None
    """The reason, in a sentence."""


class Problem(_Shape):
    """An error."""

    error: str
    """One sentence."""
