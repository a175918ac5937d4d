"""A contact sheet of pairs: each query, what answers it, and what only looks like it."""

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.figure import Figure

from metaembed_pl.evaluation.canvas import MUTED, RIGHT
from metaembed_pl.evaluation.sheet import CELL, GAP, draw_item, draw_query, frame, new_sheet, write
from metaembed_pl.item import Item

MARGIN, QUERY_WIDTH = 0.3, 2.4
TOP, ROW = 0.95, CELL + 0.35


class Shown(NamedTuple):
    """A candidate on the sheet, with a note below it."""

    item: Item
    is_right: bool
    note: str = ""


def draw_pairs(
    title: str, explanation: str, rows: Sequence[tuple[Item, Sequence[Shown]]]
) -> Figure:
    """A row for each query, with its candidates beside it.

    Args:
        title: the heading.
        explanation: a line below it.
        rows: queries with their candidates; all pictures must decode.
    """
    most = max(len(candidates) for _, candidates in rows)
    width = max(2 * MARGIN + QUERY_WIDTH + most * (CELL + GAP), 6.5)
    figure, sheet = new_sheet(width, TOP + len(rows) * ROW + MARGIN / 2)
    write(sheet, MARGIN, 0.32, title, fontsize=16, fontweight="bold")
    write(sheet, MARGIN, 0.64, explanation, color=MUTED)
    for i, (query, candidates) in enumerate(rows):
        y = TOP + i * ROW
        draw_query(sheet, MARGIN, y, QUERY_WIDTH - 0.2, query)
        for k, candidate in enumerate(candidates):
            x = MARGIN + QUERY_WIDTH + k * (CELL + GAP)
            draw_item(sheet, x, y, candidate.item)
            frame(sheet, x, y, candidate.is_right)
            colour = RIGHT if candidate.is_right else MUTED
            middle = x + CELL / 2
            write(
                sheet,
                middle,
                y + CELL + 0.13,
                candidate.note,
                ha="center",
                color=colour,
                fontsize=9,
            )
    return figure
