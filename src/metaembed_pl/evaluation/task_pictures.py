"""Pictures of a benchmark's report: scores by task, the worst queries, where vectors look."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.display import shortened
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.canvas import FAINT, INK, LINES, MUTED, RIGHT
from metaembed_pl.evaluation.outcome import Outcome, TaskOutcome
from metaembed_pl.evaluation.sheet import CELL, GAP, draw_item, draw_query, frame, new_sheet, write
from metaembed_pl.item import Item

NUM_WORST, NUM_SHOWN = 6, 5
NUM_MAPS = 4
MARGIN, QUERY_WIDTH, TOP, ROW = 0.3, 2.15, 0.95, CELL + 0.5


def draw_tasks(outcome: Outcome) -> Figure:
    """A bar a task and a mean at the largest budget, a mark at the smallest, and the interval."""
    names = [task.name for task in outcome.tasks]
    parts = [Outcome("", "", outcome.budgets, {}, [task]) for task in outcome.tasks]
    found = [part.mean("overall", outcome.budgets[-1]) for part in parts]
    small = [part.mean("overall", outcome.budgets[0]).mean for part in parts]
    if len(names) > 1:
        names += outcome.labels
        found += [outcome.mean(label, outcome.budgets[-1]) for label in outcome.labels]
        small += [outcome.mean(label, outcome.budgets[0]).mean for label in outcome.labels]
    height = 0.27 * len(names) + 1.2
    figure = Figure(figsize=(9, height))
    axes = figure.add_axes((0.27, 0.3 / height, 0.66, 1 - 1.15 / height))
    places = np.arange(len(names))
    colours = [LINES[0] if i < len(outcome.tasks) else LINES[1] for i in range(len(names))]
    axes.barh(places, [one.mean for one in found], height=0.62, color=colours, zorder=2)
    axes.hlines(
        places, [one.low for one in found], [one.high for one in found], color=INK, lw=1.2, zorder=3
    )
    if len(outcome.budgets) > 1:
        axes.plot(small, places, "o", ms=5.5, mfc="white", mec=INK, mew=1.1, zorder=4)
    for place, one in enumerate(found):
        axes.text(max(one.high, one.mean) + 0.01, place, f"{one.mean:.3f}", va="center", color=INK)
    axes.set_yticks(places, [shortened(name, 34) for name in names], parse_math=False)
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.grid(axis="x", color=FAINT, linewidth=0.8)
    axes.tick_params(length=0)
    figure.text(0.02, 1 - 0.28 / height, "Scores by task", fontsize=14, fontweight="bold")
    said = f"Bars: budget {outcome.budgets[-1]}, with its 95 % interval"
    if len(outcome.budgets) > 1:
        said += f". Circles: {outcome.budgets[0]}"
    figure.text(0.02, 1 - 0.55 / height, said, color=MUTED)
    return figure


class Worst(NamedTuple):
    """A query that was answered badly."""

    task: TaskOutcome
    pool: RetrievalSet
    query: int
    value: float


def worst_queries(outcome: Outcome, pools: Sequence[RetrievalSet]) -> list[Worst]:
    """The worst queries at the largest budget: of every task in turn, so that all are seen."""
    budget = outcome.budgets[-1]
    by_task = []
    for task, pool in zip(outcome.tasks, pools, strict=True):
        key, rank = task.values[f"{task.metric}/{budget}"], task.values[f"mrr/{budget}"]
        order = sorted(range(len(key)), key=lambda query, k=key, r=rank: (k[query], r[query]))
        bad = {line.partition(": ")[0] for line in task.bad_queries}
        by_task.append(
            [
                Worst(task, pool, query, key[query])
                for query in order[:NUM_WORST]
                if task.queries[query] not in bad
            ]
        )
    turns = [row for turn in range(NUM_WORST) for row in (t[turn : turn + 1] for t in by_task)]
    return [worst for row in turns for worst in row][:NUM_WORST]


def draw_worst(outcome: Outcome, worst: Sequence[Worst]) -> Figure:
    """Badly answered queries, what should have been found, and what was found."""
    width = 1.5 * MARGIN + QUERY_WIDTH + (1 + NUM_SHOWN) * (CELL + GAP) + 0.5
    figure, sheet = new_sheet(width, TOP + ROW * len(worst) + MARGIN)
    write(sheet, MARGIN, 0.3, "The worst queries", fontsize=18, fontweight="bold")
    said = f"At {outcome.budgets[-1]}: what is right, and what was found first, with scores."
    write(sheet, MARGIN, 0.6, said, color=MUTED)
    y = TOP
    for one in worst:
        rank = 1 / one.task.values[f"mrr/{outcome.budgets[-1]}"][one.query] if _found(one) else None
        said = f"{one.task.name}: {one.task.metric} {one.value:.2f}"
        said += f", first right one at rank {rank:.0f}" if rank else ""
        write(sheet, MARGIN, y, shortened(said, 90), color=MUTED, fontsize=9)
        _draw_worst(sheet, y + 0.14, one, outcome.budgets[-1])
        y += ROW
    return figure


def _found(one: Worst) -> bool:
    return (
        one.task.values[next(name for name in reversed(one.task.values) if "mrr" in name)][
            one.query
        ]
        > 0
    )


def _draw_worst(sheet: Axes, y: float, one: Worst, budget: str) -> None:
    draw_query(sheet, MARGIN, y, QUERY_WIDTH - 0.2, one.pool.queries[one.query])
    right = one.pool.gains_of(one.query)
    x = MARGIN + QUERY_WIDTH
    _draw_cell(sheet, x, y, one.pool.candidates[max(right, key=right.__getitem__)], True)
    x += CELL + GAP + 0.4
    for k, (candidate, score) in enumerate(one.task.hits[budget][one.query][:NUM_SHOWN]):
        left = x + k * (CELL + GAP)
        _draw_cell(sheet, left, y, one.pool.candidates[int(candidate)], int(candidate) in right)
        write(sheet, left + CELL / 2, y + CELL + 0.12, f"{score:.2f}", ha="center", fontsize=9)


def _draw_cell(sheet: Axes, x: float, y: float, item: Item, is_right: bool) -> None:
    try:
        draw_item(sheet, x, y, item)
    except UserError:  # it was told among those that cannot be read
        write(sheet, x + CELL / 2, y + CELL / 2, "unreadable", ha="center", color=MUTED)
    frame(sheet, x, y, is_right)


class Looks(NamedTuple):
    """Where the first meta embeddings of a candidate look, and how a query vector met them."""

    query: Item
    candidate: Item
    maps: np.ndarray
    matched: list[int]


def draw_maps(looks: Sequence[Looks]) -> Figure:
    """Pictures with the attention of their meta embeddings laid over them."""
    num_maps = max(len(one.maps) for one in looks)
    width = 1.5 * MARGIN + QUERY_WIDTH + (1 + num_maps) * (CELL + GAP) + 0.3
    figure, sheet = new_sheet(width, TOP + ROW * len(looks) + MARGIN / 2)
    write(sheet, MARGIN, 0.3, "Where the vectors look", fontsize=18, fontweight="bold")
    said = (
        "What a candidate's first meta embeddings attend to: violet is an even share, bright twice "
        "that. Green: matched by the query."
    )
    write(sheet, MARGIN, 0.6, said, color=MUTED, fontsize=9)
    for row, one in enumerate(looks):
        y = TOP + row * ROW
        draw_query(sheet, MARGIN, y, QUERY_WIDTH - 0.2, one.query)
        x = MARGIN + QUERY_WIDTH
        draw_item(sheet, x, y, one.candidate)
        for k, weights in enumerate(one.maps):
            left = x + (k + 1) * (CELL + GAP) + 0.15
            _draw_map(sheet, left, y, one.candidate, weights)
            said = f"vector {k + 1}"
            colour = RIGHT if k in one.matched else MUTED
            write(sheet, left + CELL / 2, y + CELL + 0.12, said, ha="center", color=colour)
    return figure


def _draw_map(sheet: Axes, x: float, y: float, item: Item, weights: np.ndarray) -> None:
    picture = item.load_image()
    assert picture is not None
    scale = CELL / max(picture.size)
    w, h = picture.width * scale, picture.height * scale
    left, top = x + (CELL - w) / 2, y + (CELL - h) / 2
    extent = (left, left + w, top + h, top)
    sheet.imshow(np.asarray(picture.convert("L")), extent=extent, cmap="gray", aspect="auto")
    # Twice and half the even share are the ends of the scale: an even map shows no pattern.
    shown = np.log2(np.maximum(weights, 1e-12) / weights.mean())
    sheet.imshow(
        shown, extent=extent, cmap="inferno", aspect="auto", alpha=0.62, vmin=-1, vmax=1, zorder=2,
        interpolation="bicubic",
    )  # fmt: skip


def draw_diversity(outcome: Outcome) -> Figure:
    """The mean cosine of each two vectors of an item, on either side, over all tasks."""
    figure = Figure(figsize=(8.4, 4.1))
    for i, (side, title) in enumerate((("query", "queries"), ("candidate", "candidates"))):
        found = [np.array(task.diversity[side]) for task in outcome.tasks if side in task.diversity]
        axes = figure.add_axes((0.06 + 0.47 * i, 0.08, 0.38, 0.72))
        count = len(found[0])
        edges = (0.5, count + 0.5, count + 0.5, 0.5)  # vectors are counted from 1
        shown = axes.imshow(np.mean(found, axis=0), vmin=0, vmax=1, cmap="viridis", extent=edges)
        ticks = sorted({1, count, *range(8, count - 3, 8)})
        axes.set_xticks(ticks)
        axes.set_yticks(ticks)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.tick_params(length=0)
        if i:
            figure.colorbar(shown, cax=figure.add_axes((0.93, 0.08, 0.015, 0.72)))
    figure.text(0.02, 0.93, "How alike the vectors are", fontsize=14, fontweight="bold")
    figure.text(0.02, 0.875, "mean cosine of vector i and vector j of an item", color=MUTED)
    return figure
