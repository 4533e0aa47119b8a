"""Steps on the device: rows planned, drafts accepted and trees compacted as in `reference.py`, bit for bit."""

import copy
import random
from dataclasses import dataclass, fields
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from retrofit.runtime.kernels import reference, steps
from retrofit.runtime.kernels.rows import PAGE, Rows, cut_tiles, tile_rows
from retrofit.runtime.kernels.state import ALL, GIVEN, LAST, State, StepTensors
from retrofit.runtime.rules import accept as acceptance
from retrofit.runtime.rules.sampling import hash_bits_plain
from retrofit.runtime.rules.tree import accepted_path, grow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS, LANES, CAPACITY, PAGES = 5, 4, 200, 5
VOCABULARY = 6
"""Few tokens, so that drafts often agree."""
EOS = 5
CASES = range(400 if DEVICE == "cuda" else 40)
"""The interpreter takes half a second for each."""

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Case:
    state: State
    lanes: Tensor
    step: StepTensors
    parents: list[int]
    block_table: Tensor
    context: int
    noise_inputs: int | None
    first: int
    rows: Rows
    seeds: Tensor
    indices: Tensor
    targets: Tensor


def random_step(rng: random.Random) -> tuple[StepTensors, list[int]]:
    if rng.random() < 0.5:
        parents = list(range(-1, rng.randint(0, 6)))
    else:
        chance = [[rng.random() for _ in range(3)] for _ in range(rng.randint(1, 4))]
        parents = list(grow(chance, rng.randint(1, 9)).parents)
    hang = rng.choice([ALL, LAST, GIVEN])
    blocks = {ALL: len(parents), LAST: 1, GIVEN: rng.randint(1, len(parents))}[hang]
    block = rng.randint(1, 8)
    if rng.random() < 0.1:
        hang, blocks, block = GIVEN, 0, 0
    return StepTensors.of(parents, blocks, block, hang, DEVICE), parents


def random_state(rng: random.Random, step: StepTensors, eos: list[int]) -> State:
    nodes = step.base_rows - 1
    state = State.empty(SLOTS, CAPACITY, nodes + rng.randint(0, 2), eos, DEVICE)
    state.tokens.copy_(torch.randint(0, VOCABULARY, state.tokens.shape))
    state.drafts.copy_(torch.randint(0, VOCABULARY, state.drafts.shape))
    for slot in range(SLOTS):
        length = rng.choice([rng.randint(1, 170), rng.randint(60, 66), rng.randint(125, 130)])
        state.length[slot] = length
        state.end[slot] = length + rng.choice([rng.randint(1, 4), rng.randint(1, 12), 20])
        state.origin[slot] = rng.randint(1, length)
        state.seed[slot] = rng.choice([rng.getrandbits(20), rng.getrandbits(64) - 2**63])
        state.active[slot] = rng.random() < 0.8
        state.num_drafts[slot] = rng.choice([nodes, rng.randint(0, nodes)])
        anchors = rng.sample(range(step.base_rows), step.base_rows)
        anchors = [rng.randint(-1, step.base_rows + 1) if rng.random() < 0.3 else a for a in anchors]
        state.anchors[slot, : len(anchors)] = torch.tensor(anchors)
    return state


def random_lanes(rng: random.Random) -> Tensor:
    slots = rng.sample(range(SLOTS), LANES)
    return torch.tensor([-1 if rng.random() < 0.2 else slot for slot in slots], device=DEVICE)


def random_case(number: int) -> Case:
    rng = random.Random(number)
    torch.manual_seed(number)
    step, parents = random_step(rng)
    state = random_state(rng, step, rng.choice([[], [EOS], [EOS, 77, 3]]))
    lanes = random_lanes(rng)
    # No request goes beyond the context; often one is close to it, and its blocks are cut.
    context = int(state.end.max()) + rng.choice([0, 0, 1, 5])
    rows = steps.allocate_rows(step, LANES, rng.choice([None, 1, 40, 300]), rng.randint(1, 5), DEVICE)
    block_table = torch.randperm(SLOTS * PAGES).view(SLOTS, PAGES).int().to(DEVICE)
    seeds, indices = (torch.empty(rows.num_base, dtype=torch.int64, device=DEVICE) for _ in range(2))
    targets = torch.randint(0, VOCABULARY, (rows.num_base,), device=DEVICE)
    agreeing = rng.choice([1, rng.random()])
    for lane, slot in enumerate(lanes.tolist()):
        for j in range(1, step.base_rows):
            if slot >= 0 and rng.random() < agreeing:
                targets[lane * step.base_rows + parents[j]] = state.drafts[slot, j - 1]
    noise = rng.choice([None, None, None, VOCABULARY, 152064])
    first = rng.randint(0, min(1, step.block))
    return Case(state, lanes, step, parents, block_table, context, noise, first, rows, seeds, indices, targets)


def run_plan(kernels, case: Case) -> None:
    kernels.lay_rows(
        case.state,
        case.lanes,
        case.step,
        case.block_table,
        case.context,
        case.noise_inputs,
        case.rows,
        case.seeds,
        case.indices,
    )


def run_accept(kernels, case: Case):
    return kernels.accept(case.state, case.lanes, case.step, case.targets, case.rows, case.first)


def assert_same(got, want) -> None:
    for field in fields(want):
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), f"{field.name}\n{a}\n{b}"
        else:
            assert a == b, field.name


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


# Compaction


def random_path(rng: random.Random, deepest: int) -> tuple[list[int], int]:
    kept = rng.randint(0, deepest + 1)
    path = [0, *sorted(rng.sample(range(1, 14), max(0, kept - 1)))][:kept]
    return path + [0] * (deepest + 1 - kept), kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "width"), [(2, 12), (1, 16)])
def test_compacted(heads: int, width: int, dtype: torch.dtype) -> None:
    rng = random.Random(0)
    moved = 0
    for _ in range(4):
        table = torch.randperm(SLOTS * PAGES).view(SLOTS, PAGES).int().to(DEVICE)
        caches = torch.randn(2, 3, SLOTS * PAGES, heads, PAGE, width, device=DEVICE).to(dtype)
        caches[:, :, :, :, PAGE - 1] = torch.nan  # moved or not, a NaN concerns its own place only
        lanes = random_lanes(rng)
        before = [rng.choice([1, rng.randint(2, 180), rng.randint(50, 66), rng.randint(116, 130)]) for _ in lanes]
        paths, kept = zip(*(random_path(rng, 5) for _ in lanes), strict=True)
        arguments = [torch.tensor(x, device=DEVICE) for x in (before, paths, kept)]
        want = caches.clone()
        for cache in want:
            reference.compact(cache, table, lanes, *arguments)
        moved += int((want.nan_to_num(9) != caches.nan_to_num(9)).any())
        steps.compact(caches[0], caches[1], table, lanes, *arguments)
        assert torch.equal(caches.nan_to_num(9), want.nan_to_num(9))
    assert moved > 2


def test_compacted_within_one_tensor_of_keys_and_values() -> None:
    """K and V of a layer may lie beside each other: only the layers' and pages' strides change."""
    cache = torch.randn(2, 2, PAGES, 1, PAGE, 4, device=DEVICE)
    table = torch.arange(PAGES, dtype=torch.int32, device=DEVICE)[None]
    arguments = [torch.tensor(x, device=DEVICE) for x in ([0], [60], [[0, 2, 9]], [3])]
    want = cache.clone()
    for i in range(2):
        reference.compact(want[:, i], table, *arguments)
    steps.compact(cache[:, 0], cache[:, 1], table, *arguments)
    assert torch.equal(cache, want)


def test_a_tree_step_after_compaction_reads_the_accepted_path() -> None:
    """Plan, write each base row's number as its K/V, accept, compact: the places then hold the path in order."""
    done = 0
    for number in range(12):
        case = random_case(number)
        if case.step.chain:
            continue
        before = case.state.length.clone()
        run_plan(steps, case)
        key, value = (torch.zeros(1, SLOTS * PAGES, 1, PAGE, 2, device=DEVICE) for _ in range(2))
        for row, place in enumerate(case.rows.places.tolist()):
            if place >= 0:
                key[0, place // PAGE, 0, place % PAGE] = row + 1
        length_before = before[case.lanes.clamp(min=0)]
        outcome = run_accept(steps, case)
        steps.compact(key, value, case.block_table, case.lanes, length_before, outcome.path, outcome.kept)
        for lane, slot in enumerate(case.lanes.tolist()):
            for d in range(int(outcome.kept[lane])):
                place = int(length_before[lane]) - 1 + d
                page = int(case.block_table[slot, place // PAGE])
                want = lane * case.step.base_rows + int(outcome.path[lane, d]) + 1
                assert key[0, page, 0, place % PAGE].tolist() == [want, want]
                done += 1
        assert not value.any()
    assert done > 10
