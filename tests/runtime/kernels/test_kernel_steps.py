"""Steps on the device: rows planned and drafts accepted as in `reference.py`, bit for bit."""

import copy
import random

import pytest
import torch
from device_states import DEVICE, LANES, Case, assert_same, random_case, random_step, run_accept, run_plan

from retrofit.runtime.kernels import reference, steps
from retrofit.runtime.kernels.rows import PAGE, cut_tiles, tile_rows
from retrofit.runtime.kernels.state import ALL, State, StepTensors
from retrofit.runtime.rules.sampling import hash_bits_plain

CASES = range(400 if DEVICE == "cuda" else 40)
"""The interpreter takes half a second for each."""
pytestmark = pytest.mark.usefixtures("poisoned_memory")


def spoil(case: Case) -> None:
    """What an earlier step may have left in the rows."""
    rows = case.rows
    for t in (rows.ids, rows.positions, rows.slots, rows.limits, rows.places, rows.low, rows.high, rows.starts):
        if t is not None:
            t.fill_(77)
    if rows.paths is not None:
        rows.paths.fill_(77)


@pytest.mark.parametrize("number", CASES)
def test_step(number: int) -> None:
    case = random_case(number)
    want = copy.deepcopy(case)
    run_plan(reference, want)
    before = copy.deepcopy(case.state)
    spoil(case)
    run_plan(steps, case)
    assert_same(case.rows, want.rows)
    assert torch.equal(case.seeds, want.seeds) and torch.equal(case.indices, want.indices)
    assert_same(case.state, before)

    wanted, rows = run_accept(reference, want), copy.deepcopy(case.rows)
    assert_same(run_accept(steps, case), wanted)
    assert_same(case.state, want.state)
    assert_same(case.rows, rows)


def test_cases_meet_what_they_should() -> None:
    """Else they prove little."""
    met = set()
    for number in CASES:
        case = random_case(number)
        run_plan(reference, case)
        rows, step, running = case.rows, case.step, case.state.active.tolist()
        met |= {"chain" if step.chain else "tree", f"hang {step.hang}"}
        if rows.padded > rows.num_rows + LANES * steps.PADDING_ROWS:
            met.add("padding")
        sizes = (rows.high - rows.low)[rows.high > 0]
        if (sizes < step.block).any():
            met.add("block cut")
        drafted = case.state.num_drafts.tolist()
        outcome = run_accept(reference, case)
        for lane, slot in enumerate(case.lanes.tolist()):
            if slot < 0 or not running[slot]:
                met.add("idle" if slot < 0 else "inactive")
                continue
            places = rows.places[lane * step.base_rows :][: step.base_rows]
            pages = set((places[places >= 0] // PAGE).tolist())
            if len(pages) > 1:
                met.add("two pages")
            if (places >= 0).sum() <= drafted[slot]:
                met.add("rows cut")
            taken, accepted, verified = outcome.record[lane, :3].tolist()
            kept = int(outcome.kept[lane])
            met.add(f"accepted {min(accepted, 4)}")
            met.add("all agree" if accepted == verified else "not all agree")
            if not case.state.active[slot]:
                met.add("end" if case.state.length[slot] == case.state.end[slot] else f"eos {min(taken, 3)}")
            if taken < kept:
                met.add("path cut")
            met.add("block" if (outcome.chosen[lane] >= 0).any() else "no block")
            if outcome.path[lane, :kept].tolist() != list(range(kept)):
                met.add("branch")
    assert met == {"chain", "tree", "hang 0", "hang 1", "hang 2", "padding", "block cut", "rows cut", "two pages"} | {
        *("idle", "inactive", "all agree", "not all agree", "branch", "path cut", "block", "no block", "end"),
        *("eos 1", "eos 2", "eos 3", "accepted 0", "accepted 1", "accepted 2", "accepted 3", "accepted 4"),
    }


def test_noise_inputs_are_those_of_the_engine() -> None:
    """hash(seed, position, 0) % vocabulary, for seeds of more than 32 bits and below 0 too."""
    seeds = [0, 1, 2**31, 2**32 + 5, -1, -(2**63), 2**63 - 1, 0x9E3779B97F4A7C15 - 2**64]
    step = StepTensors.of([-1], 1, 8, ALL, DEVICE)
    state = State.empty(len(seeds), 8, 0, [], DEVICE)
    for t, value in ((state.length, 3), (state.end, 8), (state.active, 1)):
        t.fill_(value)
    state.seed.copy_(torch.tensor(seeds))
    rows = steps.allocate_rows(step, len(seeds), None, 1, DEVICE)
    table = torch.zeros(len(seeds), 1, dtype=torch.int32, device=DEVICE)
    lanes = torch.arange(len(seeds), device=DEVICE)
    noise = torch.empty(2, rows.num_base, dtype=torch.int64, device=DEVICE)
    for vocabulary in (151936, 2**31 - 1):
        steps.lay_rows(state, lanes, step, table, 100, vocabulary, rows, noise[0], noise[1])
        want = [hash_bits_plain(seed, position, 0) % vocabulary for seed in seeds for position in range(3, 11)]
        assert rows.ids[rows.num_base :].tolist() == want


def test_a_lane_is_planned_alike_alone_and_among_others() -> None:
    for number in range(2):
        case = random_case(number)
        run_plan(steps, case)
        W, D = case.step.base_rows, case.step.draft_rows
        for lane in range(2):
            alone = copy.deepcopy(case)
            alone.lanes = case.lanes[lane : lane + 1].clone()
            alone.rows = steps.allocate_rows(case.step, 1, None, 1, DEVICE)
            alone.seeds, alone.indices = case.seeds[:W].clone(), case.indices[:W].clone()
            run_plan(steps, alone)
            n = case.rows.num_base
            for field in ("ids", "positions", "slots", "limits"):
                got, among = getattr(alone.rows, field), getattr(case.rows, field)
                assert torch.equal(got[:W], among[lane * W : (lane + 1) * W])
                assert torch.equal(got[W:], among[n + lane * D : n + (lane + 1) * D])
            assert torch.equal(alone.indices, case.indices[lane * W : (lane + 1) * W])


def test_allocated_rows() -> None:
    for number in range(40):
        rng = random.Random(number)
        step, _ = random_step(rng)
        lanes, padded, groups = rng.randint(1, 5), rng.choice([None, 3, 500]), rng.randint(1, 40)
        rows = steps.allocate_rows(step, lanes, padded, groups, DEVICE)
        assert rows.num_base == lanes * step.base_rows
        assert rows.num_draft == lanes * step.blocks * step.block
        assert rows.padded == max(padded or 0, rows.num_rows)
        assert len(rows.ids) == len(rows.positions) == len(rows.slots) == len(rows.limits) == rows.padded
        assert (rows.places == -1).all() and not rows.limits.any() and not rows.ids.any()
        counts = [[step.base_rows] * lanes, [step.draft_rows] * lanes]
        first, count, base_tiles = cut_tiles(counts[0], counts[1], tile_rows(groups), DEVICE)
        assert torch.equal(rows.tile_first, first) and torch.equal(rows.tile_count, count)
        assert rows.base_tiles == base_tiles
        covered = [row for a, n in zip(first.tolist(), count.tolist(), strict=True) for row in range(a, a + n)]
        assert covered == list(range(rows.num_rows))
        assert (rows.starts is None) == (rows.paths is None) == step.chain
        if rows.paths is not None:
            assert rows.paths.shape == (rows.padded, step.deepest + 1) and len(rows.starts) == rows.padded
