"""Random states of requests on the device, planned and accepted: what the tests of device steps share."""

import random
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from retrofit.runtime.kernels import steps
from retrofit.runtime.kernels.rows import Rows
from retrofit.runtime.kernels.state import ALL, GIVEN, LAST, State, StepTensors
from retrofit.runtime.rules.tree import grow

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SLOTS, LANES, CAPACITY, PAGES = 5, 4, 200, 5
VOCABULARY = 6
"""Few tokens, so that drafts often agree."""
EOS = 5


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
