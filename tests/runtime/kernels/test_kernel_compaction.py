"""K/V of a tree's accepted path, moved to its final places."""

import random

import pytest
import torch
from device_states import DEVICE, PAGES, SLOTS, random_case, random_lanes, run_accept, run_plan

from retrofit.runtime.kernels import reference, steps
from retrofit.runtime.kernels.rows import PAGE

pytestmark = pytest.mark.usefixtures("poisoned_memory")


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
