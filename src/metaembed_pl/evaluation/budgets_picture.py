"""Quality against the cost of a budget: bytes per candidate, and time."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaembed_pl.budget import Budget
from metaembed_pl.display import shortened
from metaembed_pl.evaluation.canvas import FAINT, INK, LINES, MUTED, spread
from metaembed_pl.evaluation.costs import Cost, format_bytes, format_ms

MAX_NAME = 20
LEFT, PANEL = 0.4, 3.7


class Curve(NamedTuple):
    """A line of the picture: its name, and its value at each budget."""

    name: str
    values: Sequence[float]


def draw_budgets(
    curves: Sequence[Curve],
    budgets: Sequence[Budget],
    costs: Sequence[Cost],
    metric: str,
) -> Figure:
    """One line per curve and one marker per budget, over the budget's costs.

    Budgets with a width have hollow markers, and a dashed line to the same counts at full width.

    Args:
        curves: the lines.
        budgets: smallest first.
        costs: one per budget.
        metric: name of the values.
    """
    # Inches: the ticks' labels before the first panel, the names behind each.
    room = 0.75 + 0.1 * max(len(shortened(curve.name, MAX_NAME)) for curve in curves)
    width = LEFT + 2 * (PANEL + room)
    figure = Figure(figsize=(width, 4.4))
    panels = figure.subplots(1, 2, sharey=True)
    figure.subplots_adjust(
        left=LEFT / width, right=1 - room / width, top=0.81, bottom=0.14, wspace=room / PANEL
    )
    sizes = [cost.candidate_bytes for cost in costs]
    times_ms = [1000 * cost.scoring_s for cost in costs]
    _draw_panel(panels[0], curves, budgets, sizes, [format_bytes(size) for size in sizes])
    _draw_panel(panels[1], curves, budgets, times_ms, [format_ms(time) for time in times_ms])
    panels[1].tick_params(labelleft=False)  # those of the first panel; names stand in their place
    _title(panels[0], "Quality and index size", f"{metric} against bytes per candidate, in bf16")
    _title(
        panels[1],
        "Quality and search time",
        f"{metric} against time to score 10,000 candidates",
    )
    return figure


def _draw_panel(
    axes: Axes,
    curves: Sequence[Curve],
    budgets: Sequence[Budget],
    costs: Sequence[float],
    cost_labels: Sequence[str],
) -> None:
    axes.set_xscale("log")
    # Room of a twentieth on each side, also where there is one group alone.
    low, high = min(costs), max(costs)
    margin = (high / low) ** 0.05 if high > low else 2.0
    axes.set_xlim(low / margin, high * margin)
    axes.set_ylim(0, 1)
    _clear(axes)
    full = [i for i, budget in enumerate(budgets) if budget.width is None]
    narrow = [i for i, budget in enumerate(budgets) if budget.width is not None]
    labels = [cost_labels[i] for i in full]
    _label_budgets(axes, [budgets[i] for i in full], [costs[i] for i in full], labels)
    _label_narrow(axes, [budgets[i] for i in narrow], [costs[i] for i in narrow])
    ends = [curve.values[-1] for curve in curves]
    labels = spread(ends, gap=0.075, highest=1)
    for i, (curve, label_y) in enumerate(zip(curves, labels, strict=True)):
        colour = LINES[i % len(LINES)]
        dots = {"marker": "o", "markersize": 7, "markeredgecolor": "white", "markeredgewidth": 1.2}
        line = {"color": colour, "clip_on": False, "zorder": 3, **dots}
        if narrow:
            hollow = {"markerfacecolor": "white", "markeredgecolor": colour, "markersize": 6}
            ending = [*narrow, full[-1]]
            drawn = line | hollow | {"linestyle": (0, (3, 3)), "linewidth": 1, "zorder": 2.5}
            axes.plot([costs[i] for i in ending], [curve.values[i] for i in ending], **drawn)
        values = [curve.values[i] for i in full]
        axes.plot([costs[i] for i in full], values, linewidth=2, **line)
        label = f"{curve.values[-1]:.2f}  {shortened(curve.name, MAX_NAME)}"
        _write(axes, label, (1, label_y), (8, 0), color=colour, fontweight="bold")


def _clear(axes: Axes) -> None:
    axes.spines[:].set_visible(False)
    axes.set_yticks([0, 0.2, 0.4, 0.6, 0.8, 1])
    axes.grid(axis="y", color=FAINT, linewidth=0.8)
    axes.tick_params(length=0, labelleft=True)
    axes.set_xticks([], minor=True)
    axes.set_xticks([])


def _label_budgets(
    axes: Axes, budgets: Sequence[Budget], costs: Sequence[float], cost_labels: Sequence[str]
) -> None:
    """Write each budget and its cost beneath its markers; a thin line leads up to them."""
    axes.vlines(costs, 0, 1, color=FAINT, linewidth=0.8, zorder=1)
    for x, budget, label in zip(_places(axes, costs), budgets, cost_labels, strict=True):
        _write(axes, str(budget), (x, 0), (0, -11), ha="center", fontweight="bold")
        _write(axes, label, (x, 0), (0, -26), ha="center", color=MUTED)


def _label_narrow(axes: Axes, budgets: Sequence[Budget], costs: Sequence[float]) -> None:
    """Write each budget with a width above its markers."""
    for x, budget in zip(_places(axes, costs), budgets, strict=True):
        _write(axes, str(budget), (x, 1), (0, 5), ha="center", color=MUTED, fontsize=8)


def _places(axes: Axes, costs: Sequence[float]) -> list[float]:
    """Where labels of costs stand, in fractions of the panel, apart from each other."""
    to_axes = axes.transData + axes.transAxes.inverted()
    return spread([float(to_axes.transform((cost, 0))[0]) for cost in costs], gap=0.17)


def _title(axes: Axes, title: str, subtitle: str) -> None:
    _write(axes, title, (0, 1), (0, 35), fontsize=14, fontweight="bold")
    _write(axes, subtitle, (0, 1), (0, 17), color=MUTED)


def _write(
    axes: Axes, text: str, at: tuple[float, float], points: tuple[float, float], **style: Any
) -> None:
    """Write at a place in fractions of the panel, moved by so many points."""
    # Without parse_math a name with two dollar signs would be read as a formula.
    style = {"color": INK, "va": "center", "parse_math": False, **style}
    axes.annotate(
        text, at, xycoords="axes fraction", xytext=points, textcoords="offset points", **style
    )
