"""A forward's sequences in sections that read about as many keys, so that no short text pays for a long one beside it.

    sequence      0    1    2     3    4    5
    keys        300  200  5000  150  900  800
    sections    [0    1] [ 2 ] [ 3 ] [ 4    5]      each a rectangle of as many keys as its longest sequence has

What a row attends to is the same in every section.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from retrofit.adapters.rows import RowPlan
from retrofit.adapters.visibility import Group

CALL = 4
"""What a section costs on a CPU beside its keys, in steps of keys of one sequence."""


class Section(NamedTuple):
    """sequences: which of the group's; plan: the forward's, as if its sequences were no others."""

    sequences: slice
    plan: RowPlan


def sections(plan: RowPlan, group: Group, step: int, spanning: bool) -> list[Section]:
    """Of `plan.base` or `plan.draft`, the group, so that they take the least time on a CPU.

    step: keys are read in multiples of so many.  spanning: whether a section may span slots that are none of the
    group's; else it is a view of the cache.
    """
    key = ("sections", step, spanning)
    if key not in group.masks:
        # A tree's draft rows attend to the sequence's committed keys, which a sequence without a block has, too.
        limit = plan.base.limit if plan.tree and plan.base is not None else group.limit
        group.masks[key] = cuts(None if spanning else group.slots, (-(-limit.max(1) // step)).tolist())
    return cut(plan, group, group.masks[key])


def cut(plan: RowPlan, group: Group, where: Sequence[tuple[int, int]]) -> list[Section]:
    """Of `plan.base` or `plan.draft`, the group, cut as (first, stop) of each section say."""
    if len(where) == 1:
        return [Section(slice(0, len(group.slots)), plan)]
    key = ("cut", tuple(where))
    if key not in group.masks:
        group.masks[key] = [Section(slice(*one), _part(plan, group, *one)) for one in where]
    found: list[Section] = group.masks[key]
    return found


def cuts(slots: Sequence[int] | None, steps: Sequence[int]) -> list[tuple[int, int]]:
    """(first, stop) of each section, so that all of them take the least time; steps: of keys that a sequence reads.

    slots: a section's have to be neighbours; None: they need not.
    """
    count = len(steps)
    neighbours = [True] * (count - 1) if slots is None else (np.diff(slots) == 1).tolist()
    # Sequences of one length that are neighbours are never cut apart.
    differ = [n for n in range(1, count) if steps[n] != steps[n - 1] or not neighbours[n - 1]]
    bounds = [0, *differ, count]
    best, before = [0], [0]
    for end in range(1, len(bounds)):
        stop, longest = bounds[end], 0
        cheapest, chosen = -1, 0
        for begin in reversed(range(end)):
            first = bounds[begin]
            if begin < end - 1 and not neighbours[bounds[begin + 1] - 1]:
                break
            longest = max(longest, steps[first])
            own = CALL + (stop - first) * longest
            if 0 <= cheapest < own:  # further back it only grows
                break
            if cheapest < 0 or best[begin] + own < cheapest:
                cheapest, chosen = best[begin] + own, begin
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
