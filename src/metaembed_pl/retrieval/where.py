"""Filters on metadata: `lang=de`, `page>=3`; several of them must all hold."""

import json
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from metaembed_pl.errors import UserError

_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_CONDITION = re.compile(r"\s*([^=<>!\s]+)\s*(!=|<=|>=|=|<|>)\s*(.*?)\s*", re.DOTALL)


@dataclass(frozen=True)
class Condition:
    """A condition on an item's metadata: key, comparison, and the value as written.

    An item without the key never matches. Numbers compare with numbers and texts with texts:
    `year=1999` finds both 1999 and "1999".
    """

    key: str
    comparison: str
    text: str

    @classmethod
    def parse(cls, text: str) -> "Condition":
        """Read a condition.

        Raises:
            UserError: it does not have this form.

        >>> Condition.parse("page >= 3")
        Condition(key='page', comparison='>=', text='3')
        """
        match = _CONDITION.fullmatch(text)
        if match is None:
            raise UserError(
                f"a filter is KEY, one of {' '.join(_COMPARE)}, and a value, such as lang=de; "
                f"got {text!r}"
            )
        return cls(*match.groups())

    def holds(self, metadata: Mapping[str, Any]) -> bool:
        """Whether it holds for an item.

        >>> Condition.parse("page>=3").holds({"page": 10}), Condition.parse("page>=3").holds({})
        (True, False)
        """
        value = metadata.get(self.key)
        if value is None:
            return False
        compare = _COMPARE[self.comparison]
        if isinstance(value, str):
            return compare(value, self.text)
        try:
            return compare(value, spelled(self.text))
        except TypeError:
            return self.comparison == "!="


def spelled(text: str) -> Any:
    """A text as a JSON value; the text itself if it is not JSON.

    >>> spelled("3"), spelled("de")
    (3, 'de')
    """
    try:
        return json.loads(text)
    except ValueError:
        return text


def parse_where(where: str | Sequence[str]) -> list[Condition]:
    """Conditions that must all hold."""
    return [Condition.parse(text) for text in ([where] if isinstance(where, str) else where)]
