"""What a block is judged by: targets, weights, anchors, worked out by hand."""

from collections.abc import Sequence

import numpy as np
import pytest

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block
from retrofit.recipes.text.sources import document_rng
from retrofit.recipes.training.blocks import (
    BlockBatch,
    add_sequence,
    choose_anchors,
    eligible_anchors,
    gap_layout,
    gaps,
    longest_gap,
    missed_anchors,
)


def judged(layout: DraftLayout, anchor: int, response: Sequence[bool], diffusion: bool = False) -> BlockBatch:
    tokens = [10, 11, 12, 13, 14, 15]
    batch = BlockBatch(layout, 64)
    add_sequence(batch, tokens, response, [anchor], 100, document_rng(0, 0, "a"), 64, diffusion)
    return batch


def test_targets_by_hand() -> None:
    """Text 10..15 at positions 0..5, clean rows from 100 on; the block of anchor 1 stands at 2 3 4 5."""
    batch = judged(DraftLayout(4), 1, [True] * 6)
    assert batch.sequences == [[Block(2, [MASK] * 4)]]
    assert batch.source[0].tolist() == [102, 103, 104, 105]
    assert batch.previous[0].tolist() == [12, 13, 14, 15]
    assert batch.target[0][:3].tolist() == [13, 14, 15]
    assert batch.eligible[0].tolist() == [True, True, True, False], "nothing follows the last token"

    batch = judged(DraftLayout(4, seed_row="draft"), 1, [True] * 6)
    assert batch.sequences == [[Block(1, [11, MASK, MASK, MASK])]]
    assert batch.source[0].tolist() == [101, 102, 103, 104]
    assert (batch.previous[0].tolist(), batch.target[0].tolist()) == ([11, 12, 13, 14], [12, 13, 14, 15])
    assert batch.eligible[0].all()

    batch = judged(DraftLayout(4, seed_row="draft", shift=0), 1, [True] * 6)
    assert batch.sequences == [[Block(1, [11, MASK, MASK, MASK])]]
    assert batch.source[0].tolist() == [101, 102, 103], "the row at 2 proposes 12, as the base row at 1 does"
    assert (batch.previous[0].tolist(), batch.target[0].tolist()) == ([11, 12, 13], [12, 13, 14])


def test_the_end_of_a_document_is_drafted_and_nothing_beyond_it() -> None:
    batch = judged(DraftLayout(4), 3, [True] * 6)
    assert batch.sequences == [[Block(4, [MASK, MASK])]], "rows stay inside the document"
    assert batch.eligible[0].tolist() == [True, False, False, False]
    assert batch.target[0][0] == 15, "the last token (EOS) is a target"
    assert judged(DraftLayout(4), 5, [True] * 6).sequences == [[]]
    assert len(judged(DraftLayout(4), 5, [True] * 6)) == 0


def test_only_response_tokens_are_targets() -> None:
    response = [False, False, False, True, True, False]
    assert eligible_anchors(response).tolist() == [2, 3], "the last prompt token and response tokens"
    batch = judged(DraftLayout(4), 1, response)
    assert batch.eligible[0].tolist() == [True, True, False, False]


@pytest.mark.parametrize("layout", [DraftLayout(6), DraftLayout(6, shift=0, seed_row="draft")], ids=["1", "0"])
def test_l_diff_weights(layout: DraftLayout) -> None:
    """m of K - 1 tokens masked, m uniform; (K - 1) / m on each predicting row; a masked left neighbour is unknown."""
    counts: dict[int, int] = {}
    tokens = list(range(40))
    rng = document_rng(0, 0, "a")
    batch = BlockBatch(layout, 64)
    add_sequence(batch, tokens, [True] * 40, [3] * 1000, 0, rng, 64, True)
    for block, weight, previous, target, eligible in zip(
        batch.sequences[0], batch.weight, batch.previous, batch.target, batch.eligible, strict=True
    ):
        masked = [i for i, token in enumerate(block.inputs) if token == MASK]
        m = len(masked)
        counts[m] = counts.get(m, 0) + 1
        assert 0 not in masked and 1 <= m <= 5
        rows = [i - layout.shift - layout.first_drafting_row for i in masked]
        want = np.zeros(layout.drafts)
        want[rows] = 5 / m
        np.testing.assert_allclose(weight, want)
        assert eligible[rows].all() and target[rows].tolist() == [tokens[block.start + i] for i in masked]
        for row, i in zip(rows, masked, strict=True):
            assert previous[row] == (64 if i - 1 in masked else tokens[block.start + i - 1])
        assert eligible.sum() == 5, "the denominator counts every token that could have been masked"
    assert all(150 < counts[m] < 250 for m in range(1, 6))


@pytest.mark.parametrize("layout", [DraftLayout(4), DraftLayout(4, shift=0, seed_row="draft")], ids=["1", "0"])
def test_gap_blocks_end_in_text_that_is_there(layout: DraftLayout) -> None:
    """16 rows: the seed, a gap of 1 to 8 tokens of which some are masked still, and the text behind; weight 15 / m."""
    wide, tokens, furthest = gap_layout(layout), list(range(60)), 0
    batch = BlockBatch(wide, 64)
    add_sequence(batch, tokens, [True] * 60, [3] * 400, 0, document_rng(0, 0, "a"), 64, True, gap=True)
    for block, weight, eligible in zip(batch.sequences[0], batch.weight, batch.eligible, strict=True):
        masked = [i for i, token in enumerate(block.inputs) if token == MASK]
        known = [i for i in range(16) if i not in masked]
        assert [block.inputs[i] for i in known] == [tokens[block.start + i] for i in known]
        assert len(block.inputs) == 16 and min(masked) >= 1 and max(masked) <= longest_gap(16) == 8
        furthest = max(furthest, max(masked))
        want = np.zeros(wide.drafts)
        want[[i - wide.shift - wide.first_drafting_row for i in masked]] = 15 / len(masked)
        np.testing.assert_allclose(weight, want, rtol=1e-6)
        assert eligible.sum() == 15
    assert furthest == 8


def test_gap_blocks_take_the_rows_of_four() -> None:
    assert gaps(16, 0.0) == (0, 16)
    assert gaps(16, 0.5) == (2, 8)
    assert gaps(16, 1.0) == (4, 0)
    assert gaps(3, 0.1) == (1, 0), "a share has one"
    assert gaps(0, 0.5) == (0, 0)


def test_missed_anchors_are_where_decoding_hangs_its_next_block() -> None:
    layout = DraftLayout(4)
    batch = BlockBatch(layout, 64)
    add_sequence(batch, list(range(12)), [True] * 12, [2, 6], 0, document_rng(0, 0, "a"), 64, False)
    # Anchor 2: block at 3..6 drafts 4 5 6 7 and gets 4, misses 5, so base row 4 emits it and is the next anchor.
    best = np.array([[4, 0, 0, 7], [8, 9, 10, 11]])
    assert missed_anchors(batch, best, 1) == [[4]]


def test_blocks_are_keyed_by_seed_epoch_and_document() -> None:
    draws = {
        key: choose_anchors(np.arange(200), 8, document_rng(*key)).tolist()
        for key in [(0, 0, "a"), (1, 0, "a"), (0, 1, "a"), (0, 0, "b")]
    }
    assert len({tuple(v) for v in draws.values()}) == 4
    assert draws[(0, 0, "a")] == choose_anchors(np.arange(200), 8, document_rng(0, 0, "a")).tolist()
