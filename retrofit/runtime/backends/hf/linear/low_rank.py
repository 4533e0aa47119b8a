"""The adapter's update of layers that share their rows, of draft rows alone, as two products for all of them.

    down   [sum of ranks, in]                  up   [sum of out, sum of ranks]      update = up down x
           A of the first layer                     B 0 0   scaling included
           A of the second                          0 B 0
           A of the third                           0 0 B

One layer's own two products take less time than calling them: on a model of 135M parameters 420 of them cost as much as
all products of the base.  Base rows are no operand here either.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.written import state


class LowRank:
    """What the adapter adds to `layers`, in the type of the rows; follows what is written to the adapter."""

    def __init__(self, layers: Sequence[GatedLoraLinear]):
        self.layers = list(layers)
        self._made: tuple[Hashable, Tensor, Tensor] | None = None

    def add_to(self, out: Tensor, x: Tensor, first: int) -> None:
        """Add the update of rows `first` and later of x [..., N, in] to out [..., N, sum of out], in place."""
        down, up = self._factors(x.dtype)
        if x.dim() == 3 and len(x) == 1:
            out[0, first:].addmm_(F.linear(x[0, first:], down), up)
        else:
            out[..., first:, :] += F.linear(x[..., first:, :], down) @ up

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """down [R, in] and up, transposed: [R, sum of out]."""
        factors = [layer.factors() for layer in self.layers]
        of = (dtype, *((state(down), state(up), scaling) for down, up, scaling in factors))
        if self._made is None or self._made[0] != of:
            downs, ups, scalings = zip(*factors, strict=True)
            scaled = [up.detach().T * scaling for up, scaling in zip(ups, scalings, strict=True)]
            self._made = of, torch.cat([down.detach() for down in downs]).to(dtype), torch.block_diag(*scaled).to(dtype)
        return self._made[1:]
