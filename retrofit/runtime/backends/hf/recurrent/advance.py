"""Advance states by rows: S <- decay S + left right^T, out = S^T read.

The gated delta rule (Yang et al. 2024, arXiv 2412.06464), Kimi's (arXiv 2510.26692), Mamba (Gu and Dao 2023, arXiv
2312.00752) and Mamba-2 (Dao and Gu 2024, arXiv 2405.21060) are all of this form.  They differ in what a row writes on
the right, and in whether each row of S has a decay of its own; in Mamba each channel is a head whose S has one column.
All is elementwise or a sum in an order of its own, so that a row's bits do not depend on how many rows advance beside
it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from retrofit.runtime.backends.hf.recurrent.forest import Forest, Index


@dataclass(frozen=True)
class Writes:
    """What rows write: decay [N, H, Dk or 1], left [N, H or 1, Dk], right [N, H, Dv], fp32."""

    decay: Tensor
    left: Tensor
    right: Tensor

    def some(self, rows: Index) -> Writes:
        return Writes(self.decay[rows], self.left[rows], self.right[rows])


class Told(NamedTuple):
    """What rows [N, ..] do to their states; decay and left as in `Writes`."""

    decay: Tensor
    left: Tensor
    right_of: Callable[[Tensor, Any], Tensor]
    """(decayed states of some rows, an index of those) -> what they write on the right."""

    def passed(self, state: Tensor, some: Any) -> Tensor:
        """The states behind some rows, from those before them."""
        state = state * self.decay[some][..., None]
        return state + self.left[some][..., None] * self.right_of(state, some)[..., None, :]


def advance(forest: Forest, states: Tensor, told: Told, read: Tensor, width: int) -> tuple[Tensor, Writes]:
    """Run every row behind the row that it follows: out [N, H, width], zero for filler, and what the rows wrote.

    states [slots, H, Dk, width]: of the committed texts; not changed.  read [N, H or 1, Dk].
    """
    decay, left, right_of = told
    out, right = (decay.new_zeros(*decay.shape[:2], width) for _ in range(2))
    state = states
    for level in forest.levels:
        rows = level.rows
        state = state if level.before is None else state[level.before]
        state = state * decay[rows][..., None]
        right[rows] = written = right_of(state, rows)
        state = state + left[rows][..., None] * written[..., None, :]
        out[rows] = folded(state * read[rows][..., None])
    return out, Writes(decay, left, right)


def replay(states: Tensor, writes: Writes) -> None:
    """Advance states [n, H, Dk, Dv] by one row each, in place, to the bits that `advance` had."""
    states.mul_(writes.decay[..., None])
    states.add_(writes.left[..., None] * writes.right[..., None, :])


def folded(x: Tensor) -> Tensor:
    """The sum over the second-last dimension, halves added to halves: in the same order whatever x has besides.

    `sum` adds in an order that depends on the shape, and on how many threads share it.
    """
    while (n := x.shape[-2]) > 1:
        half = n // 2
        rest = x[..., 2 * half :, :]
        x = x[..., :half, :] + x[..., half : 2 * half, :]
        if n % 2:
            x = torch.cat([x, rest], dim=-2)
    return x[..., 0, :]
