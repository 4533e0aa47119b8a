"""Which rows a request runs: below context, boundary and budget, of the likeliest lengths."""

import random
from collections.abc import Iterator

import numpy as np
import pytest

from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.rows import MASK
from retrofit.runtime.plan import (
    Limits,
    StepPlan,
    diffusion_rows,
    fixed_cycle,
    likeliest_lengths,
    max_verify,
    noise_token,
    planned,
    speculative_rows,
    useful,
)
from retrofit.runtime.request import Request

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
        end, seed = limits.end(request), request.tokens[-1]
        filled = min(layout.drafts, request.remaining, end - request.position - 1)
        if filled > 0 and rng.random() < 0.7:  # as a pass leaves it
            request.block = [seed, *(rng.randrange(64) for _ in range(rng.randint(0, filled)))]
            request.confidence = [rng.random() for _ in request.block[1:]]
        revised, room = rng.random() < 0.5, rng.choice([None, rng.randint(1, 40)])
        rows, kind = diffusion_rows(request, layout, limits, 64, revised, room)
        kinds.add(kind)
        assert rows.start == request.position
        assert all(b.start + len(b.inputs) <= end for b in rows.blocks)
        if kind == "denoise":
            assert not layout.anchored and not request.block and not rows.tokens
            (block,) = rows.blocks
            assert (block.start, block.inputs[0], block.anchor) == (request.position, seed, -1)
            assert len(block.inputs) > layout.first_drafting_row
            continue
        assert list(rows.tokens) == (request.block or [seed])
        assert rows.start + len(rows.tokens) <= end
        ends = [block.anchor for block in rows.blocks]
        assert set(ends) <= set(range(len(rows.tokens))) if revised else set(ends) <= {len(rows.tokens) - 1}
        assert not ends or layout.anchored
        assert all(b.start == rows.start + b.anchor + 1 for b in rows.blocks)
        assert room is None or not ends or len(rows.tokens) + layout.block * len(ends) <= room
        kinds.add("hung" if ends else "bare")
    assert {"commit", "bare"} <= kinds and ("hung" in kinds) is layout.anchored
    assert ("denoise" in kinds) is not layout.anchored


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


def test_noise_is_a_function_of_seed_and_position() -> None:
    table = [[noise_token(seed, position, 64) for position in range(400)] for seed in range(4)]
    assert table == [[noise_token(seed, position, 64) for position in range(400)] for seed in range(4)]
    assert all(0 <= token < 64 for row in table for token in row)
    assert all(len(set(row)) > 55 for row in table)
    assert len({tuple(row) for row in table}) == 4


def test_a_plan_names_its_forward() -> None:
    kinds = [StepPlan(v, p).kind for v, p in ((0, ()), (0, (0,)), (2, ()), (2, (0, 2)))]
    assert kinds == ["ar", "draft", "verify", "fused"]
