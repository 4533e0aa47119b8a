"""Base K/V of every layer, one slot a sequence.

Rollback is not advancing: lengths live with the requests, a rejected row's K/V is overwritten by the next row at its
position, and what lies beyond a sequence's length is never visible.  Memory starts as zeros, because a masked slot
must be finite (0 * NaN = NaN).  Draft rows never come here.
"""

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Per layer K and V of shape [slots, capacity, heads, width]; K and V widths may differ (MLA)."""

    def __init__(self, slots: int, capacity: int):
        self.slots = slots
        self.capacity = capacity
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.staged: dict[int, tuple[Tensor, Tensor]] = {}

    def reserve(self, slots: int, capacity: int) -> None:
        """Grow to hold at least so many sequences and positions; what is written stays."""
        slots, capacity = max(slots, self.slots), max(capacity, self.capacity)
        if (slots, capacity) == (self.slots, self.capacity):
            return
        for layer, pair in self.layers.items():
            grown = tuple(t.new_zeros(slots, capacity, *t.shape[2:]) for t in pair)
            for new, old in zip(grown, pair, strict=True):
                new[: self.slots, : self.capacity] = old
            self.layers[layer] = (grown[0], grown[1])
        self.slots, self.capacity = slots, capacity

    def write(self, layer: int, slots: Tensor, positions: Tensor, key_NHD: Tensor, value_NHD: Tensor) -> None:
        """Store row n at (slots[n], positions[n])."""
        if layer not in self.layers:
            self.layers[layer] = (
                key_NHD.new_zeros(self.slots, self.capacity, *key_NHD.shape[1:]),
                value_NHD.new_zeros(self.slots, self.capacity, *value_NHD.shape[1:]),
            )
        keys, values = self.layers[layer]
        keys[slots, positions] = key_NHD
        values[slots, positions] = value_NHD

    def stage(self, layer: int, key_NHD: Tensor, value_NHD: Tensor) -> None:
        """Keep a tree forward's base rows until it is known which of them are accepted."""
        self.staged[layer] = (key_NHD, value_NHD)

    def store(self, rows: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store staged row rows[n] at (slots[n], positions[n]) in every layer; forget the others."""
        for layer, (key_NHD, value_NHD) in self.staged.items():
            self.write(layer, slots, positions, key_NHD[rows], value_NHD[rows])
        self.staged = {}

    def read(self, layer: int, slots: list[int], length: int) -> tuple[Tensor, Tensor]:
        """K and V of positions < length as [S, heads, length, width]; a view where the slots are neighbours."""
        keys, values = self.layers[layer]
        first, last = slots[0], slots[-1]
        if slots == list(range(first, last + 1)):
            key, value = keys[first : last + 1, :length], values[first : last + 1, :length]
        else:
            index = torch.tensor(slots, device=keys.device)
            key, value = keys[index, :length], values[index, :length]
        return key.transpose(1, 2), value.transpose(1, 2)

    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for pair in self.layers.values() for t in pair)
