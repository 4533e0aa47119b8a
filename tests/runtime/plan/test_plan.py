"""Choices of fixed strategies, and choices cut to so many rows; by hand.  (Rows themselves: test_rows.py.)"""

from typing import Any

import pytest

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK
from retrofit.runtime.plan import Choice, Limits, draft_block, fitted, noise_token, speculative_choice
from retrofit.runtime.request import Request
from retrofit.runtime.rules.tree import Shape

BLOCK = DraftLayout(block=4)
TREE = Shape((-1, 0, 1, 0), (0, 0, 0, 1), (1.0, 0.5, 0.3, 0.2))  # its path ends at rows 0..3 with .3, .2, .3, .2


@pytest.mark.parametrize(
    ("choice", "rows", "cut"),
    [
        (Choice(4, (0, 1, 2)), None, Choice(4, (0, 1, 2))),
        (Choice(4, (0, 1, 2)), 17, Choice(4, (0, 1, 2))),  # 1 + 4 + 3 * 4
        (Choice(4, (0, 1, 2)), 16, Choice(4, (0, 1))),  # blocks go first
        (Choice(4, (0, 1, 2)), 9, Choice(4, (0,))),
        (Choice(4, (0, 1, 2)), 8, Choice(3, (0,))),  # then drafts, beside a last block
        (Choice(4, (3, 4)), 9, Choice(4, (3,))),
        (Choice(4, (3, 4)), 7, Choice(2)),  # of accept lengths that cannot come true no block is run
        (Choice(4, (0,)), 4, Choice(3)),  # no room for any block
        (Choice(4), 3, Choice(2)),
        (Choice(4), 1, Choice(0)),
        (Choice(0, (0,)), 5, Choice(0, (0,))),
        (Choice(0, (0,)), 4, Choice(0)),
        (Choice(0), 1, Choice(0)),
    ],
    ids=str,
)
def test_a_choice_cut_to_so_many_rows(choice: Choice, rows: int | None, cut: Choice) -> None:
    assert fitted(choice, BLOCK, rows) == cut


def test_a_block_that_holds_the_seed_needs_no_row_beside_it() -> None:
    layout = DraftLayout(4, seed_row="draft")
    assert fitted(Choice(0, (0,)), layout, 4) == Choice(0, (0,))
    assert fitted(Choice(0, (0,)), layout, 3) == Choice(0)
    assert fitted(Choice(4), layout, 4) == Choice(3)


@pytest.mark.parametrize(
    ("strategy", "prepare", "state", "choice"),
    [
        ("ar", "all", {}, Choice(0)),
        ("prompt_lookup", "all", {"drafts": [5, 6, 7]}, Choice(3)),
        ("two_forward", "all", {}, Choice(0, (0,))),
        ("two_forward", "all", {"drafts": [5, 6, 7]}, Choice(3)),
        ("fused", "all", {}, Choice(0, (0,))),
        ("fused", "all", {"drafts": [5, 6, 7]}, Choice(3, (0, 1, 2, 3))),
        ("fused", "last", {"drafts": [5, 6, 7]}, Choice(3, (3,))),
        ("fused", "last", {}, Choice(0, (0,))),
        # lengths 0 to 3 with .2, .08, .648, .072
        ("fused", 2, {"drafts": [5, 6, 7], "confidence": [0.8, 0.9, 0.1]}, Choice(3, (0, 2))),
        ("fused", 1, {"drafts": [5, 6, 7], "confidence": [0.8, 0.9, 0.1]}, Choice(3, (2,))),
        # five tokens are left: after three accepted and a bonus one is left, for which no block is worth running
        ("fused", "all", {"drafts": [5, 6, 7], "max_new_tokens": 6}, Choice(3, (0, 1, 2))),
        ("fused", "all", {"drafts": [5, 6, 7], "max_new_tokens": 3}, Choice(1)),
        ("fused", "all", {"drafts": [5, 6, 7], "shape": TREE}, Choice(3, (0, 1, 2, 3))),
        ("fused", 2, {"drafts": [5, 6, 7], "shape": TREE}, Choice(3, (0, 2))),
        ("fused", 3, {"drafts": [5, 6, 7], "shape": TREE}, Choice(3, (0, 1, 2))),
    ],
    ids=str,
)
def test_what_a_strategy_does_next(strategy: str, prepare: Any, state: dict[str, Any], choice: Choice) -> None:
    request = Request(0, [1] * 4, 0, 50, frozenset(), slot=0)
    request.emit([1])
    for name, value in state.items():
        setattr(request, name, value)
    assert speculative_choice(request, strategy, prepare, BLOCK, Limits(100)) == choice


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
