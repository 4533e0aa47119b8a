"""Plans of fixed strategies, and plans cut to so many rows; by hand.  (Rows themselves: test_rows.py.)"""

from typing import Any

import pytest

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK
from retrofit.runtime.plan import (
    AR,
    Limits,
    StepPlan,
    cut,
    cut_cycle,
    draft_block,
    fixed_cycle,
    fused,
    noise_token,
    num_rows,
    planned,
    two_forward,
)
from retrofit.runtime.request import Request
from retrofit.runtime.rules.tree import DraftTree

BLOCK = DraftLayout(block=4)
TREE = DraftTree((-1, 0, 1, 0), (0, 0, 0, 1), (1.0, 0.5, 0.3, 0.2))  # its path ends at rows 0..3 with .3, .2, .3, .2


@pytest.mark.parametrize(
    ("plan", "rows", "left"),
    [
        (StepPlan(4, (0, 1, 2)), None, StepPlan(4, (0, 1, 2))),
        (StepPlan(4, (0, 1, 2)), 17, StepPlan(4, (0, 1, 2))),  # 1 + 4 + 3 * 4
        (StepPlan(4, (0, 1, 2)), 16, StepPlan(4, (0, 1))),  # blocks go first
        (StepPlan(4, (0, 1, 2)), 9, StepPlan(4, (0,))),
        (StepPlan(4, (0, 1, 2)), 8, StepPlan(3, (0,))),  # then drafts, beside a last block
        (StepPlan(4, (3, 4)), 9, StepPlan(4, (3,))),
        (StepPlan(4, (3, 4)), 7, StepPlan(2)),  # of accept lengths that cannot come true no block is run
        (StepPlan(4, (0,)), 4, StepPlan(3)),  # no room for any block
        (StepPlan(4), 3, StepPlan(2)),
        (StepPlan(4), 1, StepPlan(0)),
        (StepPlan(0, (0,)), 5, StepPlan(0, (0,))),
        (StepPlan(0, (0,)), 4, StepPlan(0)),
        (StepPlan(0), 1, StepPlan(0)),
    ],
    ids=str,
)
def test_a_plan_cut_to_so_many_rows(plan: StepPlan, rows: int | None, left: StepPlan) -> None:
    assert cut(plan, BLOCK, rows) == left
    assert rows is None or num_rows(left, BLOCK) <= rows


@pytest.mark.parametrize(
    ("plan", "rows", "left"),
    [
        (StepPlan(4, "all", 4), 25, StepPlan(4, "all", 4)),  # 1 + 4 + 5 * 4
        (StepPlan(4, "all", 4), 24, StepPlan(4, 4, 4)),  # the likeliest four
        (StepPlan(4, "all", 4), 8, StepPlan(3, 1, 3)),  # no more is drafted than can be verified
        (StepPlan(4, "last", 4), 8, StepPlan(3, "last", 3)),
        (StepPlan(4, 2, 4), 12, StepPlan(4, 1, 4)),
        (StepPlan(4, 2, 4), 5, StepPlan(0, 2, 0)),
        (StepPlan(4, 9, 4), 25, StepPlan(4, 9, 4)),
        (StepPlan(0, "all", 4), 5, StepPlan(0, "all", 4)),
        (StepPlan(0, "all", 4), 4, StepPlan(0, (), 4)),
        (StepPlan(3, "all", 3, TREE), 13, StepPlan(3, 2, 3, TREE)),  # 1 + 3 + 2 * 4
    ],
    ids=str,
)
def test_a_plan_that_does_not_say_which_rows_yet(plan: StepPlan, rows: int, left: StepPlan) -> None:
    assert cut(plan, BLOCK, rows) == left


def test_a_cycle_cut_to_so_many_rows() -> None:
    assert cut_cycle(AR, BLOCK, 1) == AR
    assert cut_cycle(fused(4), BLOCK, None) == fused(4)
    assert cut_cycle(fused(4), BLOCK, 8) == (StepPlan(3, 1, 3),)
    assert cut_cycle(fused(4), BLOCK, 5) == two_forward(4), "nothing is verified beside a block, so in turn with it"
    assert cut_cycle(two_forward(4), BLOCK, 5) == two_forward(4)
    assert cut_cycle(fused(4), BLOCK, 4) == cut_cycle(two_forward(4), BLOCK, 4) == AR
    wide = DraftLayout(block=4, shift=0, seed_row="draft")
    assert cut_cycle(two_forward(wide.drafts), wide, 5) == two_forward(wide.drafts)


def test_a_block_that_holds_the_seed_needs_no_row_beside_it() -> None:
    layout = DraftLayout(4, seed_row="draft")
    assert cut(StepPlan(0, (0,)), layout, 4) == StepPlan(0, (0,))
    assert cut(StepPlan(0, (0,)), layout, 3) == StepPlan(0)
    assert cut(StepPlan(4), layout, 4) == StepPlan(3)


@pytest.mark.parametrize(
    ("strategy", "prepare", "state", "plan"),
    [
        ("ar", "all", {}, StepPlan(0)),
        ("prompt_lookup", "all", {"drafts": [5, 6, 7]}, StepPlan(3)),
        ("two_forward", "all", {}, StepPlan(0, (0,))),
        ("two_forward", "all", {"drafts": [5, 6, 7]}, StepPlan(3)),
        ("fused", "all", {}, StepPlan(0, (0,))),
        ("fused", "all", {"drafts": [5, 6, 7]}, StepPlan(3, (0, 1, 2, 3))),
        ("fused", "last", {"drafts": [5, 6, 7]}, StepPlan(3, (3,))),
        ("fused", "last", {}, StepPlan(0, (0,))),
        # lengths 0 to 3 with .2, .08, .648, .072
        ("fused", 2, {"drafts": [5, 6, 7], "confidence": [0.8, 0.9, 0.1]}, StepPlan(3, (0, 2))),
        ("fused", 1, {"drafts": [5, 6, 7], "confidence": [0.8, 0.9, 0.1]}, StepPlan(3, (2,))),
        # five tokens are left: after three accepted and a bonus one is left, for which no block is worth running
        ("fused", "all", {"drafts": [5, 6, 7], "max_new_tokens": 6}, StepPlan(3, (0, 1, 2))),
        ("fused", "all", {"drafts": [5, 6, 7], "max_new_tokens": 3}, StepPlan(1)),
        ("fused", "all", {"drafts": [5, 6, 7], "tree": TREE}, StepPlan(3, (0, 1, 2, 3))),
        ("fused", 2, {"drafts": [5, 6, 7], "tree": TREE}, StepPlan(3, (0, 2))),
        ("fused", 3, {"drafts": [5, 6, 7], "tree": TREE}, StepPlan(3, (0, 1, 2))),
    ],
    ids=str,
)
def test_what_a_strategy_does_next(strategy: str, prepare: Any, state: dict[str, Any], plan: StepPlan) -> None:
    request = Request(0, [1] * 4, 0, 50, frozenset(), slot=0)
    request.emit([1])
    for name, value in state.items():
        setattr(request, name, value)
    made = planned(fixed_cycle(strategy, prepare, BLOCK, request.tree), request, BLOCK, Limits(100))
    assert (made.verify, made.hang) == (plan.verify, plan.hang)


@pytest.mark.parametrize(
    ("layout", "start", "context", "rows"),
    [
        # ten tokens in all: the block after position 6 has the bonus at 7 before it, and drafts 8 and 9
        (DraftLayout(4, attention="causal"), 7, 99, 2),
        (DraftLayout(4, attention="causal"), 4, 99, 4),
        (DraftLayout(4, attention="causal"), 9, 99, 1),
        (DraftLayout(4), 7, 99, 4),  # bidirectional rows would see that some are missing
        (DraftLayout(4), 7, 9, 2),  # but there is no position beyond the context
        (DraftLayout(4, attention="causal", seed_row="draft"), 7, 99, 2),  # the seed drafts 8, its neighbour 9
        (DraftLayout(4, attention="causal", shift=0, seed_row="draft"), 7, 99, 3),  # 8 and 9 draft themselves
    ],
    ids=str,
)
def test_how_many_rows_a_block_has(layout: DraftLayout, start: int, context: int, rows: int) -> None:
    request = Request(0, [1] * 4, 3, 6, frozenset(), slot=0)
    block = draft_block(request, start, None, 2, layout, Limits(context), 64)
    assert (block.start, block.inputs, block.anchor) == (start, [MASK] * rows, 2)
    noisy = DraftLayout(**{**layout.to_dict(), "input": "noise"})
    noise = [noise_token(3, start + i, 64) for i in range(rows)]
    assert draft_block(request, start, None, 2, noisy, Limits(context), 64).inputs == noise
    assert draft_block(request, start, 5, -1, noisy, Limits(context), 64).inputs == [5, *noise[1:]]
