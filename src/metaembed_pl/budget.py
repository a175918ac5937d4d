"""The number of vectors per side: groups in training, budgets in search.

r_q: vectors of a query    r_c: vectors of a candidate    width: components of a vector

A model trained on nested groups works with any trained count on either side, so a search may
combine many query vectors with few candidate vectors. Trained widths work as well:

    >>> groups = parse_groups(["1x1", "2x4", "4x8"])
    >>> str(check_budget("4x1", groups))
    '4x1'
    >>> str(check_budget("4x8x64", groups, widths=[64, 32]))
    '4x8x64'
"""

import itertools
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from metaembed_pl.errors import UserError


class Budget(NamedTuple):
    """The first `r_q` vectors of a query against the first `r_c` of a candidate.

    Attributes:
        r_q: vectors of a query.
        r_c: vectors of a candidate.
        width: the first components of each vector that are used; None: all.
    """

    r_q: int
    r_c: int
    width: int | None = None

    def __str__(self) -> str:
        return "x".join(str(count) for count in self if count is not None)

    def __repr__(self) -> str:
        # Without a width unchanged: fingerprints of indexes are made from it.
        names = zip(self._fields, self, strict=True)
        return (
            f"Budget({', '.join(f'{name}={count}' for name, count in names if count is not None)})"
        )

    @classmethod
    def parse(cls, value: "str | Budget | Iterable[int]") -> "Budget":
        """Read a budget such as "4x8", "4x8x64", [4, 8] or a Budget.

        Raises:
            UserError: not two or three integers of at least 1.
        """
        counts: list[Any]
        if isinstance(value, str):
            is_valid = re.fullmatch(r"\s*\d+(\s*[xX]\s*\d+){1,2}\s*", value, re.ASCII)
            counts = [int(count) for count in re.split("[xX]", value)] if is_valid else []
        else:
            counts = [*value] if isinstance(value, Iterable) else []
            counts = counts[:2] if counts[2:] == [None] else counts
        # bool is an int in Python, and YAML reads `yes` as one.
        are_integers = all(
            isinstance(count, int) and not isinstance(count, bool) for count in counts
        )
        if len(counts) not in (2, 3) or not are_integers or min(counts) < 1:
            raise UserError(
                "a budget is two integers of at least 1, r_q and r_c, written 4x8, or three with a "
                f"width, written 4x8x64; got {value!r}"
            )
        return cls(*counts)


PAPER_GROUPS = (Budget(1, 1), Budget(2, 4), Budget(4, 8), Budget(8, 16), Budget(16, 64))


def parse_groups(values: Iterable[str | Budget | Iterable[int]]) -> tuple[Budget, ...]:
    """Read the groups of a model, smallest first.

    Raises:
        UserError: none given, one has a width, or one is not nested in the next: a group contains
            all vectors of the group before it and at least one more on either side.
    """
    if isinstance(values, str):
        raise UserError(f'groups are a list such as ["1x1", "2x4"]; got the text {values!r}')
    groups = tuple(Budget.parse(value) for value in values)
    if not groups:
        raise UserError("no groups given: expected at least one, such as 1x1")
    for group in groups:
        if group.width is not None:
            raise UserError(
                f"group {group} has a width: write {group.r_q}x{group.r_c}, and train narrower "
                f"vectors with model.loss.widths: [{group.width}]"
            )
    for smaller, larger in itertools.pairwise(groups):
        if larger.r_q < smaller.r_q or larger.r_c < smaller.r_c or larger == smaller:
            raise UserError(
                f"groups must be nested, smallest first: {smaller} is not contained in {larger}; "
                "order them so that neither count shrinks and at least one grows"
            )
    return groups


def check_budget(
    budget: str | Budget | Iterable[int], groups: Iterable[Budget], widths: Iterable[int] = ()
) -> Budget:
    """The budget, if a model trained on `groups`, and at `widths`, can serve it.

    Each count must be one the model was trained at; the two may come from different groups.

    Raises:
        UserError: a count or a width that was never trained; names the trained ones.
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
    trained = list(widths)
    if budget.width is not None and budget.width not in trained:
        choices = f"choose one of {', '.join(map(str, trained))}, or " if trained else ""
        raise UserError(
            f"budget {budget}: the model was not trained at width {budget.width}; {choices}"
            "leave the width out for full vectors"
        )
    return budget


def budgets_of(groups: Iterable[Budget], widths: Iterable[int] = ()) -> tuple[Budget, ...]:
    """The budgets in reports of a model: its groups, and the largest group at each trained width.

    Smallest first; the last one uses all vectors and components.

    >>> [str(budget) for budget in budgets_of([Budget(1, 1), Budget(4, 8)], [64, 32])]
    ['1x1', '4x8x32', '4x8x64', '4x8']
    """
    *smaller, largest = groups
    return (*smaller, *(largest._replace(width=width) for width in sorted(widths)), largest)
