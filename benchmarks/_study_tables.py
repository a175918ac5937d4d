"""The study's tables, in Markdown, and the pages that show them.

A page has a table between `<!-- study: NAME -->` and `<!-- end -->`: `write_pages` puts the current
one there. Means over seeds with 95 % intervals by Student's t, where there are three seeds or more.
"""

import re
import statistics
from pathlib import Path
from typing import Any

Run = dict[str, Any]
"""Of a seed: `setting`, `seed`, `cpu_min`, `groups`, `width` and, by test set, `sets`."""
Runs = dict[str, list[Run]]
"""By setting, the runs of its seeds."""

SUMMED, COSINE = "summed", "cosine of queries"
FORMS = (
    (" projected to 64, int8", 64, 8),
    (" projected to 32", 32, None),
    ("x64 int8", 64, 8),
    ("x32", 32, None),
    (" bits", None, 1),
    ("x64", 64, None),
    (" int8", None, 8),
)
"""How a store may keep candidates: the budget's suffix, components (first or projected), bits."""
QUARTER = 0.3
"""Of the bytes of full candidates in bf16: int8 has a scale for each vector beside its bytes."""
IN_SHORT = {
    "emoji_t2i": "names",
    "emoji_i2t": "pictures",
    "emoji_edit": "edits",
    "emoji_scene": "one thing",
    "emoji_scene_two": "two things",
    "emoji_scene_three": "three things",
}
IN_WORDS = {
    "emoji_t2i": "name -> picture",
    "emoji_i2t": "picture -> name",
    "emoji_edit": "picture + edit -> picture",
    "emoji_scene": "scene, one thing",
    "emoji_scene_two": "scene, two things",
    "emoji_scene_three": "scene, three things (not trained)",
}
STUDENT = (4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""95 % quantiles of Student's t for 3, 4, ... 10 seeds."""
TWO_THINGS = "emoji_scene_two"
COUNTS = re.compile(r"\d+x\d+$")
PAGES = ("README.md", "docs/study.md")
BLOCK = re.compile(r"(<!-- study: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables(study: dict[str, Any], runs: Runs) -> dict[str, str]:
    """Each table that a page can show, by its name; without settings that have no runs.

    Args:
        study: benchmarks/study.yaml.
        runs: of each setting, in the order of the rows.
    """
    settings = study["settings"]
    about = {name: settings[name]["about"] for name in runs}
    runs = {name: of_seeds for name, of_seeds in runs.items() if of_seeds}
    alike = {name: runs[name] for name in runs if "test" not in settings[name]}
    over = {name: settings[name]["over"] for name in alike if "over" in settings[name]}
    recipes = {name: alike[name] for name in alike if name not in over}
    options = {name: alike[name] for name in alike if name in {*over, *over.values()}}
    made = {
        "recipes": settings_table(recipes, about),
        "options": settings_table(options, about),
        "budgets": budgets_table(alike),
        "bytes": bytes_table({name: runs[name] for name in study["bytes"] if name in runs}),
        "quickstart": recall_table(runs.get("today", []), runs.get("emoji_single", [])),
        "full": recall_table(runs.get("emoji_full", []), []),
    }
    return {name: table for name, table in made.items() if table}


def write_pages(made: dict[str, str], root: Path) -> None:
    """Put the tables into the pages that show them."""
    for page in PAGES:
        file = root / page
        file.write_text(with_tables(file.read_text(), made, page))


def with_tables(text: str, made: dict[str, str], page: str) -> str:
    """A page with the current tables in it. SystemExit: no runs for one of them."""
    for _, name, _ in BLOCK.findall(text):
        if name not in made:
            raise SystemExit(f"{page} shows the table `{name}`, and none of its runs is finished")
    return BLOCK.sub(lambda found: f"{found[1]}\n{made[found[2]]}\n\n{found[3]}", text)


def settings_table(runs: Runs, about: dict[str, str]) -> str:
    """Settings by test sets, at each model's largest group."""
    sets = _sets(runs)
    head = ["setting", "seeds", *(IN_SHORT.get(name, name) for name in sets)]
    rows = []
    for name, of_seeds in runs.items():
        cells = [_cell(of_seeds, dataset, of_seeds[0]["groups"][-1]) for dataset in sets]
        cosine = "" if of_seeds[0]["groups"] == ["1x1"] else _mean(of_seeds, TWO_THINGS, COSINE)
        minutes = f"{statistics.mean(one['cpu_min'] for one in of_seeds):.1f}"
        rows.append([f"`{name}`: {about[name]}", str(len(of_seeds)), *cells, cosine, minutes])
    return _markdown([*head, "query cosine", "CPU min"], rows)


def budgets_table(runs: Runs) -> str:
    """Queries for two things, settings by budgets: the groups, fewer query vectors, their sum."""
    first = next(iter(runs.values()))[0]["sets"].get(TWO_THINGS, {}) if runs else {}
    columns = [key for key in first if COUNTS.match(key) or key == SUMMED]
    rows = [
        [f"`{name}`", *(_mean(runs[name], TWO_THINGS, key) for key in columns)] for name in runs
    ]
    return _markdown(["setting", *columns], rows) if columns else ""


def bytes_table(runs: Runs) -> str:
    """Candidates of about a quarter of the bytes: recall, as a share of that of full ones."""
    sets = _sets(runs)
    rows = []
    for name, of_seeds in runs.items():
        largest, width = of_seeds[0]["groups"][-1], of_seeds[0]["width"]
        for form, first, bits in FORMS:
            components = first or width
            size = 2 * components if bits is None else components * bits // 8 + 4 * (bits == 8)
            cells = [_mean(of_seeds, dataset, f"{largest}{form}", by=largest) for dataset in sets]
            if size <= QUARTER * 2 * width and any(cells):
                total = f"{size * int(largest.partition('x')[2]):,}"
                share = f"{size / (2 * width):.2f}".removeprefix("0")
                words = form.strip() if form[0] == " " else f"first {form[1:].replace(' ', ', ')}"
                rows.append([f"`{name}`", words, total, share, *cells])
    head = ["setting", "candidates", "bytes", "of bf16"]
    return _markdown([*head, *(IN_SHORT.get(name, name) for name in sets)], rows)


def recall_table(of_seeds: list[Run], single: list[Run]) -> str:
    """Test sets by group, and a column for a model of one vector where it was trained."""
    if not of_seeds:
        return ""
    groups, width = of_seeds[0]["groups"], of_seeds[0]["width"]
    rows = []
    for dataset in of_seeds[0]["sets"]:
        cells = [_cell(of_seeds, dataset, group) for group in groups]
        cells += [_cell(single, dataset, "1x1")] if single else []
        rows.append([IN_WORDS.get(dataset, dataset), *cells])
    sizes = [f"{2 * width * int(group.partition('x')[2]):,}" for group in groups]
    sizes += [f"{2 * single[0]['width']:,}"] if single else []
    rows.append(["bytes a candidate, bf16", *sizes])
    table = _markdown(["recall@1, held out", *groups, *["one vector"] * bool(single)], rows)
    note = f"Mean and 95 % interval over {len(of_seeds)} seeds" if of_seeds[1:] else "One seed"
    if single and len(single) != len(of_seeds):
        note += f" (one vector: {len(single)})"
    return f"{table}\n\n{note}."


def with_interval(values: list[float]) -> str:
    """The mean and, of three values or more, half the width of its 95 % interval.

    >>> with_interval([0.5, 0.6]), with_interval([0.5, 0.6, 0.7])
    ('.550', '.600 ± .248')
    """
    mean = _number(statistics.mean(values))
    if len(values) < 3:
        return mean
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{mean} ± {_number(STUDENT[len(values) - 3] * error)}"


def _number(value: float) -> str:
    return f"{value:.3f}".removeprefix("0")


def _sets(runs: Runs) -> list[str]:
    return list(next(iter(runs.values()))[0]["sets"]) if runs else []


def _values(of_seeds: list[Run], dataset: str, column: str, by: str | None) -> list[float]:
    """A value of each seed, or its share of another one; of seeds where both were measured."""
    sets = [one["sets"].get(dataset, {}) for one in of_seeds]
    return [
        values[column] / (values[by] if by else 1)
        for values in sets
        if column in values and (by is None or values[by] > 0)
    ]


def _cell(of_seeds: list[Run], dataset: str, column: str) -> str:
    """The mean with its interval; empty where it was not measured."""
    found = _values(of_seeds, dataset, column, by=None)
    return with_interval(found) if found else ""


def _mean(of_seeds: list[Run], dataset: str, column: str, by: str | None = None) -> str:
    """The mean alone; empty where it was not measured."""
    found = _values(of_seeds, dataset, column, by)
    return _number(statistics.mean(found)) if found else ""


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    """A table; empty without rows."""
    if not rows:
        return ""
    lines = [f"| {' | '.join(cells)} |" for cells in [head, *rows]]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])
