"""Which part of the items a process embeds; see parts.py."""

import re
from dataclasses import dataclass

from metaembed_pl.errors import UserError


@dataclass(frozen=True)
class PartOf:
    """Which part of the items.

    Args:
        number: counted from 1.
        of: how many parts there are.

    >>> PartOf.parse("2/4")
    PartOf(number=2, of=4)
    """

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> "PartOf":
        """A part such as `3/8`.

        Raises:
            UserError: it is none.
        """
        match = re.fullmatch(r"([0-9]+)/([0-9]+)", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"expected a part such as 3/8, from 1/8 to 8/8; got {text!r}")
        return cls(int(match[1]), int(match[2]))

    def has(self, position: int, total: int) -> bool:
        """Whether the window that begins at an item is in this part."""
        return min(position, total - 1) * self.of // total == self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"
