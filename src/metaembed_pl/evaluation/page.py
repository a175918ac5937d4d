"""The report of a benchmark: a Markdown page, the same as one HTML file, and their pictures.

report.md report.html   tables, pictures, what the numbers depend on; the HTML has all in it
budgets.png             quality against bytes a candidate and against scoring time
tasks.png               each task with its interval
worst.png               the worst queries
maps.png                where the first meta embeddings look, where pictures are candidates
diversity.png           how alike the vectors are
"""

import base64
import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import torch
from matplotlib.figure import Figure

from metaembed_pl.budget import Budget
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.evaluation.benchmarks import OVERALL, Benchmark
from metaembed_pl.evaluation.budgets_picture import (
    Cost,
    Curve,
    draw_budgets,
    format_bytes,
    format_ms,
)
from metaembed_pl.evaluation.canvas import report_style, save_picture
from metaembed_pl.evaluation.diversity import mean_cosine
from metaembed_pl.evaluation.outcome import Outcome, TaskOutcome
from metaembed_pl.evaluation.report import NUM_TIMED_CANDIDATES, measure_costs
from metaembed_pl.evaluation.scoring import uids
from metaembed_pl.evaluation.tables import Table, reference_table, task_table
from metaembed_pl.evaluation.task_pictures import (
    NUM_MAPS,
    Looks,
    draw_diversity,
    draw_maps,
    draw_tasks,
    draw_worst,
    worst_queries,
)
from metaembed_pl.files import write_text
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.patches import patch_attention

NUM_LOOKS = 4
MOST_LINES = 6
ALT = {
    "tasks.png": "Scores by task",
    "worst.png": "The worst queries",
    "maps.png": "Where the vectors look",
}

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; max-width: 64rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.9rem; margin-bottom: 0.2rem; } h2 { margin-top: 2.4rem; font-size: 1.3rem; }
p.lead { color: #555; margin-top: 0; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.8rem; text-align: right; border-bottom: 1px solid #e3e3e3;
  white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { color: #767676; font-weight: 600; }
tr.strong td { font-weight: 600; background: #f5f8fb; }
img { max-width: 100%; height: auto; display: block; margin: 0.5rem 0; }
.warn { background: #fdf3e7; border-left: 4px solid #d55e00; padding: 0.5rem 1rem; }
pre { background: #f5f5f5; padding: 0.8rem; overflow-x: auto; font-size: 0.8rem; }
"""


NO_MAPS = (
    "Not shown: the model sees pictures by cross-attention, so that their tokens are not in "
    "the rows it reads, or no right candidate is a picture that can be read."
)


@dataclass(frozen=True)
class Part:
    """A part of the report.

    Args:
        title: heading; empty where there is none.
        text: sentences.
        table: if any.
        picture: file name of one, if any.
        is_warning: to be set apart.
    """

    title: str = ""
    text: str = ""
    table: Table | None = None
    picture: str = ""
    is_warning: bool = False


def write_pages(
    outcome: Outcome, benchmark: Benchmark, model: MetaEmbedder, data: Path, out: Path
) -> list[Path]:
    """Write the report of a benchmark into its folder.

    Args:
        outcome: what came out.
        benchmark: what it was about.
        model: that was evaluated.
        data: the folder of all data, for the pictures.
        out: the folder of the evaluation.

    Returns:
        The files written.
    """
    budgets = [Budget.parse(name) for name in outcome.budgets]
    costs = costs_of(model.width, model.groups[-1], budgets)
    pools = [task.open(data) for task in benchmark.tasks]
    with report_style():
        pictures = _draw(outcome, pools, model, budgets, costs)
        for name, figure in pictures.items():
            save_picture(figure, out / name)
    parts = _parts(outcome, benchmark, budgets, costs, list(pictures))
    shows_pictures = any(item.image for pool in pools for item in islice(pool.candidates, 50))
    if shows_pictures and "maps.png" not in pictures:
        parts.append(Part("Where the vectors look", NO_MAPS))
    write_text(out / "report.md", _markdown(outcome, parts))
    write_text(out / "report.html", _html(outcome, parts, out))
    return [out / name for name in ("report.md", "report.html", *pictures, "results.json")]


def costs_of(width: int, largest: Budget, budgets: Sequence[Budget]) -> list[Cost]:
    """What budgets cost at a width: on made-up vectors, since time does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(1, largest.r_q, width, generator=generator)
    candidates = torch.randn(64, largest.r_c, width, generator=generator)
    return measure_costs(queries, candidates, budgets, num_repeats=5)


def _draw(
    outcome: Outcome,
    pools: Sequence[RetrievalSet],
    model: MetaEmbedder,
    budgets: Sequence[Budget],
    costs: Sequence[Cost],
) -> dict[str, Figure]:
    pictures = {
        "budgets.png": draw_budgets(_curves(outcome), budgets, costs, "score"),
        "tasks.png": draw_tasks(outcome),
    }
    if worst := worst_queries(outcome, pools):
        pictures["worst.png"] = draw_worst(outcome, worst)
    if looks := _looks(outcome, pools, model):
        pictures["maps.png"] = draw_maps(looks)
    if any(task.diversity for task in outcome.tasks):
        pictures["diversity.png"] = draw_diversity(outcome)
    return pictures


def _curves(outcome: Outcome) -> list[Curve]:
    """The means, and where there is room the tasks."""
    tasks = [Curve(task.name, list(map(task.score, outcome.budgets))) for task in outcome.tasks]
    if len(tasks) == 1:
        return tasks
    means = [
        Curve(label, [outcome.mean(label, budget).mean for budget in outcome.budgets])
        for label in outcome.labels
    ]
    return [*tasks, *means] if len(tasks) + len(means) <= MOST_LINES else means[-MOST_LINES:]


def _looks(outcome: Outcome, pools: Sequence[RetrievalSet], model: MetaEmbedder) -> list[Looks]:
    """Queries whose right candidate is a picture, of each task in turn; found ones come first."""
    by_task = [
        islice(_pictured(task, pool, model, outcome.budgets[-1]), NUM_LOOKS)
        for task, pool in zip(outcome.tasks, pools, strict=True)
    ]
    in_turn = (one for row in zip_longest(*by_task) for one in row if one is not None)
    return list(islice(in_turn, NUM_LOOKS))


def _pictured(
    task: TaskOutcome, pool: RetrievalSet, model: MetaEmbedder, budget: str
) -> Iterator[Looks]:
    is_right = task.values[f"precision@1/{budget}"]
    unread = {line.partition(": ")[0] for line in task.bad_queries + task.bad_candidates}
    ids = uids(pool.candidates)
    shown = [
        q
        for q, id in enumerate(task.queries)
        if id not in unread
        and ids[pool.relevant[q][-1]] not in unread
        and pool.relevant[q][-1] >= 0
    ]
    # Every so many, so that not all are from the beginning of the set.
    step = max(1, sum(is_right[q] == 1 for q in shown) // NUM_LOOKS)
    for query in sorted(shown, key=lambda q: (-is_right[q], q % step, q)):
        candidate = pool.candidates[pool.relevant[query][-1]]
        maps = None if candidate.image is None else patch_attention(model, candidate, "candidate")
        if maps is None:
            continue
        asked = model.encode_query([pool.queries[query]])[0, : Budget.parse(budget).r_q]
        matched = (asked @ model.encode_candidate([candidate])[0].T).argmax(dim=1)
        yield Looks(
            pool.queries[query], candidate, maps[:NUM_MAPS].numpy(), matched.unique().tolist()
        )


def _parts(
    outcome: Outcome,
    benchmark: Benchmark,
    budgets: Sequence[Budget],
    costs: Sequence[Cost],
    pictures: Sequence[str],
) -> list[Part]:
    parts = [Part(text=line, is_warning=True) for line in warnings_of(outcome)]
    said = "Ties count against the model. Intervals: bootstrap over queries, within tasks."
    parts.append(Part("Scores", said, task_table(outcome)))
    if benchmark.references:
        said = (
            "Points of 100; others as they were published, unless it says that they were run here."
        )
        parts.append(Part("Beside others", said, reference_table(outcome, benchmark.references)))
    said = (
        "Bytes: bf16. Time: one query against "
        f"{NUM_TIMED_CANDIDATES:,} candidates, exact, float32 on this machine's CPU, threads: "
        f"{torch.get_num_threads()}, scoring alone."
    )
    parts.append(Part("What a budget buys", said, _cost_table(outcome, costs), "budgets.png"))
    # These have their titles in them.
    own = ("tasks.png", "worst.png", "maps.png")
    parts += [Part(picture=name) for name in own if name in pictures]
    if "diversity.png" in pictures:
        said = "Vectors that say the same are paid for twice: 1 is the same vector, 0 unrelated."
        table = _diversity_table(outcome, budgets)
        parts.append(Part("Diversity of the vectors", said, table, "diversity.png"))
    return parts


def warnings_of(outcome: Outcome) -> list[str]:
    """What a reader must know before any number."""
    said = []
    for task in outcome.tasks:
        if task.deviation:
            said.append(f"{task.name} is not the published set: {task.deviation}.")
        for what, bad in (("candidates", task.bad_candidates), ("queries", task.bad_queries)):
            if bad:
                said.append(
                    f"{task.name}: {len(bad)} {what} cannot be read and count as missed; first of "
                    f"all {bad[0]}."
                )
        if task.num_left_out:
            said.append(
                f"{task.name}: {task.num_left_out} queries have no right candidate and are left "
                "out of every mean."
            )
    return said


def _cost_table(outcome: Outcome, costs: Sequence[Cost]) -> Table:
    rows = [
        [
            budget,
            f"{outcome.mean(OVERALL, budget).mean:.3f}",
            format_bytes(cost.candidate_bytes),
            format_ms(1000 * cost.scoring_s),
        ]
        for budget, cost in zip(outcome.budgets, costs, strict=True)
    ]
    return Table(["budget", OVERALL, "bytes a candidate", "time a query"], rows)


def _diversity_table(outcome: Outcome, budgets: Sequence[Budget]) -> Table:
    rows = []
    for budget in budgets:
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


def _markdown(outcome: Outcome, parts: Sequence[Part]) -> str:
    lines = [f"# {outcome.title}", "", _lead(outcome)]
    for part in parts:
        lines += ["", f"## {part.title}"] if part.title else []
        if part.text:
            lines += ["", f"> {part.text}" if part.is_warning else part.text]
        if part.table:
            lines += ["", part.table.markdown()]
        if part.picture:
            lines += ["", f"![{_alt(part)}]({part.picture})"]
    about = json.dumps(outcome.about, indent=2)
    return "\n".join([*lines, "", "## Made with", "", "```json", about, "```", ""])


def _html(outcome: Outcome, parts: Sequence[Part], out: Path) -> str:
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{html.escape(outcome.title)}</title><style>{STYLE}</style></head><body>",
        f'<h1>{html.escape(outcome.title)}</h1><p class="lead">{html.escape(_lead(outcome))}</p>',
    ]
    for part in parts:
        if part.title:
            lines.append(f"<h2>{html.escape(part.title)}</h2>")
        if part.text:
            kind = ' class="warn"' if part.is_warning else ""
            lines.append(f"<p{kind}>{html.escape(part.text)}</p>")
        if part.table:
            lines.append(f'<div class="scroll">{part.table.html()}</div>')
        if part.picture:
            content = base64.b64encode((out / part.picture).read_bytes()).decode()
            alt = html.escape(_alt(part))
            lines.append(f'<img alt="{alt}" src="data:image/png;base64,{content}">')
    about = html.escape(json.dumps(outcome.about, indent=2))
    lines.append(f"<h2>Made with</h2><pre>{about}</pre></body></html>")
    return "\n".join(lines) + "\n"


def _alt(part: Part) -> str:
    return part.title or ALT[part.picture]


def _lead(outcome: Outcome) -> str:
    best = outcome.mean(OVERALL, outcome.budgets[-1])
    num_queries = sum(len(task.queries) for task in outcome.tasks)
    return (
        f"{best.mean:.3f} ({best.low:.3f} to {best.high:.3f}) at {outcome.budgets[-1]}; "
        f"tasks: {len(outcome.tasks)}; queries: {num_queries:,}; model "
        f"{str(outcome.about.get('identity', ''))[:12]}, vectors {outcome.about.get('width')} wide."
    )
