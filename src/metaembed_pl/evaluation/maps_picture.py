"""Where the vectors look: attention of meta embeddings, laid over the pictures they encode."""

from collections.abc import Iterator, Sequence
from itertools import islice, zip_longest
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from metaembed_pl.budget import Budget
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.evaluation.canvas import MUTED, RIGHT
from metaembed_pl.evaluation.outcome import Outcome, TaskOutcome, unread
from metaembed_pl.evaluation.scoring import uids
from metaembed_pl.evaluation.sheet import CELL, GAP, MARGIN, draw_item, draw_query, new_sheet, write
from metaembed_pl.item import Item
from metaembed_pl.late_interaction import narrowed
from metaembed_pl.model.embedder import MetaEmbedder
from metaembed_pl.model.patches import patch_attention

NUM_LOOKS = NUM_MAPS = 4
QUERY_WIDTH, TOP, ROW = 2.15, 0.95, CELL + 0.5


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
    said = (
        "Attention of a candidate's first vectors. Violet: average, bright: twice that. "
        "Green: matched by the query."
    )
    height = TOP + ROW * len(looks) + MARGIN / 2
    figure, sheet = new_sheet(width, height, "Where the vectors look", said)
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


def pictures_to_map(
    outcome: Outcome, pools: Sequence[RetrievalSet], model: MetaEmbedder
) -> list[Looks]:
    """Queries whose right candidate is a picture, from each task in turn; found ones come first."""
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
    r_q, r_c, width = Budget.parse(budget)
    bad = unread(task.bad_queries + task.bad_candidates)
    ids = uids(pool.candidates)
    shown = [
        q
        for q, id in enumerate(task.queries)
        if id not in bad and ids[pool.relevant[q][-1]] not in bad and pool.relevant[q][-1] >= 0
    ]
    # Spread over the set.
    step = max(1, sum(is_right[q] == 1 for q in shown) // NUM_LOOKS)
    for query in sorted(shown, key=lambda q: (-is_right[q], q % step, q)):
        candidate = pool.candidates[pool.relevant[query][-1]]
        maps = None if candidate.image is None else patch_attention(model, candidate, "candidate")
        if maps is None:
            continue
        asked = narrowed(model.encode_query([pool.queries[query]])[0, :r_q], width)
        answers = narrowed(model.encode_candidate([candidate])[0, :r_c], width)
        matched = (asked @ answers.T).argmax(dim=1)
        yield Looks(
            pool.queries[query], candidate, maps[:NUM_MAPS].numpy(), matched.unique().tolist()
        )
