"""Row plans against loops written from the definitions: order, positions, visibility; and which rows are planned."""

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK, Block, Group, RowPlan, SequenceRows
from retrofit.runtime.plan import (
    Limits,
    StepPlan,
    diffusion_rows,
    fixed_cycle,
    likeliest_lengths,
    looked_up,
    max_verify,
    new_block,
    noise_token,
    planned,
    speculative_rows,
    useful,
)
from retrofit.runtime.request import Request


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


def sees_base(row: Row, position: int, window: int | None) -> bool:
    """Whether `row` sees the base K/V of its own sequence at `position`."""
    if row.block is None:
        visible = position <= row.position
    else:
        visible = position < row.start
    return visible and (window is None or row.position - position < window)


def sees_draft(row: Row, other: Row, causal: bool, window: int | None) -> bool:
    """Whether draft row `row` sees draft row `other`."""
    if row.block is None or other.block is None or row.block != other.block:
        return False
    if causal and other.position > row.position:
        return False
    return window is None or abs(row.position - other.position) < window


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
WINDOWS = (None, 1, 3, 8)


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


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("case", CASES)
def test_base_visibility(case: int, window: int | None) -> None:
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
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("case", CASES)
def test_draft_visibility(case: int, window: int | None, causal: bool) -> None:
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
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("case", CASES[::3])
def test_tree_visibility(case: int, window: int | None, causal: bool) -> None:
    """A row sees the cache below the sequence's start, its own ancestors, and (draft rows) its own block."""
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
            near = [window is None or q - k < window for k in range(q + 1)]
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
            near = [window is None or q - k < window for k in range(q + 1)]
            want = [k < seq.start and near[k] for k in range(keys)]
            want += [r in path and near[seq.start + path.index(r)] for r in range(width)]
            for other, o in of_row:
                distance = abs(i - o)
                visible = other is block and not (causal and o > i)
                want.append(visible and (window is None or distance < window))
            want += [False] * (rows - len(of_row))
            assert seen[s, t].tolist() == want


# Which rows a request runs

LAYOUTS = [
    DraftLayout(block, fill, attention, shift, seed_row)
    for block in (1, 3, 8)
    for fill in ("mask", "noise")
    for attention in ("bidirectional", "causal")
    for shift, seed_row in ((1, "base"), (1, "draft"), (0, "draft"))
    if block > 1 or shift == 1
]


def random_request(rng: random.Random, layout: DraftLayout, limits: Limits) -> Request:
    """Some way into a generation, with as many drafts as a block may have left it."""
    prompt = [rng.randrange(64) for _ in range(rng.randint(1, limits.context - 1))]
    budget = rng.randint(1, limits.context - len(prompt))
    request = Request(0, prompt, rng.randrange(99), budget, frozenset(), slot=0)
    emitted = rng.randint(1, budget)
    request.emit([rng.randrange(64) for _ in range(emitted)])
    request.finish_reason = None
    request.committed = request.position
    count = rng.randint(0, max(0, min(layout.drafts, max_verify(request, limits))))
    request.drafts = [rng.randrange(64) for _ in range(count)]
    request.confidence = [rng.random() for _ in range(rng.choice([0, count]))]
    return request


def states(layout: DraftLayout, count: int = 200) -> Iterator[tuple[Request, Limits, random.Random]]:
    rng = random.Random(layout.block)
    for _ in range(count):
        context = rng.randint(4, 40)
        limits = Limits(context, rng.choice([None, rng.randint(2, context - 1)]))
        request = random_request(rng, layout, limits)
        if request.remaining > 0:
            yield request, limits, rng


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(str(v) for v in x.to_dict().values()))
def test_planned_rows_stay_below_context_boundary_and_budget(layout: DraftLayout) -> None:
    met = set()
    for request, limits, rng in states(layout):
        strategy = rng.choice(["two_forward", "prompt_lookup", "ar", *(["fused"] * 3 if layout.anchored else [])])
        prepare = rng.choice(["all", "last", 1, 2])
        plan = planned(fixed_cycle(strategy, prepare, layout), request, layout, limits)
        rows = speculative_rows(request, plan, layout, limits, 64)
        met.add(plan.kind)
        p = request.position
        end = limits.context
        if limits.boundary is not None and p < limits.boundary:
            end = min(end, limits.boundary)
        positions = [rows.start + i for i in range(len(rows.tokens))]
        positions += [b.start + i for b in rows.blocks for i in range(len(b.inputs))]
        assert positions and max(positions) < end
        assert len(plan.hang) == len(rows.blocks)
        assert list(plan.hang) == sorted(set(plan.hang) & set(range(plan.verify + 1)))
        # A forward emits one token more than it verifies, so the last verified row must still fit the budget.
        assert plan.verify <= max(0, request.remaining - 1)
        assert plan.verify <= len(request.drafts)
        if layout.anchored or not plan.hang:
            assert list(rows.tokens) == [request.tokens[-1], *request.drafts[: plan.verify]]
            assert rows.start == p
        else:
            assert not rows.tokens and plan.verify == 0
        for j, block in zip(plan.hang, rows.blocks, strict=True):
            assert block.start == (p + j + 1 if layout.anchored else p)
            # Useful: after the block's anchor has emitted, two tokens are left, one of which it may draft.
            assert request.remaining - (j + 1 if layout.anchored else 0) >= 2
            # After it the seed stands at its start (the anchor has emitted); a draft needs a verifying row behind that.
            assert block.start + 1 < end, "drafts that cannot be verified"
            assert layout.first_drafting_row < len(block.inputs) <= layout.block
            inputs = list(block.inputs)
            if not layout.anchored:
                assert inputs[0] == request.tokens[-1]
                inputs[0] = MASK if layout.input == "mask" else noise_token(request.seed, block.start, 64)
            noise = [noise_token(request.seed, block.start + i, 64) for i in range(len(inputs))]
            assert inputs == ([MASK] * len(inputs) if layout.input == "mask" else noise)
            full = min(layout.block, end - block.start)
            assert len(block.inputs) == full or (layout.causal and len(block.inputs) < full)
    assert {"ar", "draft", "verify"} <= met
    assert "fused" in met or not layout.anchored


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda x: "-".join(str(v) for v in x.to_dict().values()))
def test_diffusion_rows_stay_below_context_and_boundary(layout: DraftLayout) -> None:
    kinds = set()
    for request, limits, rng in states(layout):
        request.block = new_block(request, layout, limits)
        assert request.block[0] == request.tokens[-1]
        assert set(request.block[1:]) <= {MASK}
        assert 1 <= len(request.block) <= min(layout.block, request.remaining + 1)
        for i in range(1, len(request.block)):
            if rng.random() < 0.6:
                request.block[i] = rng.randrange(64)
        rows, kind = diffusion_rows(request, layout, limits, 64)
        kinds.add(kind)
        assert (kind == "commit") is (MASK not in request.block)
        (inputs, start) = (
            (rows.tokens, rows.start) if kind == "commit" else (rows.blocks[0].inputs, rows.blocks[0].start)
        )
        assert start == request.position and len(inputs) == len(request.block)
        assert start + len(inputs) <= limits.end(request)
        noise = [noise_token(request.seed, start + i, 64) for i in range(len(inputs))]
        assert list(inputs) == [
            n if token == MASK and layout.input == "noise" else token
            for token, n in zip(request.block, noise, strict=True)
        ]
    assert "commit" in kinds


def test_likeliest_lengths_against_the_probabilities() -> None:
    rng = random.Random(0)
    for _ in range(100):
        verify = rng.randint(0, 6)
        c = [rng.random() for _ in range(verify)]
        chance = {}
        for j in range(verify + 1):
            chance[j] = float(np.prod(c[:j])) * (1 - c[j] if j < verify else 1.0)
        assert abs(sum(chance.values()) - 1) < 1e-12
        for count in range(1, verify + 3):
            got = likeliest_lengths(c, verify, count)
            assert list(got) == sorted(got) and len(got) == min(count, verify + 1)
            assert sum(chance[j] for j in got) >= sum(sorted(chance.values())[-len(got) :]) - 1e-12
    assert likeliest_lengths([], 3, 1) == (0,)
    assert likeliest_lengths([0.5, 1.0], 2, 1) == (0,), "a tie goes to the shorter"


def test_useful_by_hand() -> None:
    layout, prompt = DraftLayout(block=4), [1] * 10
    request = Request(0, prompt, 0, 6, frozenset(), slot=0)
    request.emit([1, 1])  # 4 tokens remain: j = 0, 1, 2 leave 3, 2, 1
    assert useful(request, range(4), layout, Limits(100)) == (0, 1)
    assert request.position == 11  # a block after j accepted starts at 12 + j
    assert useful(request, range(4), layout, Limits(14)) == (0,)  # of the block at 13 no draft could be verified
    assert useful(request, range(4), layout, Limits(13)) == ()
    assert useful(request, range(4), layout, Limits(100, boundary=12)) == ()
    assert max_verify(request, Limits(100)) == 3
    assert max_verify(request, Limits(13)) == 1
    assert Limits(100, boundary=11).end(request) == 100  # the seed stands beyond it already


def plainly_looked_up(tokens: list[int], count: int, longest: int) -> list[int]:
    for n in range(longest, 0, -1):
        ends = [e for e in range(n, len(tokens)) if tokens[e - n : e] == tokens[-n:]]
        if ends and n < len(tokens):
            return tokens[ends[-1] : ends[-1] + count]
    return []


def test_looked_up_against_a_plain_search() -> None:
    rng = random.Random(0)
    found = 0
    for _ in range(300):
        tokens = [rng.randrange(3) for _ in range(rng.randint(1, 14))]
        got = looked_up(tokens, 4)
        assert got == plainly_looked_up(tokens, 4, 3)
        found += bool(got)
    assert found > 200
    assert looked_up([5, 6, 7, 5, 6], 2) == [7, 5]
    assert looked_up([1, 2, 3], 4) == []


def test_noise_is_a_function_of_seed_and_position() -> None:
    table = [[noise_token(seed, position, 64) for position in range(400)] for seed in range(4)]
    assert table == [[noise_token(seed, position, 64) for position in range(400)] for seed in range(4)]
    assert all(0 <= token < 64 for row in table for token in row)
    assert all(len(set(row)) > 55 for row in table)
    assert len({tuple(row) for row in table}) == 4


def test_a_plan_names_its_forward() -> None:
    kinds = [StepPlan(v, p).kind for v, p in ((0, ()), (0, (0,)), (2, ()), (2, (0, 2)))]
    assert kinds == ["ar", "draft", "verify", "fused"]
