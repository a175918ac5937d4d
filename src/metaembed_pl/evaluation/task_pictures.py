"""Pictures of the report: scores by task, the worst queries, how similar the vectors are."""

import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.display import shortened
from metaembed_pl.evaluation.canvas import FAINT, INK, LINES, MUTED
from metaembed_pl.evaluation.gallery_picture import hits_shown
from metaembed_pl.evaluation.outcome import Outcome, unread
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

NUM_WORST, NUM_SHOWN = 6, 5
QUERY_WIDTH, TOP, ROW = 2.15, 0.95, CELL + 0.5


def draw_tasks(outcome: Outcome) -> Figure:
    """A bar per task and mean at the largest budget, a mark at the smallest, and the interval."""
    names = [task.name for task in outcome.tasks]
    found = [outcome.of_task(i, outcome.budgets[-1]) for i in range(len(names))]
    small = [task.score(outcome.budgets[0]) for task in outcome.tasks]
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


def worst_queries(outcome: Outcome) -> list[tuple[int, int]]:
    """Tasks and queries with the lowest scores at the largest budget, from every task in turn."""
    budget, by_task = outcome.budgets[-1], []
    for number, task in enumerate(outcome.tasks):
        values, bad = task.values[f"{task.metric}/{budget}"], unread(task.bad_queries)
        readable = [query for query, id in enumerate(task.queries) if id not in bad]
        order = sorted(readable, key=lambda q, t=task, v=values: (v[q], -t.rank(q, budget)))
        by_task.append([(number, query) for query in order[:NUM_WORST]])
    turns = [row for turn in range(NUM_WORST) for t in by_task for row in t[turn : turn + 1]]
    return turns[:NUM_WORST]


def draw_worst(outcome: Outcome, pools: Sequence[RetrievalSet]) -> Figure:
    """The worst queries, their right candidate, and the first hits."""
    worst, budget = worst_queries(outcome), outcome.budgets[-1]
    width = 1.5 * MARGIN + QUERY_WIDTH + (1 + NUM_SHOWN) * (CELL + GAP) + 0.5
    said = f"At {budget}: a right candidate, and the first hits with their scores."
    height = TOP + ROW * len(worst) + MARGIN
    figure, sheet = new_sheet(width, height, "The worst queries", said)
    for row, (number, query) in enumerate(worst):
        task, pool, y = outcome.tasks[number], pools[number], TOP + row * ROW
        said = f"{task.name}: {task.metric} {task.values[f'{task.metric}/{budget}'][query]:.2f}"
        if (rank := task.rank(query, budget)) < math.inf:
            said += f", first right candidate at rank {rank:,.0f}"
        write(sheet, MARGIN, y, shortened(said, 90), color=MUTED, fontsize=9)
        draw_query(sheet, MARGIN, y + 0.14, QUERY_WIDTH - 0.2, pool.queries[query])
        gains = {c: gain for c, gain in pool.gains_of(query).items() if c >= 0}
        x = MARGIN + QUERY_WIDTH
        if gains:
            best = pool.candidates[max(gains, key=gains.__getitem__)]
            draw_row(sheet, x, y + 0.14, [Shown(best, is_right=True)])
        x += CELL + GAP + 0.4
        draw_row(sheet, x, y + 0.14, hits_shown(task, pool, query, budget, NUM_SHOWN))
    return figure


def draw_diversity(outcome: Outcome) -> Figure:
    """The mean cosine between the vectors of an item, on either side, over all tasks."""
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
    figure.text(0.02, 0.93, "How similar the vectors are", fontsize=14, fontweight="bold")
    figure.text(0.02, 0.875, "mean cosine between vectors i and j of an item", color=MUTED)
    return figure
