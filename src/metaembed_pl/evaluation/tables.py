"""An outcome as tables and sentences, for the report's templates and for the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from metaembed_pl.budget import Budget
from metaembed_pl.evaluation.benchmarks import OVERALL, Reference
from metaembed_pl.evaluation.costs import Cost, format_bytes, format_ms
from metaembed_pl.evaluation.diversity import mean_cosine
from metaembed_pl.evaluation.outcome import Outcome
from metaembed_pl.evaluation.statistics import Comparison, Interval
from metaembed_pl.ranking import METRICS


@dataclass(frozen=True)
class Table:
    """Rows under a head.

    Args:
        head: of the columns; the first is a name, the others are numbers.
        rows: each with as many cells.
        strong: rows to emphasise.
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


def overview(outcome: Outcome) -> str:
    """The table that the command line prints."""
    return f"{outcome.title}\n\n{task_table(outcome).text()}"


def task_table(outcome: Outcome) -> Table:
    """Every task and every mean at every budget; intervals at the largest."""
    largest = outcome.budgets[-1]
    head = ["task", "metric", "queries", "candidates", *outcome.budgets, f"95 % at {largest}"]
    rows = []
    for number, task in enumerate(outcome.tasks):
        found = outcome.of_task(number, largest)
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


def metric_table(outcome: Outcome) -> Table:
    """Every metric of every task, at the largest budget."""
    budget = outcome.budgets[-1]
    rows = [
        [task.name, *(f"{task.score(budget, metric):.3f}" for metric in METRICS)]
        for task in outcome.tasks
    ]
    return Table(["task", *METRICS], rows)


def reference_table(outcome: Outcome, references: Sequence[Reference]) -> Table:
    """This model's means beside published scores, in points of 100, best first.

    The columns are the overall mean, and those that any of the others has.
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


def warnings_of(outcome: Outcome) -> list[str]:
    """Warnings to read before any number."""
    said = []
    for task in outcome.tasks:
        if task.deviation:
            said.append(f"{task.name} is not the published set: {task.deviation}.")
        for what, bad in (("candidates", task.bad_candidates), ("queries", task.bad_queries)):
            if bad:
                said.append(
                    f"{task.name}: {len(bad)} {what} cannot be read and count as missed, such "
                    f"as {bad[0]}."
                )
        if task.num_left_out:
            said.append(
                f"{task.name}: {task.num_left_out} queries have no right candidate and are left "
                "out of every mean."
            )
    return said


def cost_table(outcome: Outcome, costs: Sequence[Cost]) -> Table:
    """The bytes and the time of each budget, with its score."""
    rows = [
        [
            budget,
            f"{outcome.mean(OVERALL, budget).mean:.3f}",
            format_bytes(cost.candidate_bytes),
            format_ms(1000 * cost.scoring_s),
        ]
        for budget, cost in zip(outcome.budgets, costs, strict=True)
    ]
    return Table(["budget", OVERALL, "bytes per candidate", "time per query"], rows)


def diversity_table(outcome: Outcome, budgets: Sequence[Budget]) -> Table:
    """How similar the vectors of a budget are; no rows if that was not measured."""
    if not any(task.diversity for task in outcome.tasks):
        return Table([], [])
    rows = []
    for budget in (budget for budget in budgets if budget.width is None):
        row = [str(budget)]
        for side, count in (("query", budget.r_q), ("candidate", budget.r_c)):
            values = [
                mean_cosine(task.diversity[side], count)
                for task in outcome.tasks
                if side in task.diversity
            ]
            known = [value for value in values if value is not None]
            row.append(f"{sum(known) / len(known):.3f}" if known else "")
        rows.append(row)
    return Table(["first vectors of", "queries: mean cosine", "candidates: mean cosine"], rows)


def lead(outcome: Outcome) -> str:
    """The result in one line."""
    best = outcome.mean(OVERALL, outcome.budgets[-1])
    identity = outcome.about.get("identity")
    model = f"; model {identity[:12]}" if identity else ""
    num_queries = sum(len(task.queries) for task in outcome.tasks)
    return (
        f"{best.mean:.3f} ({best.low:.3f} to {best.high:.3f}) at {outcome.budgets[-1]}; "
        f"tasks: {len(outcome.tasks)}; queries: {num_queries:,}; "
        f"{outcome.about.get('width')} dimensions per vector{model}."
    )


def comparison(found: Comparison, tasks: Mapping[str, Comparison], names: Sequence[str]) -> str:
    """Two evaluations in words and numbers."""
    rows = {**tasks, OVERALL: found} if len(tasks) > 1 else dict.fromkeys(tasks, found)
    table = Table(
        ["task", "A", "B", "B - A", "95 %", "p", "better", "worse", "queries"],
        [_compared(name, of_task) for name, of_task in rows.items()],
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
