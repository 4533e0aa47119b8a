"""A plan as tensors on the device.  Not here: cutting it (`plan.py`), running it (`loop.py`)."""

from __future__ import annotations

import torch

from retrofit.runtime.kernels.state import ALL, GIVEN, LAST, StepTensors
from retrofit.runtime.plan import StepPlan
from retrofit.runtime.rules.tree import DraftTree


def lowered(plan: StepPlan, block: int, device: torch.device | str) -> StepTensors:
    """block: rows of a draft block.  The plan's drafts, verified and made, are the first nodes of its tree."""
    hang, anchors = ALL, None
    if plan.hang == "last":
        hang = LAST
    elif 0 < plan.blocks <= plan.verify:
        hang = GIVEN
        anchors = None if plan.tree is None else plan.tree.first(plan.verify).likeliest_ends(plan.blocks)
    ranks = (0,) * (plan.draft + 1) if plan.tree is None else plan.tree.ranks[: plan.draft + 1]
    return StepTensors.of(verified_parents(plan), plan.blocks, block, hang, device, draft_parents(plan), ranks, anchors)


def verified_parents(plan: StepPlan) -> tuple[int, ...]:
    """Which base row each one follows, the seed's -1 first."""
    return _first(plan.tree, plan.verify)


def draft_parents(plan: StepPlan) -> tuple[int, ...]:
    """Likewise of the drafts to make."""
    return _first(plan.tree, plan.draft)


def _first(tree: DraftTree | None, nodes: int) -> tuple[int, ...]:
    return tuple(range(-1, nodes)) if tree is None else tree.parents[: nodes + 1]
