"""Draws the pictures of docs/concepts.md: `python docs/images/drawings.py`."""

import json
from pathlib import Path
from statistics import mean

INK, MUTED, FAINT = "#222222", "#767676", "#e3e3e3"
BLUE, ORANGE, GREEN = "#0072B2", "#D55E00", "#009E73"
FONT = "font-family='DejaVu Sans, Verdana, sans-serif'"
BUDGETS = ("1x1", "2x4", "4x8", "8x16")
BYTES = (256, 1024, 2048, 4096)
STUDY = Path(__file__).parents[2] / "benchmarks" / "results" / "study-amd-epyc.json"


def text(x: float, y: float, said: str, **style: object) -> str:
    """A line of text, centred unless told otherwise."""
    style = {"fill": INK, "font-size": 14, "text-anchor": "middle", **style}
    given = " ".join(f"{key}='{value}'" for key, value in style.items())
    return f"<text x='{x}' y='{y}' {given}>{said}</text>"


def box(x: float, y: float, width: float, height: float, colour: str, said: str = "") -> str:
    """A filled rectangle with a word in it."""
    shape = f"<rect x='{x}' y='{y}' width='{width}' height='{height}' rx='4' fill='{colour}'/>"
    return shape + text(x + width / 2, y + height / 2 + 5, said, fill="white", **{"font-size": 13})


def arrow(x: float, y: float, end: float) -> str:
    """An arrow downwards."""
    line = f"<path d='M{x} {y} V{end}' stroke='{MUTED}' stroke-width='1.5'/>"
    return line + f"<path d='M{x - 4} {end - 6} L{x} {end} L{x + 4} {end - 6}' fill='{MUTED}'/>"


def save(name: str, width: int, height: int, parts: list[str]) -> None:
    """Write a drawing on a white card, which reads well on light and on dark pages."""
    head = f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' {FONT}>"
    card = f"<rect width='{width}' height='{height}' rx='10' fill='white'/>"
    (Path(__file__).parent / name).write_text("\n".join([head, card, *parts, "</svg>\n"]))


def meta_tokens() -> None:
    """The input of the backbone, and the outputs that are kept."""
    parts, left, size = [], 30, 46
    inputs = [*[("image", BLUE)] * 4, *[("text", GREEN)] * 3, *[("", ORANGE)] * 4]
    for i, (said, colour) in enumerate(inputs):
        x, number = left + i * (size + 6), i - 6
        parts += [box(x, 30, size, 34, colour, said or f"M{number}"), arrow(x + 23, 66, 92)]
        kept = number > 0
        parts.append(arrow(x + 23, 144, 170) if kept else "")
        parts.append(box(x, 172, size, 34, ORANGE, f"v{number}") if kept else "")
    width = len(inputs) * (size + 6) - 6
    parts.append(box(left, 94, width, 48, "#555555", "backbone: a vision-language model"))
    parts.append(text(left + 3.5 * 52 - 3, 194, "these outputs are not used", fill=MUTED))
    parts.append(text(left + 9 * 52 - 3, 232, "meta embeddings, each of length 1", fill=ORANGE))
    parts.append(text(left + 9 * 52 - 3, 22, "learned meta tokens", fill=ORANGE))
    parts.append(text(left + 3.5 * 52 - 3, 22, "the item: an image, a text, or both", fill=MUTED))
    save("meta_tokens.svg", 632, 250, parts)


def nested_groups() -> None:
    """Prefixes of a candidate's vectors, each trained to work by itself."""
    parts, left, step = [], 150, 34
    for row, budget in enumerate(BUDGETS):
        r_q, r_c = map(int, budget.split("x"))
        y = 50 + row * 46
        said = text(left - 16, y + 18, f"group {budget}", **{"text-anchor": "end"})
        parts.append(said)
        for i in range(16):
            colour = ORANGE if i < r_c else FAINT
            parts.append(f"<rect x='{left + i * step}' y='{y}' width='28' height='26' rx='4'")
            parts[-1] += f" fill='{colour}'/>"
        said = f"{r_q} query x {r_c} candidate vectors"
        parts.append(text(left + 16 * step + 8, y + 18, said, **{"text-anchor": "start"}))
    parts.append(text(left + 8 * step, 30, "vectors of one candidate", fill=MUTED))
    save("nested_groups.svg", 970, 245, parts)


def budget_costs() -> None:
    """Bytes of each budget, and how many scenes for one thing it finds."""
    parts, base, height = [], 210, 160
    runs = json.loads(STUDY.read_text())["runs"]["today"]  # the quickstart with several seeds
    for i, (budget, size) in enumerate(zip(BUDGETS, BYTES, strict=True)):
        recall = round(mean(run["sets"]["emoji_scene"][budget] for run in runs), 3)
        x = 90 + i * 150
        for offset, value, colour, said in (
            (0, recall, BLUE, f"{recall:.3f}"),
            (48, size / BYTES[-1], ORANGE, f"{size:,} B"),
        ):
            top = base - value * height
            parts.append(box(x + offset, top, 42, value * height, colour))
            parts.append(text(x + offset + 21, top - 7, said, fill=colour, **{"font-size": 12}))
        parts.append(text(x + 45, base + 22, budget, **{"font-weight": "bold"}))
    parts.append(f"<path d='M60 {base} H690' stroke='{MUTED}'/>")
    parts.append(text(60, 24, "recall@1 of scenes", fill=BLUE, **{"text-anchor": "start"}))
    parts.append(text(215, 24, "bytes per candidate", fill=ORANGE, **{"text-anchor": "start"}))
    save("budget_costs.svg", 720, 245, parts)


if __name__ == "__main__":
    meta_tokens()
    nested_groups()
    budget_costs()
