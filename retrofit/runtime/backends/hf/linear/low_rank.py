"""The adapter's update of layers that share their rows, of draft rows alone, as two products for all of them.

    down   [in, sum of ranks]     up   [sum of ranks, sum of out]      update = x down up
           A A A, transposed           B 0 0   transposed, scaling included
                                       0 B 0
                                       0 0 B

One layer's own two products take less time than calling them: on a model of 135M parameters 420 of them cost as much as
all products of the base.  A CPU computes them in float32, for a few rows take longer in 16 bits.  Base rows are no
operand here either.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.adapters.written import state


class LowRank:
    """What the adapter adds to `layers`; follows what is written to the adapter."""

    def __init__(self, layers: Sequence[GatedLoraLinear]):
        self.layers = list(layers)
        self._made: tuple[Hashable, Tensor, Tensor] | None = None

    def add_to(self, out: Tensor, x: Tensor, first: int) -> None:
        """Add the update of rows `first` and later of x [..., N, in] to out [..., N, sum of out], in place."""
        down, up = self._factors(torch.float32 if x.device.type == "cpu" else x.dtype)
        if x.dim() == 3 and len(x) == 1:
            rows, changed = x[0, first:].to(down.dtype), out[0, first:]
            if changed.dtype == down.dtype:
                changed.addmm_(rows @ down, up)
            else:
                changed += rows @ down @ up
        else:
            out[..., first:, :] += x[..., first:, :].to(down.dtype) @ down @ up

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        factors = [layer.factors() for layer in self.layers]
        of = (dtype, *((state(down), state(up), scaling) for down, up, scaling in factors))
        if self._made is None or self._made[0] != of:
            downs, ups, scalings = zip(*factors, strict=True)
            # In that type before they are scaled: 16 bits would round once more.
            scaled = [up.detach().to(dtype).T * scaling for up, scaling in zip(ups, scalings, strict=True)]
            down = torch.cat([down.detach().to(dtype) for down in downs]).T.contiguous()
            self._made = of, down, torch.block_diag(*scaled)
        return self._made[1:]
