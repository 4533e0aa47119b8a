"""Kinds of forward a plan needs on the device, and that they fit its rows."""

from typing import Any

import pytest

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.device.lowering import lowered
from retrofit.runtime.kernels.state import ALL, GIVEN, LAST
from retrofit.runtime.plan import AR, StepPlan, cut_cycle, fixed_cycle, fused, two_forward
from retrofit.runtime.rules.tree import grow


def test_a_plan_as_tensors() -> None:
    def chain(nodes: int) -> list[int]:
        return list(range(-1, nodes))

    def of(plan: StepPlan) -> tuple[Any, ...]:
        step = lowered(plan, 3, "cpu")
        anchors = None if step.anchors is None else tuple(step.anchors.tolist())
        return step.parents.tolist(), step.blocks, step.hang, step.draft_parents.tolist(), anchors

    assert of(AR[0]) == ([-1], 0, ALL, [-1], None)
    draft, verify = two_forward(2)
    assert of(draft) == ([-1], 1, ALL, chain(2), None)
    assert of(verify) == (chain(2), 0, ALL, [-1], None)
    for hang, blocks, place in (("all", 3, ALL), (3, 3, ALL), (9, 3, ALL), (2, 2, GIVEN), ("last", 1, LAST)):
        assert of(fused(2, hang)[0]) == (chain(2), blocks, place, chain(2), None)
    tree = grow(((0.5, 0.4), (0.5, 0.4)), 4)
    parents = list(tree.parents)
    assert of(fused(4, 2, tree)[0]) == (parents, 2, GIVEN, parents, tree.likeliest_ends(2))
    assert of(fused(4, "all", tree)[0]) == (parents, 5, ALL, parents, None)
    assert of(StepPlan(3, 2, 3, tree)) == (parents[:4], 2, GIVEN, parents[:4], tree.first(3).likeliest_ends(2))
    step = lowered(fused(4, "all", tree)[0], 3, "cpu")
    assert tuple(step.draft_ranks.tolist()) == tree.ranks and tuple(step.draft_depths.tolist()) == tree.depths
    assert (step.block, step.draft_deepest, step.chain) == (3, max(tree.depths), False)
    assert lowered(fused(2)[0], 3, "cpu").draft_ranks.tolist() == [0, 0, 0]


@pytest.mark.parametrize("rows", [None, 1, 2, 3, 4, 5, 8, 16, 40])
@pytest.mark.parametrize("prepare", ["all", "last", 1, 2, 9])
@pytest.mark.parametrize("strategy", ["ar", "two_forward", "fused"])
def test_fixed_plans_fit_their_rows(strategy: str, prepare: str | int, rows: int | None) -> None:
    layout = DraftLayout(block=3)
    cycle = cut_cycle(fixed_cycle(strategy, prepare, layout), layout, rows)
    for plan in cycle:
        step = lowered(plan, layout.block, "cpu")
        assert rows is None or step.base_rows + step.draft_rows <= max(rows, 1)
        assert step.hang != ALL or step.blocks in (0, step.base_rows)
    if rows is None and strategy == "fused":
        assert cycle[0].verify == layout.drafts
        assert cycle[0].blocks == (1 if prepare == "last" else 4 if prepare == "all" else min(int(prepare), 4))
    if rows is not None and rows < 4:
        assert cycle == AR
