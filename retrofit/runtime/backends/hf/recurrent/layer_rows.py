"""The rows of one forward as one recurrent layer sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrofit.runtime.backends.hf.recurrent.anchors import STRIDE
from retrofit.runtime.backends.hf.recurrent.forest import Forest
from retrofit.runtime.backends.hf.recurrent.states import States

if TYPE_CHECKING:
    from retrofit.adapters.rows import RowPlan
    from retrofit.runtime.backends.hf.attention import ForwardContext


@dataclass(frozen=True)
class LayerRows:
    """What a layer's functions need, as their argument `retrofit_rows`."""

    context: ForwardContext
    layer: int

    @property
    def plan(self) -> RowPlan:
        return self.context.plan

    @property
    def states(self) -> States:
        return self.context.cache.states

    @property
    def forest(self) -> Forest:
        return self.context.forest

    def prompts(self) -> Iterator[tuple[int, int, slice]]:
        """Of each sequence of base rows: its slot, its first position, and which rows they are.

        Where texts are recorded, in parts that end where a state is to be kept.
        """
        row = 0
        for sequence in self.plan.sequences:
            position, end = sequence.start, sequence.start + len(sequence.tokens)
            while position < end:
                stop = end if self.states.record is None else min(end, (position // STRIDE + 1) * STRIDE)
                yield sequence.slot, position, slice(row, row + stop - position)
                row, position = row + stop - position, stop

    def blocks(self, rows: Tensor) -> Tensor:
        """[N, ..] all rows -> [n, K, ..] draft rows, block by block; a shorter one repeats some row behind its own."""
        found, drafts = self.plan.block_rows, rows[self.plan.first_draft :]
        drafts = drafts if found.gather is None else drafts[found.gather]
        return drafts.view(-1, found.block, *rows.shape[1:])

    def unblocked(self, blocks: Tensor) -> Tensor:
        """[n, K, ..] back to [N, ..]; zero for filler."""
        found, drafts = self.plan.block_rows, blocks.flatten(0, 1)
        drafts = drafts if found.scatter is None else drafts[found.scatter]
        filler = self.plan.first_draft
        return torch.cat([drafts.new_zeros(filler, *drafts.shape[1:]), drafts]) if filler else drafts

    def whole(self, parts: list[Tensor], rows: int) -> Tensor:
        """Prompts' rows one after another in dimension `rows`, and zeros for filler."""
        missing = self.plan.num_rows - sum(part.shape[rows] for part in parts)
        if missing:
            shape = list(parts[0].shape)
            shape[rows] = missing
            parts = [*parts, parts[0].new_zeros(shape)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=rows)
