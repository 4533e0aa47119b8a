"""Row plans against loops written from the definitions: order, positions, visibility."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from retrofit.adapters.rows import MASK, Block, RowPlan, SequenceRows
from retrofit.adapters.visibility import Chunk, Group, Window


class Row(NamedTuple):
    """One row, from the definition. block: (sequence, number of the block) or None for a base row."""

    sequence: int
    position: int
    token: int
    block: tuple[int, int] | None
    start: int
    """Of its block: it sees base K/V of positions before this."""


def defined_rows(sequences: Sequence[SequenceRows]) -> list[Row]:
    """[all base rows | all draft rows], sequence by sequence."""
    rows = [
        Row(s, seq.start + i, token, None, 0) for s, seq in enumerate(sequences) for i, token in enumerate(seq.tokens)
    ]
    for s, seq in enumerate(sequences):
        for number, block in enumerate(seq.blocks):
            for i, token in enumerate(block.inputs):
                rows.append(Row(s, block.start + i, token, (s, number), block.start))
    return rows


def within(position: int, other: int, window: Window | None) -> bool:
    """Whether two positions are near enough to each other."""
    if isinstance(window, Chunk):
        return position // window.size == other // window.size
    return window is None or abs(position - other) < window


def sees_base(row: Row, position: int, window: Window | None) -> bool:
    """Whether `row` sees the base K/V of its own sequence at `position`."""
    if row.block is None:
        visible = position <= row.position
    else:
        visible = position < row.start
    return visible and within(row.position, position, window)


def sees_draft(row: Row, other: Row, causal: bool, window: Window | None) -> bool:
    """Whether draft row `row` sees draft row `other`."""
    if row.block is None or other.block is None or row.block != other.block:
        return False
    if causal and other.position > row.position:
        return False
    return within(row.position, other.position, window)


def random_sequences(rng: random.Random) -> list[SequenceRows]:
    """Ragged on purpose: base rows only, blocks only, both, several blocks of different lengths, prompts from 0."""
    sequences = []
    for slot in rng.sample(range(8), rng.randint(1, 4)):
        start = rng.choice([0, 0, rng.randint(1, 20)])
        tokens = [rng.randrange(64) for _ in range(rng.choice([0, 1, 1, 3, 9]))]
        blocks = []
        for _ in range(rng.choice([0, 1, 1, 3])):
            anchor = start + rng.randint(0, len(tokens))
            blocks.append(Block(anchor, [rng.choice([MASK, rng.randrange(64)]) for _ in range(rng.randint(1, 5))]))
        if tokens or blocks:
            sequences.append(SequenceRows(slot, start, tokens, blocks, bool(tokens) and rng.random() < 0.3))
    return sequences or [SequenceRows(0, 0, [1])]


CASES = range(60)
WINDOWS = (None, 1, 3, 8, Chunk(1), Chunk(5))


@pytest.mark.parametrize("case", CASES)
def test_order_positions_inputs_and_logit_rows(case: int) -> None:
    sequences = random_sequences(random.Random(case))
    rows, plan = defined_rows(sequences), RowPlan(sequences)
    assert plan.num_rows == len(rows)
    assert plan.num_base == sum(row.block is None for row in rows)
    assert plan.positions.tolist() == [[row.position for row in rows]]
    assert plan.max_position == max(row.position for row in rows)
    assert plan.ids.tolist() == [max(row.token, 0) for row in rows]
    masked = [n for n, row in enumerate(rows) if row.token == MASK]
    assert ([] if plan.masked is None else plan.masked.tolist()) == masked
    base = rows[: plan.num_base]
    assert plan.base_slots.tolist() == [sequences[row.sequence].slot for row in base]
    assert plan.base_positions.tolist() == [row.position for row in base]
    wanted = [
        n
        for n, row in enumerate(base)
        if not sequences[row.sequence].last_logits_only
        or row.position == sequences[row.sequence].start + len(sequences[row.sequence].tokens) - 1
    ]
    assert (list(range(len(base))) if plan.logit_rows is None else plan.logit_rows.tolist()) == wanted


def additive(mask: Tensor | None, shape: tuple[int, ...]) -> np.ndarray:
    """Whether a key is visible, of an additive mask."""
    if mask is None:
        return np.ones(shape, dtype=bool)
    assert set(mask.unique().tolist()) <= {0.0, float("-inf")}
    return (mask[:, 0] == 0).numpy()


def places(group: Group, rows: list[Row], order: list[int]) -> Iterator[tuple[int, int, Row]]:
    """(s, t, row): where the rectangle of an attention call has each row."""
    numbers = torch.arange(len(rows))[:, None, None]
    rectangle = group.rectangle(numbers)[:, 0, :, 0]
    assert group.flatten(rectangle[:, None, :, None].clone())[:, 0, 0].tolist() == list(range(len(rows)))
    taken = set()
    for s in range(rectangle.shape[0]):
        for t in range(rectangle.shape[1]):
            row = rows[int(rectangle[s, t])]
            if row.sequence == order[s] and row not in taken:
                taken.add(row)
                yield s, t, row
    assert len(taken) == len(set(rows))


@pytest.mark.parametrize("case", CASES)
def test_base_visibility(case: int) -> None:
    for window in WINDOWS:
        base_visibility(case, window)


def base_visibility(case: int, window: Window | None) -> None:
    sequences = random_sequences(random.Random(case))
    plan = RowPlan(sequences)
    rows = defined_rows(sequences)[: plan.num_base]
    if plan.base is None:
        assert not rows
        return
    order = [s for s, seq in enumerate(sequences) if seq.tokens]
    assert plan.base.slots == [sequences[s].slot for s in order]
    mask, causal = plan.base_mask(window, torch.float32)
    seen = additive(mask, (len(order), plan.base.width, plan.base.keys))
    if causal:
        seen = np.tril(np.ones((plan.base.width, plan.base.keys), dtype=bool))[None].repeat(len(order), 0)
    assert seen.any(-1).all(), "a row without a key would be 0 / 0"
    for s, t, row in places(plan.base, rows, order):
        want = [sees_base(row, k, window) for k in range(plan.base.keys)]
        assert seen[s, t].tolist() == want
        assert row.position < plan.base.keys


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_draft_visibility(case: int, causal: bool) -> None:
    for window in WINDOWS:
        draft_visibility(case, window, causal)


def draft_visibility(case: int, window: Window | None, causal: bool) -> None:
    sequences = random_sequences(random.Random(case))
    plan = RowPlan(sequences, causal_blocks=causal)
    rows = defined_rows(sequences)[plan.num_base :]
    if plan.draft is None:
        assert not rows
        return
    order = [s for s, seq in enumerate(sequences) if seq.blocks]
    keys, width = plan.draft.keys, plan.draft.width
    seen = additive(plan.draft_mask(window, torch.float32), (len(order), width, keys + width))
    where = {(s, t): row for s, t, row in places(plan.draft, rows, order)}
    for (s, t), row in where.items():
        base = [sees_base(row, k, window) for k in range(keys)]
        assert seen[s, t, :keys].tolist() == base
        assert all(not sees_base(row, k, window) for k in range(keys, row.start + 5))
        for u in range(width):
            other = where.get((s, u))
            want = other is not None and sees_draft(row, other, causal, window)
            assert bool(seen[s, t, keys + u]) is want


def random_tree(rng: random.Random) -> list[SequenceRows]:
    """Sequences whose base rows branch, some with blocks on any of them, beside plain chains."""
    sequences = []
    for slot in rng.sample(range(8), rng.randint(1, 3)):
        start, count = rng.randint(1, 12), rng.randint(1, 9)
        parents = [-1] + [rng.randrange(j) for j in range(1, count)] if rng.random() < 0.8 else None
        line = range(-1, count - 1) if parents is None else parents
        depth: list[int] = []
        for parent in line:
            depth.append(0 if parent < 0 else depth[parent] + 1)
        hung = sorted(rng.sample(range(count), rng.randint(0, min(3, count))))
        blocks = [Block(start + depth[j] + 1, [MASK] * rng.randint(1, 4), anchor=j) for j in hung]
        tokens = [rng.randrange(64) for _ in range(count)]
        sequences.append(SequenceRows(slot, start, tokens, blocks, parents=parents))
    if all(seq.parents is None for seq in sequences):
        sequences.append(SequenceRows(9, 3, [1, 2, 3], [], parents=[-1, 0, 0]))
    return sequences


def path_to(seq: SequenceRows, row: int) -> list[int]:
    """Base rows from the first down to `row`."""
    line = range(-1, len(seq.tokens) - 1) if seq.parents is None else seq.parents
    path = [row]
    while line[path[-1]] >= 0:
        path.append(line[path[-1]])
    return path[::-1]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("case", CASES[::3])
def test_tree_visibility(case: int, causal: bool) -> None:
    """A row sees the cache below the sequence's start, its own ancestors, and (draft rows) its own block."""
    for window in WINDOWS:
        tree_visibility(case, window, causal)


def tree_visibility(case: int, window: Window | None, causal: bool) -> None:
    sequences = random_tree(random.Random(case))
    plan = RowPlan(sequences, causal_blocks=causal)
    positions = plan.positions[0].tolist()
    assert plan.tree and plan.base is not None
    mask, lower_triangle = plan.base_mask(window, torch.float32)
    assert not lower_triangle
    keys, width = plan.base.keys, plan.base.width
    seen = additive(mask, (len(sequences), width, keys + width))
    first = 0
    for s, seq in enumerate(sequences):
        for t in range(len(seq.tokens)):
            path = path_to(seq, t)
            q = seq.start + len(path) - 1
            assert positions[first + t] == q
            near = [within(q, k, window) for k in range(q + 1)]
            want = [k < seq.start and k < len(near) and near[k] for k in range(keys)]
            want += [r in path and near[seq.start + path.index(r)] for r in range(width)]
            assert seen[s, t].tolist() == want
        first += len(seq.tokens)
    if plan.draft is None:
        return
    mask = plan.draft_mask(window, torch.float32)
    rows = plan.draft.width
    seen = additive(mask, (len(sequences), rows, keys + width + rows))
    for s, seq in enumerate(sequences):
        of_row = [(block, i) for block in seq.blocks for i in range(len(block.inputs))]
        for t, (block, i) in enumerate(of_row):
            path, q = path_to(seq, block.anchor), block.start + i
            assert block.start == seq.start + len(path)
            near = [within(q, k, window) for k in range(q + 1)]
            want = [k < seq.start and near[k] for k in range(keys)]
            want += [r in path and near[seq.start + path.index(r)] for r in range(width)]
            for other, o in of_row:
                visible = other is block and not (causal and o > i)
                want.append(visible and within(q, block.start + o, window))
            want += [False] * (rows - len(of_row))
            assert seen[s, t].tolist() == want
