"""How many vectors each side spends: the groups of training and the budget of search.

r_q: vectors of a query    r_c: vectors of a candidate

A model trained on nested groups serves any trained count on either side, so a search may pair a
long query with a short index:

    >>> groups = parse_groups(["1x1", "2x4", "4x8"])
    >>> str(check_budget("4x1", groups))
    '4x1'
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from metaembed_pl.errors import UserError


class Budget(NamedTuple):
    """The first `r_q` vectors of a query against the first `r_c` of a candidate."""

    r_q: int
    r_c: int

    def __str__(self) -> str:
        return f"{self.r_q}x{self.r_c}"

    @classmethod
    def parse(cls, value: "str | Budget | Iterable[int]") -> "Budget":
        """Read what a user writes: "4x8", [4, 8] or a Budget.

        Raises:
            UserError: not two integers of at least 1.
        """
        if isinstance(value, str):
            match = re.fullmatch(r"\s*([0-9]+)\s*[xX]\s*([0-9]+)\s*", value)
            counts = [int(count) for count in match.groups()] if match else []
        else:
            counts = list(value) if isinstance(value, Iterable) else []
        # bool is an int in Python, and YAML reads `yes` as one.
        whole = all(isinstance(count, int) and not isinstance(count, bool) for count in counts)
        if len(counts) != 2 or not whole or min(counts) < 1:
            raise UserError(
                f"a budget is two integers of at least 1, r_q and r_c, written 4x8; got {value!r}"
            )
        return cls(*counts)


PAPER_GROUPS = (Budget(1, 1), Budget(2, 4), Budget(4, 8), Budget(8, 16), Budget(16, 64))


def parse_groups(values: Iterable[str | Budget | Iterable[int]]) -> tuple[Budget, ...]:
    """Read the groups of a model, smallest first.

    Raises:
        UserError: none given, or one is not nested in the next: a group contains all vectors of the
            group before it and at least one more on either side.
    """
    if isinstance(values, str):
        raise UserError(f'groups are a list such as ["1x1", "2x4"]; got the text {values!r}')
    groups = tuple(Budget.parse(value) for value in values)
    if not groups:
        raise UserError("no groups given: expected at least one, such as 1x1")
    for smaller, larger in itertools.pairwise(groups):
        if larger.r_q < smaller.r_q or larger.r_c < smaller.r_c or larger == smaller:
            raise UserError(
                f"groups must be nested, smallest first: {smaller} is not contained in {larger}; "
                "order them so that neither count shrinks and at least one grows"
            )
    return groups


def split_width(budget: Any, widths: Iterable[int]) -> tuple[Any, int | None]:
    """A budget without the width that may stand behind it, as in "4x8x64", and that width.

    Raises:
        UserError: the model was not trained at this width; names the trained ones.

    >>> split_width("4x8x64", [64, 32]), split_width("4x8", [])
    (('4x8', 64), ('4x8', None))
    """
    match = re.fullmatch(r"\s*(\d+\s*[xX]\s*\d+)\s*[xX]\s*(\d+)\s*", str(budget))
    if match is None:
        return budget, None
    width, trained = int(match[2]), list(widths)
    if width not in trained:
        choices = f"choose one of {', '.join(map(str, trained))}" if trained else "leave it out"
        raise UserError(f"budget {budget}: the model was not trained at width {width}; {choices}")
    return match[1], width


def check_budget(budget: str | Budget | Iterable[int], groups: Iterable[Budget]) -> Budget:
    """The budget, if a model trained on `groups` can serve it.

    Each count must be one the model was trained at; the two may come from different groups.

    Raises:
        UserError: a count that was never trained; names the trained ones.
    """
    budget, groups = Budget.parse(budget), tuple(groups)
    for side, count, trained in (
        ("query", budget.r_q, sorted({group.r_q for group in groups})),
        ("candidate", budget.r_c, sorted({group.r_c for group in groups})),
    ):
        if count not in trained:
            counts = ", ".join(map(str, trained))
            raise UserError(
                f"budget {budget}: the model was not trained at {count} {side} vectors; "
                f"choose one of {counts}"
            )
    return budget
