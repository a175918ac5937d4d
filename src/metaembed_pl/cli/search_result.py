"""What a search gives the command line to print."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class SearchResult:
    """A result.

    Args:
        id: of the item; begins with sha256: where it has none of its own.
        score: higher is better.
        text: of the item.
        image: where its picture is, if anywhere.
        asked_as: the texts that ask for it, where they are known.
        metadata: what its store keeps of it; None: it is in no store.
    """

    id: str
    score: float
    text: str | None
    image: str | None
    asked_as: str = ""
    metadata: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """All results of a query.

    Args:
        found: best first.
        cost: what was spent, for machines.
        note: the same for people; may be empty.
    """

    found: Sequence[SearchResult]
    cost: dict[str, Any] = field(default_factory=dict)
    note: str = ""
