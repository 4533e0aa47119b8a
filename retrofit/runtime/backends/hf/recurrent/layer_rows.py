"""The rows of one forward as one recurrent layer sees them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retrofit.runtime.backends.hf.recurrent.forest import Forest
from retrofit.runtime.backends.hf.recurrent.states import States

if TYPE_CHECKING:
    from retrofit.adapters.rows import RowPlan
    from retrofit.runtime.backends.hf.attention import ForwardContext


@dataclass(frozen=True)
class LayerRows:
    """What a layer's functions need; travels through it as `retrofit_rows`."""

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
        """Of each sequence of base rows: its slot, its first position, and which rows they are."""
        first = 0
        for sequence in self.plan.sequences:
            yield sequence.slot, sequence.start, slice(first, first + len(sequence.tokens))
            first += len(sequence.tokens)

    def whole(self, parts: list[Tensor], rows: int) -> Tensor:
        """Prompts' rows one after another in dimension `rows`, and zeros for filler."""
        missing = self.plan.num_rows - sum(part.shape[rows] for part in parts)
        if missing:
            shape = list(parts[0].shape)
            shape[rows] = missing
            parts = [*parts, parts[0].new_zeros(shape)]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=rows)
