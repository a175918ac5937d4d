"""The MMR loss against the paper's formula, written as a loop."""

import itertools
import math
from functools import partial

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
from metaembed_pl.budget import PAPER_GROUPS
from metaembed_pl.errors import UserError
from metaembed_pl.training import loss as loss_module
from metaembed_pl.training.loss import MMRLoss
from ranks import on_two_ranks
from unchecked import shapes_unchecked

SWITCHES = [
    {"both_directions": both, "mean_over_query": mean, "weights": weights}
    for both, mean, weights in itertools.product(
        [False, True], [False, True], [None, [0.5, 0.0, 2.0]]
    )
]


MARGINS = {"no margin": None, "a margin": 0.1}


def info_nce_by_loop(own, others, temperature):
    exponentials = [math.e ** ((score - own) / temperature) for score in others]
    return torch.log(1 + sum(exponentials, torch.zeros_like(own)))


def loss_by_loop(
    batch,
    temperature,
    weights=None,
    both_directions=False,
    mean_over_query=False,
    false_negative_margin=None,
):
    queries, positives = batch["queries"], batch["positives"]
    asks, answers = batch.get("asks"), batch.get("answers")
    size, total = len(queries), 0
    positive_of = batch.get("positive_of", torch.arange(size)).tolist()
    negatives_of = batch.get("negatives_of", torch.empty(size, 0)).int().tolist()

    def is_match(query, ids):
        return asks is not None and bool(set(asks[query].tolist()) & set(ids.tolist()))

    def seems_right(query, candidate, anchor):
        """Whether a pair's score, per query vector, beats the anchor's own by the margin."""
        if false_negative_margin is None:
            return False
        score = partial(score_by_loop, group=GROUPS[-1], mean=True)
        own = score(queries[anchor], positives[positive_of[anchor]])
        return bool(score(queries[query], candidate) > own + false_negative_margin)

    for group, weight in zip(GROUPS, weights or [1] * len(GROUPS), strict=True):
        score = partial(score_by_loop, group=group, mean=mean_over_query)
        for i in range(size):
            positive = positives[positive_of[i]]
            own = score(queries[i], positive)
            wrong = [
                score(queries[i], candidate)
                for c, candidate in enumerate(positives)
                if c != positive_of[i]
                if asks is None or not is_match(i, answers[c])
                if not seems_right(i, candidate, i)
            ]
            for n in negatives_of[i]:
                ids = batch.get("negative_answers")
                if n < 0 or (ids is not None and is_match(i, ids[n])):
                    continue
                if not seems_right(i, batch["negatives"][n], i):
                    wrong.append(score(queries[i], batch["negatives"][n]))
            loss = info_nce_by_loop(own, wrong, temperature)
            if both_directions:
                wrong = [
                    score(queries[j], positive)
                    for j in range(size)
                    if positive_of[j] != positive_of[i]
                    if asks is None or not is_match(j, answers[positive_of[i]])
                    if not seems_right(j, positive, i)
                ]
                loss = (loss + info_nce_by_loop(own, wrong, temperature)) / 2
            total = total + weight * loss / size
    return total


INPUTS = {
    "everything": (),
    "unmasked": ("asks", "answers", "negative_answers"),
    "unmasked hard negatives": ("negative_answers",),
    "in-batch negatives": ("negatives", "negatives_of", "negative_answers"),
}


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
@pytest.mark.parametrize("left_out", INPUTS.values(), ids=INPUTS)
@pytest.mark.parametrize("margin", MARGINS.values(), ids=MARGINS)
@pytest.mark.parametrize("make", [a_batch, questions])
@pytest.mark.parametrize("limit", [2**20, TWO_ROWS], ids=["one block", "blocks of two rows"])
def test_the_loss_and_its_gradients_are_the_loop_of_the_paper(
    switches, left_out, margin, make, limit, monkeypatch
):
    monkeypatch.setattr(loss_module, "CPU_BLOCK_ELEMENTS", limit)
    switches = switches | {"false_negative_margin": margin}
    batch = without(make(), *left_out)
    ours = loss_and_gradients(lambda b: MMRLoss(GROUPS, 0.3, **switches)(**b).loss, batch)
    loop = loss_and_gradients(lambda b: loss_by_loop(b, 0.3, **switches), batch)
    torch.testing.assert_close(ours, loop)


def test_the_one_group_1x1_is_the_info_nce_of_a_single_vector():
    queries, positives = vectors(8, 1, 4), vectors(8, 1, 4, seed=1)
    logits = queries[:, 0] @ positives[:, 0].T / 0.03
    expected = F.cross_entropy(logits, torch.arange(8))
    torch.testing.assert_close(MMRLoss(["1x1"])(queries, positives).loss, expected)


@pytest.mark.parametrize("make", [a_batch, questions])
def test_the_loss_passes_gradcheck(make):
    batch = make()
    names = ["queries", "positives", "negatives"]

    def loss(*inputs):
        return MMRLoss(GROUPS, 0.3, both_directions=True)(
            **batch | dict(zip(names, inputs, strict=True))
        ).loss

    assert torch.autograd.gradcheck(
        loss, [batch[name].requires_grad_() for name in names], fast_mode=True
    )


@pytest.mark.parametrize("both_directions", [False, True])
def test_the_order_of_the_pairs_does_not_matter(both_directions):
    batch = a_batch()
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    loss = MMRLoss(GROUPS, both_directions=both_directions)
    shuffled = {n: x if len(x) == 12 else x[order] for n, x in batch.items()}  # but hard negatives
    torch.testing.assert_close(loss(**shuffled).loss, loss(**batch).loss)


@pytest.mark.parametrize("both_directions", [False, True])
def test_the_order_of_the_questions_does_not_matter(both_directions):
    batch = questions()
    order = torch.tensor([6, 3, 0, 5, 1, 2, 4])
    loss = MMRLoss(GROUPS, both_directions=both_directions)
    shuffled = {n: x[order] if len(x) == 7 else x for n, x in batch.items()}
    torch.testing.assert_close(loss(**shuffled).loss, loss(**batch).loss)


def test_a_masked_candidate_gets_no_gradient_from_the_query_it_answers():
    batch = a_batch()
    batch["answers"][:, 0] = 100  # all answer what query 0 asks
    batch["asks"] = torch.tensor([[100], [1], [2], [3], [4], [5]])
    batch = without(batch, "negatives", "negatives_of", "negative_answers")
    _, grads = loss_and_gradients(lambda b: MMRLoss(GROUPS)(**b).loss, batch)
    assert torch.equal(grads["queries"][0], torch.zeros(3, 4, dtype=torch.float64))
    assert grads["queries"][1].abs().sum() > 0


def test_reports_each_group_and_the_number_of_negatives():
    batch = a_batch()
    output = MMRLoss(GROUPS, weights=[1, 2.5, 0])(**batch)
    assert not output.per_group.requires_grad
    torch.testing.assert_close(output.per_group @ output.per_group.new([1, 2.5, 0]), output.loss)
    assert (output.num_in_batch, output.num_hard) == (5, 2)
    # Of 6 queries: 0, 1, 2 and 5 have one other's positive that answers them, 3 and 2 a hard one.
    assert output.num_masked == pytest.approx(6 / 6)
    plain = MMRLoss(GROUPS)(batch["queries"], batch["positives"])
    assert (plain.num_in_batch, plain.num_hard, plain.num_masked) == (5, 0, 0)


def test_reports_the_true_number_of_hard_negatives_where_queries_have_different_ones():
    output = MMRLoss(GROUPS)(**questions())
    assert (output.num_in_batch, output.num_hard) == (3, pytest.approx(9 / 7))
    # Queries 1 and 6 are answered by one other's positive each, query 1 by a hard negative, too.
    assert output.num_masked == pytest.approx(3 / 7)


def test_the_largest_logits_of_the_paper_stay_finite():
    same = F.normalize(torch.ones(4, 64, 8), dim=-1)
    queries = (same[:, :16] * torch.tensor([1.0, -1, 1, -1]).view(4, 1, 1)).requires_grad_()
    output = MMRLoss(PAPER_GROUPS)(queries, -queries[:, :1].expand(4, 64, 8))
    output.loss.backward()
    # Every wrong score of the opposite sign is 2 x 16 higher, and there are two of them.
    torch.testing.assert_close(output.per_group[4], torch.tensor(2 * 16 / 0.03 + math.log(2)))
    assert queries.grad.isfinite().all()


@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_embeddings_have_a_float32_loss(autocast):
    batch = {n: x.bfloat16() if x.is_floating_point() else x for n, x in a_batch().items()}
    exact = {n: x.double() if x.is_floating_point() else x for n, x in batch.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = MMRLoss(GROUPS, both_directions=True)(**batch)
    assert output.loss.dtype == torch.float32
    expected = MMRLoss(GROUPS, both_directions=True)(**exact)
    torch.testing.assert_close(output.loss.double(), expected.loss, rtol=1e-5, atol=1e-5)


def cases():
    for make, both, left_out in itertools.product(
        [a_batch, questions], [False, True], INPUTS.values()
    ):
        yield {"both_directions": both}, without(make(), *left_out)
    yield {"both_directions": True, "false_negative_margin": 0.1}, a_batch()
    yield {"both_directions": True, "false_negative_margin": 0.1}, questions()


def work(rank):
    results = []
    for loss_module.CPU_BLOCK_ELEMENTS in (2**20, TWO_ROWS):
        for switches, batch in cases():
            loss = MMRLoss(GROUPS, 0.3, **switches)
            part = part_of(batch, rank)
            results.append(loss_and_gradients(lambda b, loss=loss: loss(**b).loss, part))
    return {"results": results, "num_in_batch": loss(**part_of(batch, rank)).num_in_batch}


def test_two_ranks_equal_one_process_on_the_whole_batch(tmp_path):
    first, second = on_two_ranks(work, tmp_path)
    twice = [*cases(), *cases()]
    for (switches, batch), *halves in zip(twice, first["results"], second["results"], strict=True):
        whole = MMRLoss(GROUPS, 0.3, **switches)
        loss, grads = loss_and_gradients(lambda b, whole=whole: whole(**b).loss, batch)
        torch.testing.assert_close((halves[0][0] + halves[1][0]) / 2, loss)
        # DDP averages gradients over ranks: the factor of a half, and no other.
        both = {name: torch.cat([grads[name] for _, grads in halves]) / 2 for name in grads}
        torch.testing.assert_close(both, grads)
    assert first["num_in_batch"] == second["num_in_batch"] == 3


@pytest.mark.parametrize("side", ["queries", "positives", "negatives"])
def test_refuses_scores_that_are_not_finite_and_names_the_group(side):
    batch = a_batch()
    batch[side][..., 2, :] = torch.nan
    with pytest.raises(UserError, match=r"scores of group (2x3|3x5) are not finite"):
        MMRLoss(GROUPS)(**batch)


def test_a_margin_leaves_out_what_beats_the_positive_by_more_in_the_largest_group():
    batch = without(a_batch(), "asks", "answers", "negative_answers")
    own_negatives = batch["negatives"].unflatten(0, (6, 2))
    scores = torch.stack(
        [
            torch.stack(
                [
                    score_by_loop(query, candidate, GROUPS[-1], mean=True)
                    for candidate in (*batch["positives"], *negatives)
                ]
            )
            for query, negatives in zip(batch["queries"], own_negatives, strict=True)
        ]
    )
    excess = scores - scores.diagonal()[:, None]
    for margin in (0.0, 0.1, 0.3):
        found = MMRLoss(GROUPS, false_negative_margin=margin)(**batch).num_masked
        assert found == pytest.approx(int((excess > margin).sum()) / 6)
    assert (excess > 0.3).any(), "the largest margin leaves nothing out: the test shows nothing"


@pytest.mark.parametrize("margin", [-0.1, math.inf, math.nan])
def test_refuses_a_margin_below_0(margin):
    with pytest.raises(UserError, match=f"margin must be at least 0, got {margin}"):
        MMRLoss(GROUPS, false_negative_margin=margin)


@pytest.mark.parametrize("temperature", [0.0, -0.03, math.inf, math.nan])
def test_refuses_a_temperature_that_is_not_above_0(temperature):
    with pytest.raises(UserError, match=f"above 0, got {temperature}"):
        MMRLoss(GROUPS, temperature)


@pytest.mark.parametrize(
    "bounds", [(0.03, 1.0), (0.01, 0.02), (0.0, 1.0), (0.01,), (0.01, math.inf)]
)
def test_refuses_bounds_that_the_temperature_is_not_between(bounds):
    with pytest.raises(UserError, match=r"expected 0 < low < 0.03 < high, got"):
        MMRLoss(GROUPS, 0.03, temperature_bounds=bounds)


def test_a_learned_temperature_starts_where_it_was_set_and_stays_between_its_bounds():
    batch = a_batch()
    loss = MMRLoss(GROUPS, 0.3, temperature_bounds=(0.1, 0.5))
    plain = MMRLoss(GROUPS, 0.3)(**batch)
    torch.testing.assert_close(loss(**batch).loss, plain.loss, rtol=1e-6, atol=0)
    # The slope by the temperature, and where a hundred steps far too long end.
    loss(**batch).loss.backward()
    low, high = (MMRLoss(GROUPS, t)(**batch).loss for t in (0.2999, 0.3001))
    slope = (high - low) / 0.0002
    share = math.log(0.3 / 0.1) / math.log(5)
    by_place = slope * 0.3 * math.log(5) * share * (1 - share)
    torch.testing.assert_close(loss.place.grad.double(), by_place, rtol=1e-3, atol=0)
    for end, bound in ((-100.0, 0.1), (100.0, 0.5)):
        torch.nn.init.constant_(loss.place, end)
        assert loss.temperature.item() == pytest.approx(bound)


def test_learned_weights_are_those_under_which_each_group_costs_as_much():
    batch = a_batch()
    loss = MMRLoss(GROUPS, 0.3, weights=[1.0, 0.5, 2.0], learn_weights=True)
    per_group = loss(**batch).per_group
    expected = sum(w * of - math.log(w) for w, of in zip([1, 0.5, 2], per_group, strict=True))
    torch.testing.assert_close(loss(**batch).loss, expected, rtol=1e-6, atol=0)
    loss(**batch).loss.backward()
    weights = loss.log_weights.detach().exp().double()
    torch.testing.assert_close(loss.log_weights.grad.double(), weights * per_group - 1)
    assert loss(**batch).also["weight/2x3"] == pytest.approx(0.5)


def test_refuses_to_learn_weights_from_0_on():
    with pytest.raises(UserError, match=r"start above 0, got \[1.0, 0.0, 2.0\]"):
        MMRLoss(GROUPS, weights=[1, 0, 2], learn_weights=True)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 1, -1], [0.0, 0, 0], [1, 1, math.nan], []])
def test_refuses_weights_that_do_not_fit_the_groups(weights):
    with pytest.raises(UserError, match="expected 3 loss weights"):
        MMRLoss(GROUPS, weights=weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b | {"positives": b["positives"][:5]}, "5 positives came with 6 rows of ans"),
        (
            lambda b: (
                without(b, "asks", "answers", "negative_answers")
                | {"positives": b["positives"][:5]}
            ),
            "positive_of must hold rows from 0 to 4, got 0 to 5",
        ),
        (
            lambda b: b | {"positive_of": torch.tensor([0, 0, 0, 0, 0, -1])},
            "positive_of must hold rows from 0 to 5, got -1 to 0",
        ),
        (lambda b: b | {"positive_of": torch.tensor([0])}, "6 queries came with 1 rows of posit"),
        (lambda b: b | {"negatives_of": b["negatives_of"][:1]}, "with 1 rows of negatives_of"),
        (
            lambda b: b | {"negatives_of": b["negatives_of"] + 1},
            "negatives_of must hold rows from -1 to 11, got 1 to 12",
        ),
        (lambda b: b | {"asks": b["asks"][:4]}, "with 4 rows of asks"),
        (lambda b: {name: x[:0] for name, x in b.items()}, "the batch is empty"),
        (lambda b: without(b, "asks"), "asks and answers come together"),
        (lambda b: without(b, "answers"), "asks and answers come together"),
        (lambda b: without(b, "asks", "answers"), "negative_answers needs"),
        (lambda b: without(b, "negatives"), "0 hard negatives came with 12 rows of negative_ans"),
        (
            lambda b: without(b, "negatives", "negative_answers"),
            "negatives and negatives_of come together",
        ),
        (
            lambda b: b | {"negative_answers": b["negative_answers"][:1]},
            "12 hard negatives came with 1 rows of negative_answers",
        ),
    ],
)
def test_refuses_a_batch_that_does_not_fit_together(change, message):
    with shapes_unchecked(), pytest.raises(UserError, match=message):
        MMRLoss(GROUPS)(**change(a_batch()))


@pytest.mark.parametrize("num_rows", [None, 2], ids=["at_once", "in_blocks"])
def test_recall_is_the_share_of_queries_whose_positive_is_on_top(num_rows, monkeypatch):
    queries, positives = vectors(9, 3, 4), vectors(9, 5, 4, seed=1)
    positives[:5, :3] = queries[:5]  # found at every group; the others are left to chance
    negatives = vectors(9, 5, 4, seed=3)
    negatives[0, :3] = queries[0]  # as good as the positive, and it answers the query, too
    negatives[1, :3], positives[1] = queries[1], vectors(5, 4, seed=4)  # better than the positive
    ids = torch.arange(9)[:, None]
    negative_answers = torch.where(ids == 0, 0, 100)
    if num_rows:
        per_row = len(GROUPS) * len(positives)
        monkeypatch.setattr(loss_module, "CPU_BLOCK_ELEMENTS", num_rows * per_row)
    found = MMRLoss(GROUPS)(
        queries,
        positives,
        negatives,
        negatives_of=ids,
        asks=ids,
        answers=ids,
        negative_answers=negative_answers,
    ).recall
    for group, share in zip(GROUPS, found.tolist(), strict=True):
        on_top = 0
        for i, query in enumerate(queries[:, : group.r_q]):
            scores = [
                sum(max(float(q @ c) for c in candidate[: group.r_c]) for q in query)
                for candidate in [*positives, *([negatives[i]] if i else [])]
            ]
            on_top += scores.index(max(scores)) == i
        assert share == pytest.approx(on_top / 9), group
        assert 4 / 9 <= share < 1
