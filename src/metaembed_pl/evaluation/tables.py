"""An outcome as tables: text for a terminal, Markdown and HTML for reports, one content for all."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metaembed_pl.evaluation.benchmarks import OVERALL, Reference
from metaembed_pl.evaluation.outcome import Outcome
from metaembed_pl.evaluation.statistics import Comparison, Interval


@dataclass(frozen=True)
class Table:
    """Rows under a head.

    Args:
        head: of the columns; the first is a name, those behind it are numbers.
        rows: as many cells each.
        strong: rows to set apart.
    """

    head: list[str]
    rows: list[list[str]]
    strong: frozenset[int] = frozenset()

    def text(self) -> str:
        """Aligned, for a terminal or a pipe."""
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in (self.head, *self.rows)
        )

    def markdown(self) -> str:
        """As Markdown has tables."""
        rows = [
            [f"**{cell}**" if i in self.strong and cell else cell for cell in row]
            for i, row in enumerate(self.rows)
        ]
        lines = [
            [cell.replace("|", "\\|") for cell in self.head],
            ["---", *["---:"] * (len(self.head) - 1)],
            *[[cell.replace("|", "\\|") for cell in row] for row in rows],
        ]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)

    def html(self) -> str:
        """As HTML has tables; whatever a name holds is text."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.head)
        rows = "".join(
            f"<tr{' class=strong' if i in self.strong else ''}>"
            + "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
            + "</tr>"
            for i, row in enumerate(self.rows)
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"


def overview(outcome: Outcome) -> str:
    """What the command line prints."""
    return f"{outcome.title}\n\n{task_table(outcome).text()}"


def task_table(outcome: Outcome) -> Table:
    """Every task and every mean at every budget; intervals at the largest."""
    largest = outcome.budgets[-1]
    head = ["task", "metric", "queries", "candidates", *outcome.budgets, f"95 % at {largest}"]
    rows = []
    for task in outcome.tasks:
        found = Outcome("", "", outcome.budgets, {}, [task]).mean(OVERALL, largest)
        scores = [f"{task.score(budget):.3f}" for budget in outcome.budgets]
        sizes = f"{len(task.queries):,}", f"{task.num_candidates:,}"
        rows.append([task.name, task.metric, *sizes, *scores, _between(found)])
    strong = []
    if len(outcome.tasks) > 1:
        for label in outcome.labels:
            strong.append(len(rows))
            tasks = outcome.labelled(label)
            means = [outcome.mean(label, budget) for budget in outcome.budgets]
            scores = [f"{found.mean:.3f}" for found in means]
            metrics = ", ".join(dict.fromkeys(task.metric for task in tasks))
            sizes = f"{sum(len(task.queries) for task in tasks):,}", f"{len(tasks)} tasks"
            rows.append([label, metrics, *sizes, *scores, _between(means[-1])])
    return Table(head, rows, frozenset(strong))


def reference_table(outcome: Outcome, references: Sequence[Reference]) -> Table:
    """This model's means beside what others scored, in points of 100, best first.

    The overall mean, and those that any of the others is known by.
    """
    known = set().union(*(reference.tasks for reference in references))
    labels = [OVERALL, *(label for label in outcome.labels[:-1] if label in known)]
    rows = [
        (["this model", budget], [100 * outcome.mean(label, budget).mean for label in labels])
        for budget in outcome.budgets
    ]
    num_ours = len(rows)
    rows += [
        (
            [reference.model, reference.budget],
            [reference.score, *(reference.tasks.get(label) for label in labels[1:])],
        )
        for reference in references
        if reference.score is not None
    ]
    order = sorted(range(len(rows)), key=lambda i: -(rows[i][1][0] or 0))
    return Table(
        ["model", "budget", *labels],
        [
            [*names, *("" if score is None else f"{score:.1f}" for score in scores)]
            for names, scores in (rows[i] for i in order)
        ],
        frozenset(place for place, i in enumerate(order) if i < num_ours),
    )


def comparison(found: Comparison, tasks: Mapping[str, Comparison], names: Sequence[str]) -> str:
    """Two evaluations in words and numbers."""
    table = Table(
        ["task", "A", "B", "B - A", "95 %", "p", "better", "worse", "queries"],
        [
            _compared(name, of_task)
            for name, of_task in (*tasks.items(), (OVERALL, found))
            if name == OVERALL or len(tasks) > 1
        ],
    )
    said = found.verdict().replace("the second", "B")
    return (
        f"A: {names[0]}\nB: {names[1]}\n\n{table.text()}\n\n{said} "
        f"(difference {found.difference.mean:+.4f}, p = {found.p_value:.3f})"
    )


def _compared(name: str, found: Comparison) -> list[str]:
    return [
        name,
        f"{found.first:.4f}",
        f"{found.second:.4f}",
        f"{found.difference.mean:+.4f}",
        f"{found.difference.low:+.4f} to {found.difference.high:+.4f}",
        f"{found.p_value:.3f}",
        f"{found.num_better:,}",
        f"{found.num_worse:,}",
        f"{found.num_queries:,}",
    ]


def _between(found: Interval) -> str:
    return f"{found.low:.3f} to {found.high:.3f}"
