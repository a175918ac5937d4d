"""Budgets: what can be written, what is nested, what a model can serve."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metaembed_pl.budget import PAPER_GROUPS, Budget, check_budget, parse_groups
from metaembed_pl.errors import UserError

counts = st.integers(1, 10_000)


@given(counts, counts, st.none() | counts)
def test_a_budget_survives_being_printed(r_q, r_c, width):
    assert Budget.parse(str(Budget(r_q, r_c, width))) == (r_q, r_c, width)


@pytest.mark.parametrize("value", ["4x8", " 4 X 8 ", [4, 8], (4, 8), Budget(4, 8)])
def test_reads_every_way_to_write_a_budget(value):
    assert Budget.parse(value) == Budget(r_q=4, r_c=8)


@pytest.mark.parametrize("value", ["4x8x64", " 4 X 8x64 ", [4, 8, 64], Budget(4, 8, 64)])
def test_reads_a_width_behind_the_counts(value):
    assert Budget.parse(value) == Budget(r_q=4, r_c=8, width=64)


def test_whole_vectors_are_written_as_ever():
    """Versions of indexes are made of this text."""
    assert repr([Budget(4, 8), Budget(4, 8, 64)]) == (
        "[Budget(r_q=4, r_c=8), Budget(r_q=4, r_c=8, width=64)]"
    )


@pytest.mark.parametrize(
    "value", "  4 4x x8 4x8x 4x8x0 4x8x2x1 -4x8 4x8.5 axb 0x8 4x0 ४x8".split(" ")
)  # fmt: skip
def test_refuses_a_text_that_is_no_budget_and_repeats_it(value):
    with pytest.raises(UserError) as error:
        Budget.parse(value)
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    "value", [[4], [4, 8, 2, 1], [4, 8, 0], [4.0, 8], [0, 1], [True, 1], ["4", "8"], 4, None]
)  # fmt: skip
def test_refuses_what_is_no_budget_and_repeats_it(value):
    with pytest.raises(UserError) as error:
        Budget.parse(value)
    assert repr(value) in str(error.value)


def test_the_groups_of_the_paper_are_nested():
    assert parse_groups(map(str, PAPER_GROUPS)) == PAPER_GROUPS


@pytest.mark.parametrize("values", [["1x1"], ["4x8"], ["1x4", "2x4"], ["2x1", "2x4"]])
def test_one_side_may_stay_as_it_is(values):
    assert [str(group) for group in parse_groups(values)] == values


@pytest.mark.parametrize("values", [["2x4", "1x1"], ["1x4", "2x2"], ["2x4", "2x4"]])
def test_refuses_groups_that_are_not_nested_and_names_both(values):
    with pytest.raises(UserError, match=f"{values[0]} is not contained in {values[1]}"):
        parse_groups(values)


@pytest.mark.parametrize("values", [[], (), "1x1"])
def test_refuses_groups_that_are_no_list(values):
    with pytest.raises(UserError, match="groups"):
        parse_groups(values)


@pytest.mark.parametrize("budget", ["1x1", "16x64", "16x1", "2x64", (8, 4)])
def test_serves_counts_of_different_groups_together(budget):
    assert check_budget(budget, PAPER_GROUPS) == Budget.parse(budget)


@pytest.mark.parametrize(
    ("budget", "message"),
    [("3x8", "3 query vectors; choose one of 1, 2, 4, 8, 16"), ("4x128", "of 1, 4, 8, 16, 64")],
)
def test_refuses_a_count_that_was_never_trained_and_names_the_trained(budget, message):
    with pytest.raises(UserError, match=message):
        check_budget(budget, PAPER_GROUPS)


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([64, 32], "4x8x16: the model was not trained at width 16; choose one of 64, 32, or leave"),
        ([], "4x8x16: the model was not trained at width 16; leave the width out"),
    ],
)
def test_refuses_a_width_that_was_never_trained_and_names_the_trained(widths, message):
    assert check_budget("4x8", PAPER_GROUPS, widths) == Budget(4, 8)
    with pytest.raises(UserError, match=message):
        check_budget("4x8x16", PAPER_GROUPS, widths)


def test_groups_have_no_width_and_say_where_widths_are_trained():
    with pytest.raises(UserError, match=r"4x8x64 .* write 4x8, .* model.loss.widths: \[64\]"):
        parse_groups(["1x1", "4x8x64"])
