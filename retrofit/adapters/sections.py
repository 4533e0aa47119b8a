"""A forward's sequences in sections that read about as many keys, so that no short text pays for a long one beside it.

    sequence      0    1    2     3    4    5
    keys        300  200  5000  150  900  800
    sections    [0    1] [ 2 ] [ 3 ] [ 4    5]      each a rectangle of as many keys as its longest sequence has

A section is a view of the cache: its slots are neighbours.  What a row attends to is the same in every section.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np

from retrofit.adapters.rows import RowPlan
from retrofit.adapters.visibility import Group


class Section(NamedTuple):
    """sequences: which of the group's; plan: the forward's, as if its sequences were no others."""

    sequences: slice
    plan: RowPlan


def sections(plan: RowPlan, group: Group, step: int, call: int) -> list[Section]:
    """Of `plan.base` or `plan.draft`, the group.

    step: keys are read in multiples of so many.  call: what a section costs beside its keys, in steps of one sequence.
    """
    key = ("sections", step, call)
    if key not in group.masks:
        found = cuts(group.slots, -(-group.limit.max(1) // step), call)
        group.masks[key] = [] if len(found) == 1 else [Section(slice(*one), _part(plan, group, *one)) for one in found]
    return group.masks[key] or [Section(slice(0, len(group.slots)), plan)]


def cuts(slots: list[int], steps: np.ndarray, call: int) -> list[tuple[int, int]]:
    """(first, stop) of each section, so that all of them take the least time; steps: of keys that a sequence reads."""
    count, neighbours = len(slots), np.diff(slots) == 1
    # Sequences of one length that are neighbours are never cut apart.
    bounds = [0, *(np.flatnonzero(~neighbours | (np.diff(steps) != 0)) + 1).tolist(), count]
    best, before = [0.0], [0]
    for end in range(1, len(bounds)):
        stop, longest, cheapest, chosen = bounds[end], 0, float("inf"), 0
        for begin in reversed(range(end)):
            first = bounds[begin]
            if begin < end - 1 and not neighbours[bounds[begin + 1] - 1]:
                break
            longest = max(longest, int(steps[first]))
            cost = best[begin] + call + (stop - first) * longest
            if cost < cheapest:
                cheapest, chosen = cost, begin
        best.append(cheapest)
        before.append(chosen)
    found, end = [], len(bounds) - 1
    while end:
        found.append((bounds[before[end]], bounds[end]))
        end = before[end]
    return found[::-1]


def _part(plan: RowPlan, group: Group, first: int, stop: int) -> RowPlan:
    part = copy.copy(plan)
    part.__dict__.pop("paths", None)
    if not plan.tree:  # the other group has other sequences
        part.base, part.draft = (group.some(first, stop) if one is group else None for one in (plan.base, plan.draft))
        return part
    assert plan.base is not None
    part.sequences = [s for s in plan.sequences if s.tokens][first:stop]
    part.base = plan.base.some(first, stop)
    if plan.draft is not None:
        part.draft = plan.draft.some(first, stop)
        part.draft.keys = part.base.keys
    return part
