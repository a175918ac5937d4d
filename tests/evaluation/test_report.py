import json
from itertools import pairwise

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from metaembed_pl.budget import Budget
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation import report
from metaembed_pl.evaluation.budgets_picture import Cost, Curve, draw_budgets
from metaembed_pl.evaluation.canvas import report_style, save_picture, spread
from metaembed_pl.evaluation.gallery_picture import NUM_QUERIES, draw_gallery
from metaembed_pl.evaluation.report import measure_costs, write_report
from metaembed_pl.evaluation.result import DatasetResult
from metaembed_pl.item import Item
from metaembed_pl.late_interaction import maxsim
from metaembed_pl.training.metrics import ranking_metrics

GROUPS = (Budget(1, 1), Budget(2, 3))


def made_up(name="made", num_queries=6, num_candidates=4, width=5, queries=None, candidates=None):
    """A dataset with random vectors: query i asks for candidate i % num_candidates."""
    generator = torch.Generator().manual_seed(0)
    vectors = [
        torch.nn.functional.normalize(torch.randn(*shape, width, generator=generator), dim=-1)
        for shape in ((num_queries, 2), (num_candidates, 3))
    ]
    pool = RetrievalSet(
        name,
        queries or [Item(f"query {i}") for i in range(num_queries)],
        candidates or [Item(f"thing {i}") for i in range(num_candidates)],
        [[i % num_candidates] for i in range(num_queries)],
    )
    metrics = {}
    for group in GROUPS:
        scores = maxsim(vectors[0][:, : group.r_q], vectors[1][:, : group.r_c])
        for key, values in ranking_metrics(scores, pool.relevant).items():
            metrics[f"{key}/{group}"] = values.mean().item()
    return DatasetResult(pool, metrics, *vectors)


def written(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_metrics_json_is_flat_and_sorted(tmp_path):
    results = [made_up("b"), made_up("a")]
    write_report(tmp_path / "new" / "report", "test", results, GROUPS)
    read = json.loads((tmp_path / "new" / "report" / "metrics.json").read_text())
    assert read == {
        f"test/{result.name}/{key}": value
        for result in results
        for key, value in result.metrics.items()
    }
    assert list(read) == sorted(read)


def test_the_page_has_a_row_for_each_dataset_and_budget(tmp_path):
    result = made_up("odd|name")
    write_report(tmp_path, "val", [result], GROUPS)
    page = (tmp_path / "report.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[1] for row in rows] == ["1x1", "2x3"]
    assert rows[0].startswith(r"| odd\|name |")
    assert f" {result.metrics['recall@1/2x3']:.3f} | {result.metrics['mrr/2x3']:.3f} |" in rows[1]
    assert "| 10 |" in rows[0]  # 1 vector x width 5 x 2 bytes
    assert "| 30 |" in rows[1]
    assert f"torch {torch.__version__}" in page


def test_a_new_report_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    write_report(tmp_path, "test", [made_up("old")], GROUPS)
    paths = write_report(tmp_path, "test", [made_up("new")], GROUPS)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert "old" not in (tmp_path / "metrics.json").read_text()
    for path in paths[2:]:
        Image.open(path).verify()


def test_a_picture_that_does_not_decode_leaves_the_old_report(tmp_path):
    paths = write_report(tmp_path, "test", [made_up()], GROUPS)
    before = [path.read_bytes() for path in paths]
    broken = made_up(candidates=[Item(image=b"no picture") for _ in range(4)])
    with pytest.raises(UserError, match="does not decode"):
        write_report(tmp_path, "test", [broken], GROUPS)
    assert [path.read_bytes() for path in paths] == before


def test_refuses_to_report_nothing(tmp_path):
    with pytest.raises(UserError, match="no dataset was evaluated"):
        write_report(tmp_path / "report", "test", [], GROUPS)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("group", GROUPS)
def test_ranks_are_those_of_the_metrics(group, monkeypatch):
    # 7 scores at a time: one query of 5 candidates a chunk.
    monkeypatch.setattr("metaembed_pl.evaluation.result.SCORES_AT_A_TIME", 7)
    result = made_up(num_queries=9, num_candidates=5)
    mrr = (1 / result.ranks(group).float()).mean().item()
    assert mrr == pytest.approx(result.metrics[f"mrr/{group}"])


def test_ties_count_against_the_right_one_and_right_ones_not_against_each_other():
    pool = RetrievalSet("ties", [Item("q")], [Item(f"{i}") for i in range(4)], [[1, 3]])
    same = DatasetResult(pool, {}, torch.ones(1, 2, 1), torch.ones(4, 3, 1))
    assert same.ranks(GROUPS[0]).tolist() == [3]


def test_the_gallery_marks_the_right_candidates_and_tells_their_rank():
    # One vector a side. Query 0 finds its candidate first, query 1 last of three.
    pool = RetrievalSet("two", [Item("up"), Item("down")], [Item(c) for c in "abc"], [[0], [2]])
    candidates = torch.tensor([[[1.0, 0.0]], [[0.8, 0.6]], [[0.0, 1.0]]])
    queries = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    result = DatasetResult(pool, {"recall@1/1x1": 0.5}, queries, candidates)
    texts = written(draw_gallery([result], [Budget(1, 1)]))
    up, down = texts.index("up"), texts.index("down")
    assert texts[up + 1 : down] == ["a", "✓", "1.00", "b", "0.80", "c", "0.00", "1"]
    assert texts[down + 1 :] == ["a", "1.00", "b", "0.80", "c", "✓", "0.00", "3"]


def test_the_gallery_shows_right_and_wrong_queries_in_proportion():
    # 3 of 4 queries find their candidate; so do 3 of the 4 that are shown.
    pool = RetrievalSet(
        "many", [Item(f"{i}") for i in range(40)], [Item("a"), Item("b")], [[0]] * 40
    )
    queries = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 1.0]], [[1.0, 0.0]]]).repeat(
        10, 1, 1
    )
    result = DatasetResult(pool, {"recall@1/1x1": 0.75}, queries, torch.eye(2).unsqueeze(1))
    figure = draw_gallery([result], [Budget(1, 1)])
    ranks = [
        text for text in figure.axes[0].texts if text.get_text() in "12" and text.get_size() == 14
    ]
    assert [rank.get_text() for rank in ranks] == ["1", "1", "1", "2"]
    assert len(ranks) == NUM_QUERIES


def test_the_gallery_compares_the_smallest_and_the_largest_budget():
    texts = written(draw_gallery([made_up(num_queries=1)], GROUPS))
    assert [text for text in texts if "x" in text] == ["1x1", "2x3"]


def test_draws_whatever_a_name_or_picture_holds(tmp_path):
    names = [r"$\frac$ costs", "line\nbreak\tand\0nul", "国旗 🏳", "x" * 400, "_^{", "\u202eabc"]
    tall = Image.new("RGBA", (3, 600), "red")
    results = [
        made_up(
            name,
            num_queries=1,
            queries=[Item(name, image=tall)],
            candidates=[Item(name), Item(image=tall), Item(name, image=tall), Item("a")],
        )
        for name in names
    ]
    write_report(tmp_path, "test", results, GROUPS)


def test_a_user_matplotlib_settings_change_nothing(tmp_path):
    costs = [Cost(10, 0.001), Cost(30, 0.002)]

    def draw(name):
        with report_style():
            save_picture(
                draw_budgets([Curve("made", [0.25, 0.5])], GROUPS, costs),
                tmp_path / f"budgets{name}",
            )
            save_picture(draw_gallery([made_up()], GROUPS), tmp_path / f"gallery{name}")
        return [(tmp_path / f"{kind}{name}").read_bytes() for kind in ("budgets", "gallery")]

    plain = draw("1.png")
    with matplotlib.rc_context({"font.size": 40, "text.usetex": True, "savefig.bbox": "tight"}):
        assert draw("2.png") == plain


def test_budgets_of_one_group_or_equal_cost_are_drawn():
    groups = [Budget(1, 3), Budget(2, 3)]
    for some in (groups, groups[:1]):
        costs = [Cost(6, 0.001)] * len(some)
        with report_style():
            texts = written(draw_budgets([Curve("x", [0.5] * len(some))], some, costs))
        assert [text for text in texts if text in ("1x3", "2x3")] == [str(g) for g in some] * 2


@pytest.mark.parametrize("name", ["x", "emoji_scene", "DocumentUnderstanding_fr"])
def test_names_of_curves_fit_between_the_panels_and_into_the_picture(name):
    with report_style():
        figure = draw_budgets([Curve(name, [0.5, 0.8])], GROUPS, [Cost(10, 0.001), Cost(30, 0.002)])
        renderer = FigureCanvasAgg(figure).get_renderer()
    first, second = figure.axes
    for panel, end in ((first, second.bbox.x0), (second, figure.bbox.x1)):
        (label,) = (t for t in panel.texts if t.get_text().startswith("0.80"))
        assert label.get_window_extent(renderer).x1 < end


def test_a_cost_counts_bf16_bytes_and_scales_the_time_of_a_large_pool(monkeypatch):
    calls = []
    monkeypatch.setattr(report, "maxsim", lambda q, c: calls.append((q.shape, c.shape)))
    monkeypatch.setattr(report, "TIMED_POOL_BYTES", 4 * 3 * 8 * 100)
    # A clock on which every run takes 1 s.
    monkeypatch.setattr(report.time, "perf_counter", iter(range(1000)).__next__)
    costs = measure_costs(torch.ones(2, 2, 8), torch.ones(4, 3, 8), GROUPS, num_repeats=2)
    assert costs == [Cost(16, 100.0), Cost(48, 100.0)]  # 100 of 10,000 candidates fit
    assert calls == [((1, 1, 8), (100, 1, 8))] * 2 + [((1, 2, 8), (100, 3, 8))] * 2


def test_labels_keep_their_distance_and_their_order():
    placed = spread([0.5, 0.51, 0.52, 0.9, 0.99], gap=0.1, highest=1)
    assert placed == sorted(placed)
    gaps = [after - before for before, after in pairwise(placed)]
    assert min(gaps) == pytest.approx(0.1, abs=0.02)
    assert spread([0.1, 0.5], gap=0.1) == [0.1, 0.5]
