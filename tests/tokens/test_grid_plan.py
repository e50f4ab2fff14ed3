"""The grid refuses what is no grid; a plan partitions the tokens and says where each one goes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plans import plan_keeping
from tofu_diffusers.tokens.grid import TokenGrid
from tofu_diffusers.tokens.plan import Plan, complement, highest, make_plan, positions_of

QUICK = settings(max_examples=40, deadline=None, derandomize=True)


def random_plan(batch: int, tokens: int, slots: int, seed: int) -> Plan:
    """Any plan at all: random kept positions, random matches among them."""
    g = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(tokens, generator=g) for _ in range(batch)])
    kept = order[:, :slots].sort(dim=1).values
    match = kept.gather(1, torch.randint(slots, (batch, tokens), generator=g))
    return plan_keeping(kept, match)


def test_tokens_counts_the_image_only() -> None:
    assert TokenGrid(3, 5).tokens == 15
    assert TokenGrid(3, 5, frames=7, text_before=77, text_after=4).tokens == 105


@pytest.mark.parametrize(
    ("sides", "said"),
    [
        ({"height": 0, "width": 4}, "height is 0, below 1"),
        ({"height": 4, "width": -2}, "width is -2, below 1"),
        ({"height": 4, "width": 4, "frames": 0}, "frames is 0, below 1"),
        ({"height": 4, "width": 4, "text_after": -1}, "text_after is -1, below 0"),
        ({"height": 4.0, "width": 4}, "height is 4.0, not an int"),
        ({"height": 4, "width": True}, "width is True, not an int"),
    ],
)
def test_a_bad_grid_is_refused_with_its_number(sides: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        TokenGrid(**sides)


@QUICK
@given(st.integers(1, 3), st.integers(1, 30), st.data())
def test_plan_parts_fit_together(batch: int, tokens: int, data: st.DataObject) -> None:
    slots = data.draw(st.integers(1, tokens))
    plan = random_plan(batch, tokens, slots, data.draw(st.integers(0, 99)))
    plan.check()
    sizes, removed = plan.sizes(), plan.removed()
    assert sizes.shape == (batch, slots) and (sizes.sum(1) == tokens).all()
    for b in range(batch):
        groups = plan.assign[b].tolist()
        assert sizes[b].tolist() == [groups.count(k) for k in range(slots)]
        assert sorted(plan.kept[b].tolist() + removed[b].tolist()) == list(range(tokens))
        assert removed[b].tolist() == sorted(removed[b].tolist())
        assert plan.is_kept()[b].nonzero().flatten().tolist() == plan.kept[b].tolist()
    assert torch.equal(removed, complement(plan.kept, tokens))


def test_rows_spread_and_repeat() -> None:
    plan, x = random_plan(2, 9, 4, 0), torch.randn(2, 9, 3)
    rows = plan.rows(x)
    for b in range(2):
        assert torch.equal(rows[b], x[b, plan.kept[b]])
        assert torch.equal(plan.broadcast(rows)[b], rows[b, plan.assign[b]])
    twice = plan.repeat(2)
    twice.check()
    assert torch.equal(twice.rows(x.repeat(2, 1, 1)), rows.repeat(2, 1, 1))


def test_plan_is_a_pytree() -> None:
    plan = random_plan(1, 5, 2, 0)
    again = torch.utils._pytree.tree_map(torch.clone, plan)
    assert isinstance(again, Plan) and torch.equal(again.assign, plan.assign)


def test_what_match_says_of_kept_tokens_is_ignored() -> None:
    plan = plan_keeping(torch.tensor([[1, 3]]), torch.tensor([[3, 0, 1, 0]]))
    assert plan.assign.tolist() == [[1, 0, 0, 1]]


def test_without_matches_all_go_to_the_first_that_is_kept() -> None:
    keep = torch.tensor([[False, True, False, True], [True, False, True, False]])
    plan = make_plan(keep, None, 2)
    plan.check()
    assert plan.kept.tolist() == [[1, 3], [0, 2]]
    assert plan.assign.tolist() == [[0, 0, 0, 1], [0, 0, 1, 0]]


@QUICK
@given(st.integers(1, 3), st.integers(1, 40), st.integers(1, 5), st.integers(0, 999), st.data())
def test_the_highest_are_those_of_a_stable_sort(
    batch: int, tokens: int, levels: int, seed: int, data: st.DataObject
) -> None:
    """Few levels, so many are equal; one may be without number, one without bound."""
    count = data.draw(st.integers(1, tokens))
    g = torch.Generator().manual_seed(seed)
    score = torch.randint(levels, (batch, tokens), generator=g).float()
    for row, column in torch.randint(min(batch, tokens), (2, 2), generator=g).tolist():
        score[row, column] = float(data.draw(st.sampled_from(["nan", "inf", "-inf"])))
    order = score.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=-float("inf"))
    first = order.argsort(dim=1, descending=True, stable=True)[:, :count]
    flags = highest(score, count)
    assert (flags.sum(1) == count).all()
    assert torch.equal(positions_of(flags, count), first.sort(dim=1).values)


@pytest.mark.parametrize(
    ("kept", "assign", "said"),
    [
        ([[2, 1]], [[0, 1, 0]], "ascend"),
        ([[1, 1]], [[0, 1, 0]], "ascend"),
        ([[1, 3]], [[0, 0, 1]], "outside 0..2"),
        ([[0, 2]], [[0, 2, 1]], "slot outside 0..1"),
        ([[0, 2]], [[1, 0, 1]], "another slot"),
        ([[0, 1, 2, 3]], [[0, 1, 2]], "keeps 4 of 3"),
        ([[0], [0]], [[0, 0]], "one batch"),
    ],
)
def test_check_finds_a_broken_plan(kept: list, assign: list, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Plan(torch.tensor(kept), torch.tensor(assign)).check()


def test_check_refuses_other_index_types() -> None:
    with pytest.raises(ValueError, match="int64"):
        Plan(torch.tensor([[0]], dtype=torch.int32), torch.tensor([[0, 0]])).check()
