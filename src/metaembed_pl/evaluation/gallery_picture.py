"""The picture of what a model finds: queries, and their first candidates at two budgets.

Everything is drawn on one sheet, in inches from its upper left corner.
"""

import heapq
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from metaembed_pl.budget import Budget
from metaembed_pl.display import plain, shortened
from metaembed_pl.evaluation.canvas import FAINT, INK, MUTED, RIGHT
from metaembed_pl.evaluation.result import DatasetResult
from metaembed_pl.item import Item

NUM_QUERIES = 4
MARGIN, CELL, GAP, QUERY_WIDTH, RANK_WIDTH = 0.3, 1.0, 0.12, 2.15, 0.55
TOP, HEADING, ROW = 0.85, 0.8, CELL + 0.35
PIXELS_AN_INCH = 150


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
    figure, sheet = _new_sheet(width, height)
    _write(sheet, MARGIN, 0.32, "What the queries find", fontsize=18, fontweight="bold")
    explanation = (
        "A green frame marks a right candidate; queries are right as often as in the whole dataset."
    )
    _write(sheet, MARGIN, 0.64, explanation, color=MUTED)
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
    _write(sheet, MARGIN, y + 0.27, shortened(result.name, 18), **bold)
    _write(sheet, MARGIN, y + 0.54, f"{len(result.candidates):,} candidates", color=MUTED)
    x = MARGIN + QUERY_WIDTH
    for strip in strips:
        recall = f"recall@1 {result.metrics[f'recall@1/{strip.budget}']:.2f}"
        _write(sheet, x, y + 0.27, str(strip.budget), **bold)
        _write(sheet, x, y + 0.54, recall, color=MUTED)
        x += strip.width
        _write(sheet, _rank_x(x), y + 0.54, "rank", color=MUTED, ha="center")


def _draw_row(sheet: Axes, y: float, query: int, strips: Sequence[Strip]) -> None:
    pool = strips[0].result.retrieval_set
    _draw_query(sheet, y, pool.queries[query])
    x = MARGIN + QUERY_WIDTH
    for strip in strips:
        for k, (candidate, score, is_right) in enumerate(strip.first(query)):
            left, colour = x + k * (CELL + GAP), RIGHT if is_right else MUTED
            _draw_item(sheet, left, y, pool.candidates[candidate])
            _frame(sheet, left, y, is_right)
            style: dict[str, Any] = {"ha": "center", "color": colour, "fontsize": 9}
            _write(sheet, left + CELL / 2, y + CELL + 0.13, f"{score:.2f}", **style)
        x += strip.width
        rank = strip.ranks[query]
        style = {"color": RIGHT if rank == 1 else MUTED, "fontsize": 14, "fontweight": "bold"}
        _write(sheet, _rank_x(x), y + CELL / 2, f"{rank:,}", ha="center", **style)


def _rank_x(strip_end: float) -> float:
    return strip_end - (RANK_WIDTH + GAP) / 2


def _draw_query(sheet: Axes, y: float, item: Item) -> None:
    x, width, size = MARGIN, QUERY_WIDTH - 0.2, 12.5
    if item.image is not None:
        _draw_picture(sheet, x, y, CELL, item)
        x, width, size = x + CELL + GAP, width - CELL - GAP, 11
    if item.text is not None:
        _write_fitted(sheet, x, y + CELL / 2, (width, CELL), item.text, size, ha="left")


def _draw_item(sheet: Axes, x: float, y: float, item: Item) -> None:
    middle, box = x + CELL / 2, (CELL - 0.1, CELL - 0.1)
    if item.text is None:
        _draw_picture(sheet, x, y, CELL, item)
    elif item.image is None:
        sheet.add_patch(Rectangle((x, y), CELL, CELL, color="#F5F5F5", linewidth=0))
        _write_fitted(sheet, middle, y + CELL / 2, box, item.text, 10, ha="center")
    else:
        _draw_picture(sheet, x + CELL / 8, y, CELL * 3 / 4, item)
        box = (box[0], CELL / 4)
        _write_fitted(sheet, middle, y + CELL * 7 / 8, box, item.text, 8, ha="center")


def _draw_picture(sheet: Axes, x: float, y: float, side: float, item: Item) -> None:
    """Draw the item's picture as large as it fits, in the middle of a square."""
    picture = item.load_image()
    assert picture is not None
    scale = side / max(picture.size)
    w, h = picture.width * scale, picture.height * scale
    pixels = [max(1, round(length * PIXELS_AN_INCH)) for length in (w, h)]
    picture = picture.resize((pixels[0], pixels[1]), Image.Resampling.LANCZOS)
    left, top = x + (side - w) / 2, y + (side - h) / 2
    sheet.imshow(
        np.asarray(picture), extent=(left, left + w, top + h, top), aspect="auto", zorder=2
    )


def _frame(sheet: Axes, x: float, y: float, is_right: bool) -> None:
    shape = "round,pad=0.02,rounding_size=0.05"
    colour, width = (RIGHT, 2.5) if is_right else (FAINT, 0.8)
    frame = FancyBboxPatch((x, y), CELL, CELL, shape, fill=False, ec=colour, lw=width, zorder=3)
    sheet.add_patch(frame)
    if is_right:
        tick: dict[str, Any] = {"color": "white", "fontsize": 9, "fontweight": "bold", "zorder": 5}
        sheet.plot(x + CELL, y, marker="o", markersize=13, color=RIGHT, zorder=4)
        _write(sheet, x + CELL, y, "✓", ha="center", **tick)


def _write(sheet: Axes, x: float, y: float, text: str, **style: Any) -> None:
    # Without parse_math a name with two dollar signs would be read as a formula.
    style = {"va": "center", "color": INK, "zorder": 3, **style}
    sheet.text(x, y, text, parse_math=False, **style)


def _write_fitted(
    sheet: Axes, x: float, y: float, box: tuple[float, float], text: str, size: float, **style: Any
) -> None:
    """Write a text in lines that fit the box, smaller where it is long; cut off where too long."""
    text = plain(text)
    for fontsize in (size, 0.85 * size, 0.72 * size):
        # A letter of DejaVu Sans is 0.58 of its size wide on average, and a point is 1/72 inch.
        num_letters = int(box[0] * 72 / (0.58 * fontsize))
        num_lines = int(box[1] * 72 / (1.25 * fontsize))
        lines = textwrap.wrap(text, num_letters)
        longest_word = max(map(len, text.replace("-", "- ").split()), default=0)
        if len(lines) <= num_lines and longest_word <= num_letters:
            break
    if len(lines) > num_lines:
        lines = [*lines[: num_lines - 1], shortened(" ".join(lines[num_lines - 1 :]), num_letters)]
    _write(sheet, x, y, "\n".join(lines), linespacing=1.2, fontsize=fontsize, **style)


def _new_sheet(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height))
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set_xlim(0, width)
    sheet.set_ylim(height, 0)
    sheet.set_autoscale_on(False)
    sheet.axis("off")
    return figure, sheet
