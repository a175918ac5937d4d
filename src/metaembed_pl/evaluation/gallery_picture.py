"""The picture of what a model finds: queries, and their first candidates at two budgets.

Everything is drawn on one sheet, in inches from its upper left corner.
"""

import heapq
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaembed_pl.budget import Budget
from metaembed_pl.display import shortened
from metaembed_pl.evaluation.canvas import FAINT, MUTED, RIGHT
from metaembed_pl.evaluation.result import DatasetResult
from metaembed_pl.evaluation.sheet import CELL, GAP, draw_item, draw_query, frame, new_sheet, write

NUM_QUERIES = 4
MARGIN, QUERY_WIDTH, RANK_WIDTH = 0.3, 2.15, 0.55
TOP, HEADING, ROW = 0.85, 0.8, CELL + 0.35


class Strip(NamedTuple):
    """What the queries of a dataset find at one budget: the first few candidates are shown."""

    result: DatasetResult
    budget: Budget
    num_candidates: int
    ranks: list[int]

    @property
    def width(self) -> float:
        """In inches, with the rank behind it."""
        return self.num_candidates * (CELL + GAP) + RANK_WIDTH

    def first(self, query: int) -> list[tuple[int, float, bool]]:
        """What the query finds first: candidate, score, whether it is right."""
        scores = self.result.scores(self.budget, query, query + 1)[0].tolist()
        right = set(self.result.retrieval_set.relevant[query])
        # Of equal scores the wrong candidate comes first, as the metrics have it.
        order = [(-score, i in right, i) for i, score in enumerate(scores)]
        found = heapq.nsmallest(self.num_candidates, order)
        return [(i, -negated, is_right) for negated, is_right, i in found]


def draw_gallery(results: Sequence[DatasetResult], groups: Sequence[Budget]) -> Figure:
    """Some queries of each dataset with what they found at the smallest and the largest budget.

    The queries are a fixed sample in which right and wrong ones stand as in the whole dataset, so
    that the picture flatters nobody.

    Args:
        results: their pictures are decoded here.
        groups: smallest first.
    """
    shown = [(groups[0], 3), (groups[-1], 5)] if len(groups) > 1 else [(groups[0], 5)]
    datasets = []
    for result in results:
        strips = [Strip(result, *budget, result.ranks(budget[0]).tolist()) for budget in shown]
        datasets.append((strips, _sample(strips)))
    width = 1.5 * MARGIN + QUERY_WIDTH + sum(strip.width for strip in datasets[0][0])
    height = TOP + sum(HEADING + ROW * len(sample) for _, sample in datasets) + MARGIN / 2
    figure, sheet = new_sheet(width, height)
    write(sheet, MARGIN, 0.32, "What the queries find", fontsize=18, fontweight="bold")
    explanation = (
        "A green frame marks a right candidate; queries are right as often as in the whole dataset."
    )
    write(sheet, MARGIN, 0.64, explanation, color=MUTED)
    y = TOP
    for strips, sample in datasets:
        _draw_heading(sheet, y, strips)
        y += HEADING
        for query in sample:
            _draw_row(sheet, y, query, strips)
            y += ROW
    return figure


def _sample(strips: Sequence[Strip]) -> list[int]:
    """Queries evenly spread over all, ordered by whether each budget finds the right one first."""
    wrong = [[rank > 1 for rank in strip.ranks] for strip in reversed(strips)]
    order = sorted(range(len(wrong[0])), key=lambda query: [flags[query] for flags in wrong])
    count = min(NUM_QUERIES, len(order))
    return [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]


def _draw_heading(sheet: Axes, y: float, strips: Sequence[Strip]) -> None:
    result, right_edge = strips[0].result, sheet.get_xlim()[1] - MARGIN
    bold: dict[str, Any] = {"fontsize": 14, "fontweight": "bold"}
    sheet.plot([MARGIN, right_edge], [y, y], color=FAINT, linewidth=1)
    write(sheet, MARGIN, y + 0.27, shortened(result.name, 18), **bold)
    write(sheet, MARGIN, y + 0.54, f"{len(result.candidates):,} candidates", color=MUTED)
    x = MARGIN + QUERY_WIDTH
    for strip in strips:
        recall = f"recall@1 {result.metrics[f'recall@1/{strip.budget}']:.2f}"
        write(sheet, x, y + 0.27, str(strip.budget), **bold)
        write(sheet, x, y + 0.54, recall, color=MUTED)
        x += strip.width
        write(sheet, _rank_x(x), y + 0.54, "rank", color=MUTED, ha="center")


def _draw_row(sheet: Axes, y: float, query: int, strips: Sequence[Strip]) -> None:
    pool = strips[0].result.retrieval_set
    draw_query(sheet, MARGIN, y, QUERY_WIDTH - 0.2, pool.queries[query])
    x = MARGIN + QUERY_WIDTH
    for strip in strips:
        for k, (candidate, score, is_right) in enumerate(strip.first(query)):
            left, colour = x + k * (CELL + GAP), RIGHT if is_right else MUTED
            draw_item(sheet, left, y, pool.candidates[candidate])
            frame(sheet, left, y, is_right)
            style: dict[str, Any] = {"ha": "center", "color": colour, "fontsize": 9}
            write(sheet, left + CELL / 2, y + CELL + 0.13, f"{score:.2f}", **style)
        x += strip.width
        rank = strip.ranks[query]
        style = {"color": RIGHT if rank == 1 else MUTED, "fontsize": 14, "fontweight": "bold"}
        write(sheet, _rank_x(x), y + CELL / 2, f"{rank:,}", ha="center", **style)


def _rank_x(strip_end: float) -> float:
    return strip_end - (RANK_WIDTH + GAP) / 2
