"""Shared style of the report's pictures: colours, fonts, saving."""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib.style
from matplotlib.figure import Figure

from metaembed_pl.files import new_file

# Distinct for colour-blind people, and all dark enough for letters on white (Okabe and
# Ito's blue, vermillion and green, Tol's purple, a dark yellow, grey).
LINES = ("#0072B2", "#D55E00", "#009E73", "#AA3377", "#8C6D00", "#555555")
RIGHT, INK, MUTED, FAINT = "#009E73", "#222222", "#767676", "#E3E3E3"

_STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "savefig.dpi": 150,
}


@contextmanager
def report_style() -> Iterator[None]:
    """While open, figures are drawn in the report's style, whatever the user's settings are."""
    with matplotlib.style.context(["default", _STYLE]), warnings.catch_warnings():
        # Names come in scripts that the font lacks: boxes are drawn, and that is all.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def save_picture(figure: Figure, path: Path) -> None:
    """Save a figure as PNG, atomically."""
    with new_file(path) as temporary:
        figure.savefig(temporary, format="png")


def spread(positions: Sequence[float], gap: float, highest: float = math.inf) -> list[float]:
    """Move labels apart until neighbours are `gap` from each other, each as little as may be.

    >>> spread([1.0, 5.0, 5.0], gap=1.0)
    [1.0, 5.5, 4.5]
    >>> spread([5.0, 5.0], gap=1.0, highest=5.0)
    [5.0, 4.0]
    """
    order = sorted(range(len(positions)), key=lambda i: (positions[i], -i))
    # Labels that touch become a block, centred over what it labels; blocks that touch become one.
    blocks: list[tuple[float, int]] = []
    for place, i in enumerate(order):
        num_above = len(order) - 1 - place
        centre, count = min(positions[i], highest - num_above * gap), 1
        while blocks and blocks[-1][0] + (blocks[-1][1] + count) * gap / 2 > centre:
            before, num_before = blocks.pop()
            centre = (before * num_before + centre * count) / (num_before + count)
            count += num_before
        blocks.append((centre, count))
    placed = [c + (k - (n - 1) / 2) * gap for c, n in blocks for k in range(n)]
    return [place for _, place in sorted(zip(order, placed, strict=True))]
