"""Drafts accepted on the device as by the acceptance rule, and ends where a request ends."""

import copy
import random
from typing import NamedTuple

import pytest
import torch
from device_states import DEVICE, assert_same, random_case, run_accept, run_plan

from retrofit.runtime.kernels import steps
from retrofit.runtime.kernels.state import ALL, State, StepTensors
from retrofit.runtime.rules import accept as acceptance
from retrofit.runtime.rules.tree import accepted_path, grow

pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Lane(NamedTuple):
    """One request with plain drafts, far from its end."""

    drafts: list[int]
    targets: list[int]


def accept_plainly(parents: list[int], lane: list[Lane], end: int = 100, eos: tuple[int, ...] = (), block: int = 0):
    """Plan and accept these requests, each of length 10; returns (state, outcome)."""
    step = StepTensors.of(parents, len(parents) if block else 0, block, ALL, DEVICE)
    n, W = len(lane), len(parents)
    state = State.empty(n, 120, max(1, W - 1), eos, DEVICE)
    targets = torch.zeros(n, W, dtype=torch.int64)
    for slot, (drafts, wanted) in enumerate(lane):
        state.drafts[slot, : len(drafts)] = torch.tensor(drafts)
        state.num_drafts[slot] = len(drafts)
        targets[slot, : len(wanted)] = torch.tensor(wanted)
    for t, value in ((state.length, 10), (state.end, end), (state.active, 1), (state.origin, 4)):
        t.fill_(value)
    rows = steps.allocate_rows(step, n, None, 1, DEVICE)
    keys = torch.empty(2, rows.num_base, dtype=torch.int64, device=DEVICE)
    table = torch.arange(2 * n, dtype=torch.int32, device=DEVICE).view(n, 2)
    lanes = torch.arange(n, device=DEVICE)
    steps.lay_rows(state, lanes, step, table, 120, None, rows, keys[0], keys[1])
    return state, steps.accept(state, lanes, step, targets.flatten().to(DEVICE), rows, 0)


def test_chains_are_accepted_as_by_the_acceptance_rule() -> None:
    rng = random.Random(0)
    seen = set()
    for K in (1, 3, 6):
        lanes = []
        for _ in range(8):
            targets = [rng.randrange(3) for _ in range(K + 1)]
            drafts = [y if rng.random() < 0.7 else rng.randrange(3) for y in targets[: rng.randint(0, K)]]
            lanes.append(Lane(drafts, targets))
        padded = torch.tensor([[*lane.drafts, *[0] * (K - len(lane.drafts))] for lane in lanes])
        lengths = torch.tensor([len(lane.drafts) for lane in lanes])
        want = acceptance.accepted_length(padded, torch.tensor([lane.targets for lane in lanes]), lengths)
        state, outcome = accept_plainly(list(range(-1, K)), lanes)
        assert torch.equal(outcome.kept.cpu(), want + 1)
        assert torch.equal(outcome.record[:, 1].cpu(), want) and torch.equal(outcome.record[:, 2].cpu(), lengths)
        seen |= set(want.tolist())
        for slot, (lane, count) in enumerate(zip(lanes, (want + 1).tolist(), strict=True)):
            assert outcome.record[slot, 3 : 3 + count].tolist() == lane.targets[:count]
            assert state.tokens[slot, 10 : 10 + count].tolist() == lane.targets[:count]
            assert state.length[slot] == 10 + count and state.num_drafts[slot] == 0 and state.active[slot] == 1
    assert len(seen) >= 5


def test_trees_are_accepted_as_by_the_tree() -> None:
    """Siblings that hold the same token too: the lowest row wins."""
    rng = random.Random(0)
    lengths = set()
    for nodes in (2, 7, 12):
        chance = [[rng.random() for _ in range(3)] for _ in range(4)]
        parents = list(grow(chance, nodes).parents)
        lanes = []
        for _ in range(8):
            drafts, targets = [rng.randrange(3) for _ in parents[1:]], [rng.randrange(3) for _ in parents]
            for j, parent in enumerate(parents[1:]):
                targets[parent] = drafts[j] if rng.random() < 0.5 else targets[parent]
            lanes.append(Lane(drafts, targets))
        _, outcome = accept_plainly(parents, lanes)
        for slot, lane in enumerate(lanes):
            path = accepted_path([0, *lane.drafts], parents, lane.targets)
            assert outcome.path[slot].tolist() == path + [0] * (outcome.path.shape[1] - len(path))
            assert outcome.kept[slot] == len(path)
            lengths.add(len(path))
    assert lengths >= {1, 2, 3, 4}


def test_a_request_ends_with_its_first_eos_wherever_it_stands() -> None:
    drafts, parents = [1, 2, 3, 4], list(range(-1, 4))
    for place in range(5):
        targets = [1, 2, 3, 4, 8]
        targets[place] = 7
        proposals = [7 if i == place else token for i, token in enumerate(drafts)]
        state, outcome = accept_plainly(parents, [Lane(proposals, targets)], eos=(6, 7, 9), block=2)
        taken = place + 1
        assert outcome.record[0].tolist() == [taken, min(4, taken), 4, *targets[:taken], *[0] * (4 - place)]
        assert outcome.kept.tolist() == [5], "K/V of the whole path is there"
        assert state.tokens[0, 10:16].tolist() == [*targets[:taken], *[0] * (5 - place)]
        assert state.active.tolist() == [0] and state.length.tolist() == [10 + taken]
        assert (outcome.chosen == -1).all()


def test_a_request_ends_at_its_end() -> None:
    """Rows whose token is not wanted do not run, and a block of which no draft could be verified proposes nothing."""
    drafts, targets, parents = [1, 2, 3, 4], [1, 2, 3, 4, 8], list(range(-1, 4))
    for wanted in range(1, 8):
        state, outcome = accept_plainly(parents, [Lane(drafts, targets)], end=10 + wanted, block=2)
        taken = min(5, wanted)
        assert outcome.record[0, :3].tolist() == [taken, taken - 1, taken - 1]
        assert state.active.tolist() == [int(wanted > 5)] and state.length.tolist() == [10 + taken]
        proposed = [5 + 4 * 2, 5 + 4 * 2 + 1] if wanted == 7 else [-1, -1]
        assert outcome.chosen[0].tolist() == proposed


def test_what_idle_lanes_and_finished_requests_own_stays() -> None:
    case = random_case(1)
    case.lanes = torch.tensor([3, -1, 1, -1], device=DEVICE)
    case.state.active.fill_(0)
    run_plan(steps, case)
    assert not case.rows.limits.any() and (case.rows.places == -1).all()
    before = copy.deepcopy(case.state)
    outcome = run_accept(steps, case)
    assert_same(case.state, before)
    assert not outcome.record.any() and not outcome.path.any() and not outcome.kept.any()
    assert (outcome.chosen == -1).all()


def test_a_lane_that_ran_no_row_emits_nothing() -> None:
    """A request at its end has no row in use, so there is no target to emit, nor room for one."""
    case = random_case(0)
    case.state.active.fill_(1)
    case.state.end.copy_(case.state.length)
    run_plan(steps, case)
    before = copy.deepcopy(case.state)
    outcome = run_accept(steps, case)
    assert_same(case.state, before)
    assert not outcome.record.any() and not outcome.kept.any() and (outcome.chosen == -1).all()
