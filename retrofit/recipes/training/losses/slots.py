"""How much each slot of a block weighs in L_draft; all weights are detached.

Every function takes, per block and slot, the distance TV(p, q), whether the slot is eligible, and whether it is a hit,
1[argmax q = argmax p].  Shapes: B blocks, D drafting rows per block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def dpace_weights(tv_BD: Tensor, eligible_BD: Tensor, hit_BD: Tensor | None = None) -> Tensor:
    """[B, D] D-PACE slot weights: how much the expected accepted length changes with each slot.

    a_i = .5 (1 - TV_i) + .5;  w_j = prod_{i<j} a_i * (1 + sum_{m>j} prod_{j<i<=m} a_i).  Ineligible slots weigh 0 and
    end the block.
    """
    a = torch.where(eligible_BD, 0.5 * (1 - tv_BD) + 0.5, torch.zeros_like(tv_BD))
    before = _before(a)
    after = torch.zeros_like(a)
    for j in range(a.shape[1] - 2, -1, -1):
        after[:, j] = a[:, j + 1] * (1 + after[:, j + 1])
    return torch.where(eligible_BD, before * (1 + after), torch.zeros_like(a))


def exponential_weights(tv_BD: Tensor, eligible_BD: Tensor, hit_BD: Tensor | None = None, decay: float = 4.0) -> Tensor:
    """[B, D] exp(-(j-1)/decay), the fixed alternative (DFlash: decay 4 at block 8)."""
    slots = torch.arange(tv_BD.shape[1], device=tv_BD.device, dtype=tv_BD.dtype)
    return torch.exp(-slots / decay) * eligible_BD


def uniform_weights(tv_BD: Tensor, eligible_BD: Tensor, hit_BD: Tensor | None = None) -> Tensor:
    """[B, D] 1 for every eligible slot."""
    return eligible_BD.to(tv_BD.dtype)


def reached_weights(tv_BD: Tensor, eligible_BD: Tensor, hit_BD: Tensor) -> Tensor:
    """[B, D] 1 up to and with the first slot that misses: those decoding reaches (arXiv 2607.05722, appendix B)."""
    return _before((eligible_BD & hit_BD).to(tv_BD.dtype)) * eligible_BD


def _before(a_BD: Tensor) -> Tensor:
    """[B, D] products of all slots before."""
    return torch.cumprod(torch.cat([torch.ones_like(a_BD[:, :1]), a_BD[:, :-1]], dim=1), dim=1)


SLOT_WEIGHTS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "dpace": dpace_weights,
    "exponential": exponential_weights,
    "uniform": uniform_weights,
    "reached": reached_weights,
}
