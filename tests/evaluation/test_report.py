"""The report: what its tables and pictures show is what the metrics were computed from."""

import json
import re
from itertools import pairwise

import matplotlib
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from metaembed_pl.budget import Budget
from metaembed_pl.data.retrieval_set import RetrievalSet
from metaembed_pl.errors import UserError
from metaembed_pl.evaluation import costs
from metaembed_pl.evaluation.benchmarks import Task
from metaembed_pl.evaluation.budgets_picture import Curve, draw_budgets
from metaembed_pl.evaluation.canvas import report_style, save_picture, spread
from metaembed_pl.evaluation.costs import Cost
from metaembed_pl.evaluation.gallery_picture import NUM_QUERIES, draw_gallery
from metaembed_pl.evaluation.outcome import Outcome, TaskOutcome
from metaembed_pl.evaluation.report import curves_of, write_report
from metaembed_pl.evaluation.task_pictures import draw_worst
from metaembed_pl.item import Item
from metaembed_pl.ranking import rank

GROUPS = (Budget(1, 1), Budget(2, 3))
ABOUT = {"width": 5, "versions": {"torch": torch.__version__}}


def items(count, word):
    return [Item(f"{word} {i}", id=f"{word}-{i}") for i in range(count)]


def outcome_of(scores, relevant, name="made", pool=None, **judged):
    """An outcome of scores for each budget, and its set."""
    num_queries, num_candidates = scores[0].shape
    pool = pool or RetrievalSet(
        name, items(num_queries, "query"), items(num_candidates, "thing"), relevant, **judged
    )
    ranked = {
        group: rank(of, pool.relevant, pool.gains, pool.lists, pool.itself)
        for group, of in zip(GROUPS, scores, strict=False)
    }
    task = TaskOutcome.of(Task(name, "", "recall@1"), pool, ranked)
    budgets = [str(group) for group in ranked]
    return Outcome("test", f"{name}: test", budgets, ABOUT, [task]), [pool]


def made_up(name="made", num_queries=6, num_candidates=4, **pool):
    """Random scores: query i asks for candidate i % num_candidates."""
    generator = torch.Generator().manual_seed(0)
    scores = [torch.rand(num_queries, num_candidates, generator=generator) for _ in GROUPS]
    relevant = [[i % num_candidates] for i in range(num_queries)]
    given = RetrievalSet(
        name,
        pool.get("queries", items(num_queries, "query")),
        pool.get("candidates", items(num_candidates, "thing")),
        relevant,
    )
    return outcome_of(scores, relevant, name, given)


def written(figure):
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def with_ties(seed):
    """Few distinct scores, up to three graded right answers, lists, and ids left out."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(3, (4, 9), generator=generator) / 4 for _ in GROUPS]
    orders = torch.rand(4, 9, generator=generator).argsort(dim=1).tolist()
    relevant = [sorted(order[: 1 + q % 3]) for q, order in enumerate(orders)]
    gains = [[1.0 + i for i in range(len(right))] for right in relevant]
    lists = [sorted(order[:8]) for order in orders]
    itself = [order[7] for order in orders]
    return scores, relevant, {"gains": gains, "lists": lists, "itself": itself}


def by_hand(scores, right, searched):
    """Candidates in order: best first, wrong ones first among equal scores."""
    order = sorted(searched, key=lambda c: (-scores[c].item(), c in right))
    return order, next(i for i, c in enumerate(order, start=1) if c in right)


@pytest.mark.parametrize("seed", range(5))
def test_gallery_table_and_metrics_agree_on_ties_and_several_right_answers(
    seed, tmp_path, monkeypatch
):
    scores, relevant, judged = with_ties(seed)
    outcome, pools = outcome_of(scores, relevant, **judged)
    write_report(outcome, pools, tmp_path)
    page = (tmp_path / "report.md").read_text()
    monkeypatch.setattr("metaembed_pl.evaluation.gallery_picture._sample", lambda *_: range(4))
    texts = written(draw_gallery(outcome, pools))
    recalls = []
    for place, (group, num_shown) in enumerate(zip(GROUPS, (3, 5), strict=True)):
        recall = 0
        for query in range(4):
            searched = set(judged["lists"][query]) - {judged["itself"][query]}
            row, right = scores[place][query], relevant[query]
            order, first = by_hand(row, right, searched)
            recall += (order[0] in right) / len(right) / 4
            # The gallery's row of this query and budget: names, ticks, scores; then the rank.
            start = texts.index(f"query {query}") + 1
            end = texts.index(f"query {query + 1}") if query < 3 else len(texts)
            of_query = texts[start:end]
            names = [t for t in of_query if t.startswith("thing ")]
            names = names[:3] if place == 0 else names[3:]
            # The order among equal scores of wrong candidates is free: compare as classes.
            shown = [int(name.split()[1]) for name in names]
            assert len(shown) == num_shown
            assert [(row[c].item(), c in right) for c in shown] == [
                (row[c].item(), c in right) for c in order[:num_shown]
            ]
            assert set(shown) <= searched
            num_ticks = sum(c in right for c in order[:3]), sum(c in right for c in order[:5])
            if place == 1:
                first_small = by_hand(scores[0][query], right, searched)
                small_ticks = sum(c in right for c in first_small[0][:3])
                assert of_query.count("✓") == small_ticks + num_ticks[1]
                ranks = [t for t in of_query if t.isdigit()]
                assert ranks == [str(first_small[1]), str(first)]
            assert outcome.tasks[0].values[f"mrr/{group}"][query] == pytest.approx(1 / first)
        recalls.append(recall)
        assert outcome.tasks[0].score(str(group)) == pytest.approx(recall)
        assert f"recall@1 {recall:.2f}" in texts
    assert f"| {recalls[0]:.3f} | {recalls[1]:.3f} |" in page
    worst = written(draw_worst(outcome, pools))
    for query in range(4):
        value = outcome.tasks[0].values["recall@1/2x3"][query]
        first = outcome.tasks[0].rank(query, "2x3")
        assert f"made: recall@1 {value:.2f}, first right candidate at rank {first}" in worst


def test_the_page_shows_every_metric_and_what_budgets_cost(tmp_path):
    outcome, pools = made_up("odd|name*")
    write_report(outcome, pools, tmp_path)
    page = (tmp_path / "report.md").read_text()
    task = outcome.tasks[0]
    assert rf"| odd\|name\* | recall@1 | 6 | 4 | {task.score('1x1'):.3f} |" in page
    assert f" {task.score('2x3', 'mrr'):.3f} | {task.score('2x3', 'ndcg@5'):.3f} |" in page
    assert "| 10 B |" in page  # 1 vector x width 5 x 2 bytes
    assert "| 30 B |" in page
    assert f'"torch": "{torch.__version__}"' in page


def test_html_and_markdown_have_the_same_content(tmp_path):
    outcome, pools = made_up("<script>alert(1)</script>")
    write_report(outcome, pools, tmp_path)
    markdown, html = ((tmp_path / f"report.{kind}").read_text() for kind in ("md", "html"))
    numbers = re.findall(r"\d\.\d{3}", markdown.partition("## Settings and versions")[0])
    body = html.partition("<body>")[2].partition("Settings and versions")[0]
    assert re.findall(r">[^<]*", body)
    assert re.findall(r"\b\d\.\d{3}\b", re.sub(r'src="[^"]*"', "", body)) == numbers
    assert html.count('src="data:image/png;base64,') == markdown.count(".png)") == 4
    assert "<script>" not in html
    assert "&lt;script&gt;" in html


def test_a_new_report_replaces_the_old_one_and_leaves_nothing_else(tmp_path):
    write_report(*made_up("old"), tmp_path)
    paths = write_report(*made_up("new"), tmp_path)
    assert sorted(paths) == sorted(tmp_path.iterdir())
    assert "old" not in (tmp_path / "report.md").read_text()
    for path in paths[2:]:
        Image.open(path).verify()


def test_a_picture_that_does_not_decode_is_shown_as_such(tmp_path):
    outcome, pools = made_up(candidates=[Item(image=b"no picture", id=f"{i}") for i in range(4)])
    assert "unreadable" in written(draw_gallery(outcome, pools))
    write_report(outcome, pools, tmp_path)


def test_refuses_to_report_nothing(tmp_path):
    with pytest.raises(UserError, match="no dataset was evaluated"):
        write_report(Outcome("test", "nothing", ["1x1"], ABOUT, []), [], tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_an_outcome_can_be_read_back(tmp_path):
    outcome, _ = made_up()
    outcome.save(tmp_path)
    read = Outcome.load(tmp_path)
    assert read.tasks[0].values == outcome.tasks[0].values
    assert json.loads((tmp_path / "results.json").read_text())["metrics"] == read.metrics()


def test_the_gallery_marks_right_candidates_and_shows_their_rank():
    scores = torch.tensor([[1.0, 0.8, 0.0], [1.0, 0.8, 0.0]])
    pool = RetrievalSet("two", [Item("up"), Item("down")], [Item(c) for c in "abc"], [[0], [2]])
    texts = written(draw_gallery(*outcome_of([scores], None, "two", pool)))
    up, down = texts.index("up"), texts.index("down")
    assert texts[up + 1 : down] == ["a", "✓", "1.00", "b", "0.80", "c", "0.00", "1"]
    assert texts[down + 1 :] == ["a", "1.00", "b", "0.80", "c", "✓", "0.00", "3"]


def test_a_right_candidate_that_nobody_can_find_has_no_rank():
    scores = torch.tensor([[0.5, 0.25]])
    outcome, pools = outcome_of([scores], [[-1]])
    texts = written(draw_gallery(outcome, pools))
    assert texts[-1] == "none"
    assert "✓" not in texts
    assert "made: recall@1 0.00" in written(draw_worst(outcome, pools))


def test_the_gallery_shows_right_and_wrong_queries_in_proportion():
    # 3 of 4 queries find their candidate; so do 3 of the 4 that are shown.
    scores = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]).repeat(10, 1)
    figure = draw_gallery(*outcome_of([scores], [[0]] * 40))
    ranks = [
        text for text in figure.axes[0].texts if text.get_text() in "12" and text.get_size() == 14
    ]
    assert [rank.get_text() for rank in ranks] == ["1", "1", "1", "2"]
    assert len(ranks) == NUM_QUERIES


def test_the_gallery_compares_the_smallest_and_the_largest_budget():
    texts = written(draw_gallery(*made_up(num_queries=1)))
    assert [text for text in texts if re.fullmatch(r"\dx\d", text)] == ["1x1", "2x3"]


def test_draws_whatever_a_name_or_picture_holds(tmp_path):
    names = [r"$\frac$ costs", "line\nbreak\tand\0nul", "国旗 🏳", "x" * 400, "_^{", "\u202eabc"]
    tall = Image.new("RGBA", (3, 600), "red")
    made = [
        made_up(
            name,
            num_queries=1,
            queries=[Item(name, image=tall)],
            candidates=[Item(name), Item(image=tall), Item(name, image=tall), Item("a")],
        )
        for name in names
    ]
    tasks, pools = [outcome.tasks[0] for outcome, _ in made], [pool for _, [pool] in made]
    write_report(Outcome("test", "Names", ["1x1", "2x3"], ABOUT, tasks), pools, tmp_path)


def test_a_user_matplotlib_settings_change_nothing(tmp_path):
    costs = [Cost(10, 0.001), Cost(30, 0.002)]

    def draw(name):
        with report_style():
            curves = [Curve("made", [0.25, 0.5])]
            budgets = draw_budgets(curves, GROUPS, costs, "recall@1")
            save_picture(budgets, tmp_path / f"budgets{name}")
            save_picture(draw_gallery(*made_up()), tmp_path / f"gallery{name}")
        return [(tmp_path / f"{kind}{name}").read_bytes() for kind in ("budgets", "gallery")]

    plain = draw("1.png")
    with matplotlib.rc_context({"font.size": 40, "text.usetex": True, "savefig.bbox": "tight"}):
        assert draw("2.png") == plain


@pytest.mark.parametrize(
    ("count", "lines"), [(1, "0"), (5, "01234m"), (6, "012345"), (7, "m")], ids=str
)
def test_the_budgets_picture_shows_tasks_while_there_is_room(count, lines):
    tasks = [made_up(str(number))[0].tasks[0] for number in range(count)]
    curves = curves_of(Outcome("test", "Sets", ["1x1", "2x3"], ABOUT, tasks))
    assert [curve.name for curve in curves] == [{"m": "overall"}.get(name, name) for name in lines]


def test_budgets_of_one_group_or_equal_cost_are_drawn():
    groups = [Budget(1, 3), Budget(2, 3)]
    for some in (groups, groups[:1]):
        costs = [Cost(6, 0.001)] * len(some)
        with report_style():
            texts = written(draw_budgets([Curve("x", [0.5] * len(some))], some, costs, "mrr"))
        assert [text for text in texts if text in ("1x3", "2x3")] == [str(g) for g in some] * 2


@pytest.mark.parametrize("name", ["x", "emoji_scene", "DocumentUnderstanding_fr"])
def test_names_of_curves_fit_between_the_panels_and_into_the_picture(name):
    with report_style():
        costs = [Cost(10, 0.001), Cost(30, 0.002)]
        figure = draw_budgets([Curve(name, [0.5, 0.8])], GROUPS, costs, "mrr")
        renderer = FigureCanvasAgg(figure).get_renderer()
    first, second = figure.axes
    for panel, end in ((first, second.bbox.x0), (second, figure.bbox.x1)):
        (label,) = (t for t in panel.texts if t.get_text().startswith("0.80"))
        assert label.get_window_extent(renderer).x1 < end


def test_a_cost_counts_bf16_bytes_and_scales_the_time_of_a_large_pool(monkeypatch):
    calls = []
    monkeypatch.setattr(costs, "maxsim", lambda q, c: calls.append((q.shape, c.shape)))
    monkeypatch.setattr(costs, "TIMED_POOL_BYTES", 4 * 3 * 8 * 100)
    # A clock on which every run takes 1 s.
    monkeypatch.setattr(costs.time, "perf_counter", iter(range(1000)).__next__)
    found = costs.measure_costs(8, GROUPS, num_repeats=2)
    assert found == [Cost(16, 100.0), Cost(48, 100.0)]  # 100 of 10,000 candidates fit
    assert calls == [((1, 1, 8), (100, 1, 8))] * 2 + [((1, 2, 8), (100, 3, 8))] * 2


def test_labels_keep_their_distance_and_their_order():
    placed = spread([0.5, 0.51, 0.52, 0.9, 0.99], gap=0.1, highest=1)
    assert placed == sorted(placed)
    gaps = [after - before for before, after in pairwise(placed)]
    assert min(gaps) == pytest.approx(0.1, abs=0.02)
    assert spread([0.1, 0.5], gap=0.1) == [0.1, 0.5]
