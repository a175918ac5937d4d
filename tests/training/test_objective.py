"""What stands beside the MMR loss, each against its formula written as a loop."""

import math

import pytest
import torch
from torch.nn import functional as F

from loss_batches import (
    GROUPS,
    TWO_ROWS,
    a_batch,
    loss_and_gradients,
    part_of,
    questions,
    score_by_loop,
    vectors,
    without,
)
from metaembed_pl.errors import UserError
from metaembed_pl.training import loss as loss_module
from metaembed_pl.training.loss import MMRLoss
from metaembed_pl.training.loss_terms import (
    QuantizationConfig,
    SelfDistillationConfig,
    SpreadConfig,
    TeacherConfig,
)
from metaembed_pl.training.objective import LossConfig, Objective, Taught
from ranks import on_two_ranks

TEMPERATURE = 0.3
SPREADS = {
    "query_spread": SpreadConfig(weight=2.0, margin=0.1),
    "candidate_spread": SpreadConfig(weight=0.5, margin=-0.2),
}
BATCHES = pytest.mark.parametrize("make", [a_batch, questions])
BLOCKS = pytest.mark.parametrize("limit", [2**20, TWO_ROWS], ids=["one block", "two rows"])


def objective(**config):
    return Objective(GROUPS, LossConfig(temperature=TEMPERATURE, **config))


def beside(config, batch, **given):
    """What a setting adds to the plain loss, and the gradients of the whole."""
    whole = loss_and_gradients(lambda b: objective(**config)(**b, **given).loss, batch)
    plain = loss_and_gradients(lambda b: objective()(**b).loss, batch)
    added = {name: whole[1][name] - plain[1][name] for name in plain[1]}
    return whole[0] - plain[0], added


def spread_by_loop(rows, spread):
    """The penalty on vectors of an input that are alike."""
    total = 0
    for of_input in rows:
        pairs = [(a, b) for i, a in enumerate(of_input) for b in of_input[:i]]
        excess = [torch.clamp(a @ b - spread.margin, min=0) for a, b in pairs]
        total = total + spread.weight * sum(excess) / len(pairs) / len(rows)
    return total


def compared(batch, i):
    """The candidates that a query is compared with, its own first, and where they stand.

    A place is ("positives", row) or ("negatives", column of negatives_of).
    """
    positive_of = batch.get("positive_of", torch.arange(len(batch["queries"])))
    asked = set(batch["asks"][i].tolist())
    own = int(positive_of[i])
    places = [("positives", own)]
    for c, ids in enumerate(batch["answers"].tolist()):
        if c != own and not asked & set(ids):
            places.append(("positives", c))
    for column, n in enumerate(batch["negatives_of"][i].tolist()):
        if n >= 0 and not asked & set(batch["negative_answers"][n].tolist()):
            places.append(("negatives", column))
    found = []
    for side, place in places:
        row = place if side == "positives" else int(batch["negatives_of"][i, place])
        found.append(batch[side][row])
    return found, places


def logits_by_loop(batch, i, group):
    candidates, _ = compared(batch, i)
    scores = [score_by_loop(batch["queries"][i], c, group, mean=False) for c in candidates]
    return torch.stack(scores) / TEMPERATURE


def divergence_by_loop(teacher, student):
    p, q = teacher.softmax(dim=0), student.softmax(dim=0)
    return sum(a * (torch.log(a) - torch.log(b)) for a, b in zip(p, q, strict=True))


@pytest.mark.parametrize("sides", [["query_spread"], ["candidate_spread"], list(SPREADS)])
@BATCHES
def test_vectors_of_an_input_that_are_alike_cost_what_the_loop_says(sides, make):
    rows = {"query_spread": "queries", "candidate_spread": "positives"}
    ours = beside({side: SPREADS[side] for side in sides}, make())
    loop = loss_and_gradients(
        lambda b: (
            sum(spread_by_loop(b[rows[side]], SPREADS[side]) for side in sides)
            + 0 * sum(x.sum() for x in b.values() if x.is_floating_point())
        ),
        make(),
    )
    torch.testing.assert_close(ours, loop)
    assert loop[0] > 0.01, "nothing is above the margin: the test shows nothing"


@BATCHES
@BLOCKS
def test_the_largest_group_teaches_the_smaller_ones_its_distribution(make, limit, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_BLOCK_ELEMENTS", limit)
    config = SelfDistillationConfig(weight=0.7, temperature=2.0)

    def loop(batch):
        total = 0 * sum(x.sum() for x in batch.values() if x.is_floating_point())
        for i in range(len(batch["queries"])):
            teacher = logits_by_loop(batch, i, GROUPS[-1]).detach() / 2
            for group in GROUPS[:-1]:
                apart = divergence_by_loop(teacher, logits_by_loop(batch, i, group) / 2)
                total = total + 0.7 * 4 * apart / len(batch["queries"])
        return total

    torch.testing.assert_close(
        beside({"self_distillation": config}, make()), loss_and_gradients(loop, make())
    )


def test_self_distillation_comes_by_its_schedule():
    config = SelfDistillationConfig(weight=1.0, first_step=10, warmup_steps=4)
    added = [beside({"self_distillation": config}, a_batch(), step=s)[0] for s in (9, 10, 13, 99)]
    assert added[0] == 0
    torch.testing.assert_close(added[1], added[2] / 4)
    torch.testing.assert_close(added[2], added[3])


def given_scores(batch):
    """A reranker's scores of each query's positive and hard negatives, padded as they are."""
    size, num_hard = batch["negatives_of"].shape
    scores = 3 * vectors(size, num_hard + 1, seed=9)
    scores[:, 1:][batch["negatives_of"] < 0] = -torch.inf
    return scores


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
@BATCHES
@BLOCKS
def test_given_scores_teach_what_the_loop_says(kind, make, limit, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_BLOCK_ELEMENTS", limit)
    config = TeacherConfig(weight=0.6, objective=kind, temperature=1.5)

    def loop(batch):
        scores = given_scores(batch) / 1.5
        total = 0 * sum(x.sum() for x in batch.values() if x.is_floating_point())
        for i in range(len(batch["queries"])):
            _, places = compared(batch, i)
            hard = [n for n, (side, _) in enumerate(places) if side == "negatives"]
            theirs = scores[i, [0, *(1 + places[n][1] for n in hard)]]
            for group in GROUPS:
                ours = logits_by_loop(batch, i, group)[[0, *hard]]
                total = total + 0.6 * taught_by_loop(kind, theirs, ours) / len(batch["queries"])
        return total

    ours = beside({"teacher": config}, make(), scores=given_scores(make()))
    torch.testing.assert_close(ours, loss_and_gradients(loop, make()))


def taught_by_loop(kind, teacher, student):
    if kind == "kl":
        return divergence_by_loop(teacher, student)
    errors = [
        ((student[0] - ours) - (teacher[0] - theirs)) ** 2
        for ours, theirs in zip(student[1:], teacher[1:], strict=True)
    ]
    return sum(errors) / max(1, len(errors))


def taught(batch):
    """What another model, of other counts and another width, makes of the batch."""
    shapes = {name: (len(batch[name]), 4, 3) for name in ("queries", "positives", "negatives")}
    found = {name: vectors(*shape, seed=20 + len(name)) for name, shape in shapes.items()}
    return Taught(GROUPS[1], **found)


@pytest.mark.parametrize("kind", ["kl", "margin_mse"])
@BATCHES
@BLOCKS
def test_a_model_teaches_all_candidates_of_the_batch(kind, make, limit, monkeypatch):
    monkeypatch.setattr(loss_module, "CPU_BLOCK_ELEMENTS", limit)
    config = TeacherConfig("a model", weight=0.6, objective=kind, temperature=0.5)

    def loop(batch):
        teacher = batch | taught(batch)._asdict()
        total = 0 * sum(x.sum() for x in batch.values() if x.is_floating_point())
        for i in range(len(batch["queries"])):
            seen, _ = compared(teacher, i)
            theirs = [score_by_loop(teacher["queries"][i], c, GROUPS[1], True) for c in seen]
            theirs = torch.stack(theirs) / 0.5
            for group in GROUPS:
                ours = logits_by_loop(batch, i, group)
                total = total + 0.6 * taught_by_loop(kind, theirs, ours) / len(batch["queries"])
        return total

    ours = beside({"teacher": config}, make(), taught=taught(make()))
    torch.testing.assert_close(ours, loss_and_gradients(loop, make()))


@BATCHES
def test_every_width_has_the_loss_of_its_own_unit_vectors(make):
    def by_hand(batch):
        total = MMRLoss(GROUPS, TEMPERATURE)(**batch).loss / 3
        for width in (3, 2):
            cut = {
                name: F.normalize(x[..., :width], dim=-1) if x.is_floating_point() else x
                for name, x in batch.items()
            }
            total = total + MMRLoss(GROUPS, TEMPERATURE)(**cut).loss / 3
        return total

    ours = loss_and_gradients(lambda b: objective(widths=[3, 2])(**b).loss, make())
    torch.testing.assert_close(ours, loss_and_gradients(by_hand, make()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 1])
def test_candidates_are_rounded_in_a_share_of_the_steps(bits):
    def stored(vector):
        """A vector as a store of so many bits gives it back."""
        if bits == 1:
            return torch.tensor([math.copysign(0.5, x) for x in vector], dtype=vector.dtype)
        scale = max(abs(x) for x in vector.tolist()) / 127
        return torch.tensor([round(x / scale) * scale for x in vector.tolist()]).to(vector)

    batch, config = a_batch(), {"quantization": QuantizationConfig(bits=bits, share=0.25)}
    kept = batch | {
        name: torch.stack([stored(v) for v in batch[name].flatten(0, 1)]).view_as(batch[name])
        for name in ("positives", "negatives")
    }
    plain, expected = objective()(**batch).loss, objective()(**kept).loss
    assert abs(plain - expected) > 1e-5
    for step in range(8):
        found = objective(**config)(**batch, step=step).loss
        torch.testing.assert_close(found, expected if step % 4 == 3 else plain)
    # The gradient is taken at the rounded vectors and given to the vectors themselves.
    ours = loss_and_gradients(lambda b: objective(**config)(**b, step=3).loss, batch)
    theirs = loss_and_gradients(lambda b: objective()(**b).loss, kept)
    torch.testing.assert_close(ours, theirs)


def test_says_how_alike_the_vectors_are():
    batch = a_batch()
    for side, rows in (("query", batch["queries"]), ("candidate", batch["positives"])):
        cosines = [float(a @ b) for row in rows for i, a in enumerate(row) for b in row[:i]]
        found = objective()(**batch).also[f"cosine/{side}"]
        assert found == pytest.approx(sum(cosines) / len(cosines))


def cases():
    """Everything at once, and what a teaching model or given scores need."""
    common = SPREADS | {
        "self_distillation": SelfDistillationConfig(),
        "widths": [3],
        "both_directions": True,
    }
    for make in (a_batch, questions):
        by_scores = common | {"teacher": TeacherConfig(objective="margin_mse")}
        yield by_scores, make() | {"scores": given_scores(make())}
        yield common | {"teacher": TeacherConfig("a model")}, make()


def run(config, batch, *parts):
    """The loss and its gradients; of one rank's part where parts are given."""
    given = {}
    if config["teacher"].model:
        made = taught(batch)
        rank_of = parts[0] if parts else lambda b: b
        cut = rank_of(batch | made._asdict() if not parts else {**batch, **made._asdict()})
        given["taught"] = Taught(made.group, *(cut[n] for n in made._fields[1:]))
    mine = parts[0](batch) if parts else batch
    scores = {"scores": mine.pop("scores")} if "scores" in mine else {}
    loss = objective(**config)
    return loss_and_gradients(lambda b: loss(**b, **scores, **given).loss, mine)


def work(rank):
    return [
        run(config, batch, lambda b: part_of(without(b, "group"), rank))
        for config, batch in cases()
    ]


def test_two_ranks_equal_one_process_on_the_whole_batch(tmp_path):
    first, second = on_two_ranks(work, tmp_path)
    for (config, batch), *halves in zip(cases(), first, second, strict=True):
        loss, grads = run(config, batch)
        torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, loss)
        both = {name: torch.cat([grads[name] for _, grads in halves]) / 2 for name in grads}
        torch.testing.assert_close(both, grads)


@pytest.mark.parametrize(
    ("groups", "config", "message"),
    [
        (["1x1"], {"query_spread": SpreadConfig()}, "query_spread .* at least 2 .* group is 1x1"),
        (["1x4"], {"query_spread": SpreadConfig()}, "query_spread .* at least 2 .* group is 1x4"),
        (["4x1"], {"candidate_spread": SpreadConfig()}, "candidate_spread .* at least 2"),
        (["2x2"], {"self_distillation": SelfDistillationConfig()}, "and there is 2x2 alone"),
        (["2x2"], {"widths": [32, 64]}, r"nested, largest first and at least 1.*; got \[32, 64\]"),
        (["2x2"], {"widths": [32, 32]}, r"nested"),
        (["2x2"], {"widths": [0]}, r"at least 1.*; got \[0\]"),
    ],
)
def test_refuses_what_the_groups_have_no_use_for(groups, config, message):
    with pytest.raises(UserError, match=message):
        Objective(groups, LossConfig(**config))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda scores: None, "some have none"),
        (lambda scores: scores.index_fill(0, torch.tensor([2]), torch.nan), "some have none"),
        (lambda scores: scores[:, :1], "the batch has none: raise num_negatives"),
    ],
)
def test_refuses_a_teacher_whose_scores_are_missing(change, message):
    with pytest.raises(UserError, match=message):
        objective(teacher=TeacherConfig())(**a_batch(), scores=change(given_scores(a_batch())))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SpreadConfig(weight=0), "^weight must be positive, got 0"),
        (lambda: SpreadConfig(margin=1), "below 1, got 1"),
        (lambda: SelfDistillationConfig(temperature=math.nan), "temperature must be pos.* got nan"),
        (lambda: SelfDistillationConfig(first_step=-1), "at least 0, got -1 and 0"),
        (lambda: TeacherConfig(weight=-1), "teacher.weight must be positive, got -1"),
        (lambda: QuantizationConfig(bits=4), "8 or 1, got 4"),
        (lambda: QuantizationConfig(share=0), "above 0 to 1, got 0"),
    ],
)
def test_refuses_settings_out_of_range(make, message):
    with pytest.raises(UserError, match=message):
        make()
