"""The report of an outcome, the same for `fit`, `test` and `evaluate`.

    report.md report.html   tables and pictures; the HTML is one file with everything in it
    budgets.png             quality against bytes per candidate and against scoring time
    tasks.png               each task with its interval
    gallery.png             a sample of queries with their first candidates
    worst.png               the worst queries
    maps.png                where the first meta embeddings look, where pictures are candidates
    diversity.png           how similar an item's vectors are to each other

Everything is drawn from the outcome, which holds the values and hits of every query.
"""

import base64
import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, PackageLoader, select_autoescape
from markdown_it import MarkdownIt
from markupsafe import Markup
from matplotlib.figure import Figure

from metaembed_pl.budget import Budget
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.display import plain
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation.benchmarks import Reference
from metaembed_pl.evaluation.budgets_picture import Curve, draw_budgets
from metaembed_pl.evaluation.canvas import report_style, save_picture
from metaembed_pl.evaluation.costs import NUM_TIMED_CANDIDATES, Cost, measure_costs
from metaembed_pl.evaluation.gallery_picture import draw_gallery
from metaembed_pl.evaluation.maps_picture import draw_maps, pictures_to_map
from metaembed_pl.evaluation.outcome import Outcome
from metaembed_pl.evaluation.tables import (
    cost_table,
    diversity_table,
    lead,
    metric_table,
    reference_table,
    task_table,
    warnings_of,
)
from metaembed_pl.evaluation.task_pictures import draw_diversity, draw_tasks, draw_worst
from metaembed_pl.files import write_text
from metaembed_pl.model.embedder import MetaEmbedder

MOST_LINES = 6
NO_MAPS = (
    "Not available: the model uses cross-attention, so picture tokens are not in its input, "
    "or no right candidate is a readable picture."
)


def write_report(
    outcome: Outcome,
    pools: Sequence[RetrievalSet],
    folder: Path,
    references: Sequence[Reference] = (),
    model: MetaEmbedder | None = None,
) -> list[Path]:
    """Write the report; files of an older one are replaced, each atomically.

    Args:
        outcome: of at least one task.
        pools: the queries and candidates of each task.
        folder: made if missing.
        references: other models to compare with.
        model: for the attention maps; None: no maps.

    Returns:
        The files written.

    Raises:
        UserError: nothing was evaluated.
    """
    if not outcome.tasks:
        raise UserError("no dataset was evaluated: nothing to report")
    folder.mkdir(parents=True, exist_ok=True)
    budgets = [Budget.parse(name) for name in outcome.budgets]
    costs = measure_costs(outcome.about["width"], budgets)
    with report_style():
        pictures = _draw(outcome, pools, model, budgets, costs)
        for name, figure in pictures.items():
            save_picture(figure, folder / name)
    has_pictures = any(item.image for pool in pools for item in islice(pool.candidates, 50))
    markdown = _environment().get_template("report.md.jinja").render(
        outcome=outcome,
        pictures=pictures,
        lead=lead(outcome),
        warnings=warnings_of(outcome),
        scores=task_table(outcome),
        metrics=metric_table(outcome),
        references=reference_table(outcome, references) if references else None,
        costs=cost_table(outcome, costs),
        diversity=diversity_table(outcome, budgets),
        no_maps=NO_MAPS if model and has_pictures and "maps.png" not in pictures else "",
        num_timed=NUM_TIMED_CANDIDATES,
        num_threads=torch.get_num_threads(),
        about=json.dumps(outcome.about, indent=2),
    )  # fmt: skip
    write_text(folder / "report.md", markdown)
    write_text(folder / "report.html", _html(markdown, outcome.title, folder))
    return [folder / name for name in ("report.md", "report.html", *pictures)]


def _draw(
    outcome: Outcome,
    pools: Sequence[RetrievalSet],
    model: MetaEmbedder | None,
    budgets: Sequence[Budget],
    costs: Sequence[Cost],
) -> dict[str, Figure]:
    metrics = {task.metric for task in outcome.tasks}
    metric = metrics.pop() if len(metrics) == 1 else "score"
    pictures = {
        "budgets.png": draw_budgets(curves_of(outcome), budgets, costs, metric),
        "tasks.png": draw_tasks(outcome),
        "gallery.png": draw_gallery(outcome, pools),
        "worst.png": draw_worst(outcome, pools),
    }
    if model and (looks := pictures_to_map(outcome, pools, model)):
        pictures["maps.png"] = draw_maps(looks)
    if any(task.diversity for task in outcome.tasks):
        pictures["diversity.png"] = draw_diversity(outcome)
    return pictures


def curves_of(outcome: Outcome) -> list[Curve]:
    """Lines of the budgets picture: tasks and means, only tasks, or only means."""
    tasks = [Curve(task.name, list(map(task.score, outcome.budgets))) for task in outcome.tasks]
    if len(tasks) == 1:
        return tasks
    means = [
        Curve(label, [outcome.mean(label, budget).mean for budget in outcome.budgets])
        for label in outcome.labels
    ]
    if len(tasks) > MOST_LINES:
        return means[-MOST_LINES:]
    return [*tasks, *means] if len(tasks) + len(means) <= MOST_LINES else tasks


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("metaembed_pl", "evaluation"),
        autoescape=select_autoescape(["html.jinja"]),
        keep_trailing_newline=True,
    )
    environment.filters["escaped"] = escaped
    return environment


def escaped(text: str) -> str:
    r"""A text in which Markdown sees no markup.

    >>> print(escaped("emoji_scene <b> a|b *c*"))
    emoji_scene \<b\> a\|b \*c\*
    """
    return re.sub(r"([\\`*\[\]<>|&$]|(?<!\w)_|_(?!\w))", r"\\\1", plain(text))


def _html(markdown: str, title: str, folder: Path) -> str:
    """The page as one HTML file, with its pictures inside."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens: Any = parser.parse(markdown)
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                content = base64.b64encode((folder / child.attrs["src"]).read_bytes()).decode()
                child.attrs["src"] = f"data:image/png;base64,{content}"
    body = Markup(parser.renderer.render(tokens, parser.options, {}))
    return _environment().get_template("report.html.jinja").render(title=title, body=body)
