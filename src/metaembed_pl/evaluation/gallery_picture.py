"""A sample of queries with their first candidates, at the smallest and the largest budget."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.display import shortened
from metaembed_pl.evaluation.canvas import FAINT, MUTED, RIGHT
from metaembed_pl.evaluation.outcome import Outcome, TaskOutcome
from metaembed_pl.evaluation.sheet import (
    CELL,
    GAP,
    MARGIN,
    Shown,
    draw_query,
    draw_row,
    new_sheet,
    write,
)

NUM_QUERIES, MOST_TASKS = 4, 8
QUERY_WIDTH, RANK_WIDTH = 2.15, 0.55
TOP, HEADING, ROW = 0.85, 0.8, CELL + 0.35


class Strip(NamedTuple):
    """How many candidates are shown at a budget."""

    budget: str
    num_candidates: int

    @property
    def width(self) -> float:
        """In inches, with the rank behind it."""
        return self.num_candidates * (CELL + GAP) + RANK_WIDTH


def draw_gallery(outcome: Outcome, pools: Sequence[RetrievalSet]) -> Figure:
    """Some queries of each task with their first candidates.

    The queries are a fixed sample in which right and wrong ones are as frequent as in the task, so
    that the picture flatters nobody. Of more than eight tasks the first eight are shown.

    Args:
        outcome: its hits are drawn.
        pools: the queries and candidates of each task.
    """
    first, last = outcome.budgets[0], outcome.budgets[-1]
    strips = [Strip(first, 3), Strip(last, 5)] if first != last else [Strip(last, 5)]
    tasks = [
        (task, pool, _sample(task, strips))
        for task, pool in list(zip(outcome.tasks, pools, strict=True))[:MOST_TASKS]
    ]
    width = 1.5 * MARGIN + QUERY_WIDTH + sum(strip.width for strip in strips)
    height = TOP + sum(HEADING + ROW * len(sample) for *_, sample in tasks) + MARGIN / 2
    said = "A green frame marks a right candidate. The sample has the accuracy of the dataset."
    figure, sheet = new_sheet(width, height, "Queries and their first candidates", said)
    y = TOP
    for task, pool, sample in tasks:
        _draw_heading(sheet, y, task, strips)
        y += HEADING
        for query in sample:
            _draw_query(sheet, y, task, pool, query, strips)
            y += ROW
    return figure


def _sample(task: TaskOutcome, strips: Sequence[Strip]) -> list[int]:
    """Queries evenly spread over all, ordered by whether each budget finds a right one first."""
    found = [task.values[f"precision@1/{strip.budget}"] for strip in reversed(strips)]
    order = sorted(range(len(task.queries)), key=lambda query: [-values[query] for values in found])
    count = min(NUM_QUERIES, len(order))
    return [order[(2 * k + 1) * len(order) // (2 * count)] for k in range(count)]


def _draw_heading(sheet: Axes, y: float, task: TaskOutcome, strips: Sequence[Strip]) -> None:
    right_edge = sheet.get_xlim()[1] - MARGIN
    bold: dict[str, Any] = {"fontsize": 14, "fontweight": "bold"}
    sheet.plot([MARGIN, right_edge], [y, y], color=FAINT, linewidth=1)
    write(sheet, MARGIN, y + 0.27, shortened(task.name, 18), **bold)
    write(sheet, MARGIN, y + 0.54, f"{task.num_candidates:,} candidates", color=MUTED)
    x = MARGIN + QUERY_WIDTH
    for strip in strips:
        score = f"{task.metric} {task.score(strip.budget):.2f}"
        write(sheet, x, y + 0.27, strip.budget, **bold)
        write(sheet, x, y + 0.54, score, color=MUTED)
        x += strip.width
        write(sheet, _rank_x(x), y + 0.54, "rank", color=MUTED, ha="center")


def _draw_query(
    sheet: Axes,
    y: float,
    task: TaskOutcome,
    pool: RetrievalSet,
    query: int,
    strips: Sequence[Strip],
) -> None:
    draw_query(sheet, MARGIN, y, QUERY_WIDTH - 0.2, pool.queries[query])
    x = MARGIN + QUERY_WIDTH
    for strip in strips:
        draw_row(sheet, x, y, hits_shown(task, pool, query, strip.budget, strip.num_candidates))
        x += strip.width
        rank = task.rank(query, strip.budget)
        style: dict[str, Any] = {"color": RIGHT if rank == 1 else MUTED, "fontsize": 14}
        said = f"{rank:,.0f}" if rank < math.inf else "none"
        write(sheet, _rank_x(x), y + CELL / 2, said, ha="center", fontweight="bold", **style)


def hits_shown(
    task: TaskOutcome, pool: RetrievalSet, query: int, budget: str, count: int
) -> list[Shown]:
    """The first candidates of a query at a budget, with their scores."""
    right = pool.gains_of(query)
    return [
        Shown(pool.candidates[candidate], candidate in right, f"{score:.2f}")
        for candidate, score in task.hits[budget][query][:count]
    ]


def _rank_x(strip_end: float) -> float:
    return strip_end - (RANK_WIDTH + GAP) / 2
