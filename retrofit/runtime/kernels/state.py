"""State of the requests that decode together, kept on the device, and what a step does with it.

A step serves `lanes` of the state's slots.  Per request, with p the position of the seed (the newest token):

    tokens    prompt ...... | emitted ..... seed | -        the seed is tokens[length - 1], at p = length - 1
    K/V       0 .. p-1 in the cache; node j of a tree (row 0 is the seed) is kept at the place of position p + j
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ALL, LAST, GIVEN = 0, 1, 2
"""Where blocks hang: on every base row; on the last drafted one; on the rows in `State.anchors`."""


@dataclass
class State:
    """One row per slot.  All int64 but where it says otherwise."""

    tokens: Tensor
    """[slots, capacity]."""
    length: Tensor
    """[slots] how many tokens are known."""
    end: Tensor
    """[slots] the length at which a request is finished."""
    origin: Tensor
    """[slots] length of the prompt: output index = position in `tokens` - origin."""
    seed: Tensor
    """[slots]."""
    active: Tensor
    """[slots] 1 while the request runs; a step never touches others."""
    drafts: Tensor
    """[slots, most nodes] drafted tokens of nodes 1.."""
    num_drafts: Tensor
    """[slots] how many of them are there, in the order of the nodes."""
    anchors: Tensor
    """[slots, most nodes + 1] rows that blocks hang on, where the step says GIVEN; -1: none."""
    eos: Tensor
    """[ends, at least 1] tokens that end a request; -1 matches nothing."""

    @classmethod
    def empty(cls, slots: int, capacity: int, nodes: int, eos: Sequence[int], device: torch.device | str) -> State:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        return cls(
            zeros(slots, capacity), zeros(slots), zeros(slots), zeros(slots), zeros(slots), zeros(slots),
            zeros(slots, max(1, nodes)), zeros(slots), zeros(slots, nodes + 1).fill_(-1),
            torch.tensor(list(eos) or [-1], dtype=torch.int64, device=device),
        )  # fmt: skip


@dataclass(frozen=True)
class StepTensors:
    """A plan as the kernels read it: base rows {seed, nodes}, blocks of `block` draft rows, and the drafts to make."""

    parents: Tensor
    """int64 [nodes + 1], -1 for the seed; a chain is -1, 0, 1, 2, ..."""
    depths: Tensor
    """int64 [nodes + 1]."""
    paths: Tensor
    """int64 [nodes + 1, deepest + 1]: the row at depth d on the way to row j."""
    chain: bool
    blocks: int
    block: int
    hang: int
    """ALL (blocks = nodes + 1), LAST (blocks = 1) or GIVEN."""
    draft_parents: Tensor
    draft_ranks: Tensor
    draft_depths: Tensor
    """int64 [drafts + 1], of the drafts to make, row 0 the token before them."""
    draft_deepest: int
    anchors: Tensor | None
    """int64 [blocks] with GIVEN: the rows where they are always the same; None: where the confidence head says."""

    @property
    def base_rows(self) -> int:
        return len(self.parents)

    @property
    def draft_rows(self) -> int:
        return self.blocks * self.block

    @property
    def deepest(self) -> int:
        return self.paths.shape[1] - 1

    @classmethod
    def of(
        cls,
        parents: Sequence[int],
        blocks: int,
        block: int,
        hang: int,
        device: torch.device | str,
        draft_parents: Sequence[int] = (-1,),
        draft_ranks: Sequence[int] = (0,),
        anchors: Sequence[int] | None = None,
    ) -> StepTensors:
        """parents of all rows, the seed's -1 first."""

        def put(values: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
            return torch.tensor(values, dtype=torch.int64, device=device)

        paths, draft_depths = _paths(parents), [len(path) - 1 for path in _paths(draft_parents)]
        deepest = max(map(len, paths))
        return cls(
            put(list(parents)),
            put([len(path) - 1 for path in paths]),
            put([path + [0] * (deepest - len(path)) for path in paths]),
            list(parents) == list(range(-1, len(parents) - 1)),
            blocks,
            block,
            hang,
            put(list(draft_parents)),
            put(list(draft_ranks)),
            put(draft_depths),
            max(draft_depths),
            None if anchors is None else put(list(anchors)),
        )


def _paths(parents: Sequence[int]) -> list[list[int]]:
    paths: list[list[int]] = []
    for j, parent in enumerate(parents):
        paths.append([*(paths[parent] if parent >= 0 else []), j])
    return paths


@dataclass
class Outcome:
    """What a step did for each lane; what the host reads one or two steps later.

    record: int64 [lanes, 3 + deepest + 1]: tokens emitted, accepted drafts, verified depth, then the tokens.
    path: int64 [lanes, deepest + 1] accepted rows, 0 beyond; kept: int64 [lanes] how many of them.
    chosen: int64 [lanes, block] row of the logits that proposes each slot of the block that came true; -1: none.
    """

    record: Tensor
    path: Tensor
    kept: Tensor
    chosen: Tensor
