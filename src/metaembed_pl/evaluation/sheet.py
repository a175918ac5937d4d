"""A sheet on which reports draw queries and candidates: in inches, from its upper left corner."""

import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

from metaembed_pl.display import plain, shortened
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.canvas import FAINT, INK, MUTED, RIGHT
from metaembed_pl.item import Item

CELL, GAP = 1.0, 0.12
"""Side of the square that an item is drawn in, and the gap to the next."""
MARGIN = 0.3
PIXELS_AN_INCH = 150


class Shown(NamedTuple):
    """A candidate on the sheet, with a note below it."""

    item: Item
    is_right: bool
    note: str = ""


def new_sheet(width: float, height: float, title: str, explanation: str) -> tuple[Figure, Axes]:
    """A sheet with its heading, and the figure it fills."""
    figure = Figure(figsize=(width, height))
    sheet = figure.add_axes((0, 0, 1, 1))
    sheet.set_xlim(0, width)
    sheet.set_ylim(height, 0)
    sheet.set_autoscale_on(False)
    sheet.axis("off")
    write(sheet, MARGIN, 0.32, title, fontsize=18, fontweight="bold")
    write(sheet, MARGIN, 0.64, explanation, color=MUTED)
    return figure, sheet


def draw_row(sheet: Axes, x: float, y: float, shown: Sequence[Shown]) -> None:
    """Draw candidates side by side; those that are right have a green frame and a tick."""
    for candidate in shown:
        draw_item(sheet, x, y, candidate.item)
        frame(sheet, x, y, candidate.is_right)
        colour = RIGHT if candidate.is_right else MUTED
        style: dict[str, Any] = {"ha": "center", "color": colour, "fontsize": 9}
        write(sheet, x + CELL / 2, y + CELL + 0.13, candidate.note, **style)
        x += CELL + GAP


def draw_query(sheet: Axes, x: float, y: float, width: float, item: Item) -> None:
    """Draw an item beside a row of others: its picture as large as they are, its text in large."""
    size = 12.5
    if item.image is not None:
        draw_picture(sheet, x, y, CELL, item)
        x, width, size = x + CELL + GAP, width - CELL - GAP, 11
    if item.text is not None:
        write_fitted(sheet, x, y + CELL / 2, (width, CELL), item.text, size, ha="left")


def draw_item(sheet: Axes, x: float, y: float, item: Item) -> None:
    """Draw an item in a cell: picture, text, or the one above the other."""
    middle, box = x + CELL / 2, (CELL - 0.1, CELL - 0.1)
    if item.text is None:
        draw_picture(sheet, x, y, CELL, item)
    elif item.image is None:
        sheet.add_patch(Rectangle((x, y), CELL, CELL, color="#F5F5F5", linewidth=0))
        write_fitted(sheet, middle, y + CELL / 2, box, item.text, 10, ha="center")
    else:
        draw_picture(sheet, x + CELL / 8, y, CELL * 3 / 4, item)
        box = (box[0], CELL / 4)
        write_fitted(sheet, middle, y + CELL * 7 / 8, box, item.text, 8, ha="center")


def draw_picture(sheet: Axes, x: float, y: float, side: float, item: Item) -> None:
    """Draw the item's picture as large as it fits, in the middle of a square."""
    try:
        picture = item.load_image()
    except UserError:  # the report names it among those that cannot be read
        write(sheet, x + side / 2, y + side / 2, "unreadable", ha="center", color=MUTED)
        return
    assert picture is not None
    scale = side / max(picture.size)
    w, h = picture.width * scale, picture.height * scale
    pixels = [max(1, round(length * PIXELS_AN_INCH)) for length in (w, h)]
    picture = picture.resize((pixels[0], pixels[1]), Image.Resampling.LANCZOS)
    left, top = x + (side - w) / 2, y + (side - h) / 2
    sheet.imshow(
        np.asarray(picture), extent=(left, left + w, top + h, top), aspect="auto", zorder=2
    )


def frame(sheet: Axes, x: float, y: float, is_right: bool) -> None:
    """Frame a cell; with a tick, if what it holds is right."""
    shape = "round,pad=0.02,rounding_size=0.05"
    colour, width = (RIGHT, 2.5) if is_right else (FAINT, 0.8)
    frame = FancyBboxPatch((x, y), CELL, CELL, shape, fill=False, ec=colour, lw=width, zorder=3)
    sheet.add_patch(frame)
    if is_right:
        tick: dict[str, Any] = {"color": "white", "fontsize": 9, "fontweight": "bold", "zorder": 5}
        sheet.plot(x + CELL, y, marker="o", markersize=13, color=RIGHT, zorder=4)
        write(sheet, x + CELL, y, "✓", ha="center", **tick)


def write(sheet: Axes, x: float, y: float, text: str, **style: Any) -> None:
    """Write a line of text, its middle at the height `y`."""
    # Without parse_math a name with two dollar signs would be read as a formula.
    style = {"va": "center", "color": INK, "zorder": 3, **style}
    sheet.text(x, y, text, parse_math=False, **style)


def write_fitted(
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
    write(sheet, x, y, "\n".join(lines), linespacing=1.2, fontsize=fontsize, **style)
