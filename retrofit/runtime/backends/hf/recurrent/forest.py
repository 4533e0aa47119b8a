"""Which row each row of a plan follows: chains, trees and blocks of all sequences as one forest.

    base rows a b c, a block on b:  x y z        level 0   a
                                                 level 1   b
    a <- b <- c                                  level 2   c x
         b <- x <- y <- z                        level 3   y
                                                 level 4   z

A root follows what its sequence has committed.  Filler rows are in no level.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from retrofit.adapters.rows import RowPlan

Index = slice | Tensor
"""Of neighbours a slice, which copies nothing."""


@dataclass(frozen=True)
class Level:
    """Rows as far from their root: their numbers, and the place of each one's predecessor in the level before.

    In level 0 `before` says the slots.  None: those of the level before, in the same order.
    """

    rows: Index
    before: Index | None


@dataclass
class Forest:
    """The rows of one forward by what they follow.

    Attributes: `slots` of its sequences; `parents` [N] the row before each, -1 - s where that is the committed text of
    sequence s.
    """

    slots: list[int]
    parents: np.ndarray
    levels: list[Level]
    device: torch.device
    _windows: dict[int, Tensor] = field(default_factory=dict)

    def windows(self, reach: int) -> Tensor:
        """[reach + 1, N] for a convolution: what stands `reach`, .., 1 before each row, and the row itself.

        Numbers count the last `reach` inputs of each sequence, oldest first, one sequence after another, then the rows.
        """
        if reach not in self._windows:
            held = len(self.slots) * reach
            numbers = np.arange(held + len(self.parents))
            before = numbers - 1
            before[held:] = np.where(self.parents >= 0, self.parents + held, -self.parents * reach - 1)
            steps = [numbers[held:]]
            for _ in range(reach):
                steps.append(before[steps[-1]])
            self._windows[reach] = torch.from_numpy(np.stack(steps[::-1])).to(self.device)
        return self._windows[reach]


def forest_of(plan: RowPlan) -> Forest:
    """The rows of a plan whose blocks hang on base rows of this forward, or on what is committed."""
    parents = np.full(plan.num_rows, -1)
    levels: list[list[int]] = []
    depth = np.zeros(plan.num_rows, dtype=np.int64)

    def add(row: int, parent: int) -> None:
        parents[row] = parent
        depth[row] = 0 if parent < 0 else depth[parent] + 1
        if depth[row] == len(levels):
            levels.append([])
        levels[depth[row]].append(row)

    row, firsts = 0, []
    for s, sequence in enumerate(plan.sequences):
        firsts.append(row)
        for parent in sequence.follows:
            add(row, -1 - s if parent < 0 else firsts[s] + parent)
            row += 1
    row = plan.first_draft
    for s, sequence in enumerate(plan.sequences):
        for block in sequence.blocks:
            anchor = block.start - 1 - sequence.start if sequence.parents is None else block.anchor
            parent = -1 - s if anchor < 0 else firsts[s] + anchor
            for _ in block.inputs:
                add(row, parent)
                parent, row = row, row + 1
    slots = [sequence.slot for sequence in plan.sequences]
    return Forest(slots, parents, _levels(levels, parents, slots, plan.device), plan.device)


def _levels(rows: list[list[int]], parents: np.ndarray, slots: list[int], device: torch.device) -> list[Level]:
    found = []
    place: dict[int, int] = {}
    for number, some in enumerate(rows):
        before = [slots[-1 - parents[row]] if number == 0 else place[parents[row]] for row in some]
        same = number > 0 and before == list(range(len(rows[number - 1])))
        found.append(Level(_index(some, device), None if same else _index(before, device)))
        place = {row: n for n, row in enumerate(some)}
    return found


def _index(numbers: list[int], device: torch.device) -> Index:
    if numbers == list(range(numbers[0], numbers[0] + len(numbers))):
        return slice(numbers[0], numbers[0] + len(numbers))
    return torch.tensor(numbers, device=device)
