"""A contact sheet of pairs: each query with its positive and its hard negatives."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from metaembed_pl.evaluation.sheet import (
    CELL,
    GAP,
    MARGIN,
    Shown,
    draw_query,
    draw_row,
    new_sheet,
)
from metaembed_pl.item import Item

QUERY_WIDTH, TOP, ROW = 2.4, 0.95, CELL + 0.35


def draw_pairs(
    title: str, explanation: str, rows: Sequence[tuple[Item, Sequence[Shown]]]
) -> Figure:
    """A row for each query, with its candidates beside it.

    Args:
        title: the heading.
        explanation: a line below it.
        rows: queries with their candidates.
    """
    most = max(len(candidates) for _, candidates in rows)
    width = max(2 * MARGIN + QUERY_WIDTH + most * (CELL + GAP), 6.5)
    height = TOP + len(rows) * ROW + MARGIN / 2
    figure, sheet = new_sheet(width, height, title, explanation)
    for i, (query, candidates) in enumerate(rows):
        y = TOP + i * ROW
        draw_query(sheet, MARGIN, y, QUERY_WIDTH - 0.2, query)
        draw_row(sheet, MARGIN + QUERY_WIDTH, y, candidates)
    return figure
