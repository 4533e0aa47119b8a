"""LoRA that acts on draft rows only.

The base layer runs first, over all rows; the low-rank update is then added to the slice of draft rows.  A base row's
value is never an operand of anything that involves the adapter, so even NaN weights cannot reach it (a gate that
multiplies by 0 or 1 would: 0 * NaN = NaN).  LoRA: Hu et al. 2021, arXiv 2106.09685; gating by row: Samragh et al. 2025,
arXiv 2507.11851.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn


class Gate:
    """How many leading rows of the current forward are base rows; None: all of them (the adapter is off)."""

    def __init__(self) -> None:
        self.base_rows: int | None = None


class GatedLoraLinear(lora.Linear):
    """`peft`'s LoRA linear layer, applied to rows >= gate.base_rows of the second-last dimension."""

    gate: Gate
    plain: nn.Linear | None

    def close_over(self, gate: Gate) -> None:
        """Obey this gate.  Also keeps the base layer at hand where it is a plain linear layer."""
        self.gate = gate
        self.__dict__["plain"] = self.base_layer if type(self.base_layer) is nn.Linear else None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., N, in] -> [..., N, out]."""
        base, first = self.plain, self.gate.base_rows
        hooked = base is None or base._forward_hooks or base._forward_pre_hooks or "forward" in base.__dict__
        if base is None or hooked:
            out: Tensor = self.base_layer(x)
        else:
            # What the layer would do, past the module machinery: a tenth of a small model's decode step.
            out = F.linear(x, base._parameters["weight"], base._parameters["bias"])  # type: ignore[arg-type]
        if first is None or first >= x.shape[-2]:
            return out
        adapter = self.active_adapters[0]
        rows = x[..., first:, :]
        down, up = self.lora_A[adapter], self.lora_B[adapter]
        update = up(down(rows.to(down.weight.dtype))) * self.scaling[adapter]
        if first == 0:
            return out + update.to(out.dtype)
        out[..., first:, :] += update.to(out.dtype)
        return out
