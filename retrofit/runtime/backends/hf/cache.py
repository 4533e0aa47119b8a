"""Base K/V of every layer, one slot a sequence.

Rollback is not advancing: lengths live with the requests, a rejected row's K/V is overwritten by the next row at its
position, and what lies beyond a sequence's length is never visible.  Memory starts as zeros, because a masked slot
must be finite (0 * NaN = NaN).  Draft rows never come here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


class KVCache:
    """Per layer K and V of shape [slots, capacity, heads, width]; K and V widths may differ (MLA)."""

    def __init__(self, slots: int, capacity: int):
        self.slots = slots
        self.capacity = capacity
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.staged: dict[int, tuple[Tensor, Tensor]] = {}
        self.views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """(layer, slot) -> that sequence's K and V as [1, heads, capacity, width]."""

    def open(self, slot: int, positions: int) -> None:
        """Every slot has room for `capacity` positions already."""

    def close(self, slot: int) -> None:
        """What a slot holds is overwritten by its next sequence."""

    def release(self) -> None:
        """Its memory goes with it."""

    def take_out(self, slot: int, first: int, stop: int) -> dict[int, tuple[Tensor, Tensor]]:
        """layer -> copies of K and V [positions, heads, width]."""
        return {
            layer: (keys[slot, first:stop].clone(), values[slot, first:stop].clone())
            for layer, (keys, values) in self.layers.items()
        }

    def put_in(self, slot: int, first: int, kept: Sequence[dict[int, tuple[Tensor, Tensor]]]) -> None:
        for layer in kept[0]:
            if layer not in self.layers:
                self._allocate(layer, *kept[0][layer])
            for side, whole in enumerate(self.layers[layer]):
                parts = [part[layer][side] for part in kept]
                torch.cat(parts, out=whole[slot, first : first + sum(map(len, parts))])

    def write(self, layer: int, slots: Tensor, positions: Tensor, key_NHD: Tensor, value_NHD: Tensor) -> None:
        """Store row n at (slots[n], positions[n])."""
        if layer not in self.layers:
            self._allocate(layer, key_NHD, value_NHD)
        keys, values = self.layers[layer]
        keys[slots, positions] = key_NHD
        values[slots, positions] = value_NHD

    def append(
        self, layer: int, slot: int, start: int, key_1HND: Tensor, value_1HND: Tensor, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store neighbouring rows of one sequence from `start` on; returns its K and V as `read` does.

        length: of positions < length; None: up to these rows.
        The common case of plain decoding, in as few operations as it takes.
        """
        if layer not in self.layers:
            self._allocate(layer, key_1HND[0].transpose(0, 1), value_1HND[0].transpose(0, 1))
        if (layer, slot) not in self.views:
            keys, values = (t[slot : slot + 1].transpose(1, 2) for t in self.layers[layer])
            self.views[layer, slot] = (keys, values)
        keys, values = self.views[layer, slot]
        count = key_1HND.shape[2]
        keys.narrow(2, start, count).copy_(key_1HND)
        values.narrow(2, start, count).copy_(value_1HND)
        length = start + count if length is None else length
        if length > self.capacity:
            return self.read(layer, [slot], length)
        return keys.narrow(2, 0, length), values.narrow(2, 0, length)

    def _allocate(self, layer: int, key_NHD: Tensor, value_NHD: Tensor) -> None:
        self.layers[layer] = (
            key_NHD.new_zeros(self.slots, self.capacity, *key_NHD.shape[1:]),
            value_NHD.new_zeros(self.slots, self.capacity, *value_NHD.shape[1:]),
        )

    def stage(self, layer: int, key_NHD: Tensor, value_NHD: Tensor) -> None:
        """Keep a tree forward's base rows until it is known which of them are accepted."""
        self.staged[layer] = (key_NHD, value_NHD)

    def store(self, rows: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store staged row rows[n] at (slots[n], positions[n]) in every layer; forget the others."""
        for layer, (key_NHD, value_NHD) in self.staged.items():
            self.write(layer, slots, positions, key_NHD[rows], value_NHD[rows])
        self.staged = {}

    def read(self, layer: int, slots: list[int], length: int) -> tuple[Tensor, Tensor]:
        """K and V of positions < length as [S, heads, length, width]; a view where the slots are neighbours.

        Positions beyond the capacity are zeros.
        """
        if length > self.capacity:
            keys, values = self.read(layer, slots, self.capacity)
            beyond = (0, 0, 0, length - self.capacity)
            return F.pad(keys, beyond), F.pad(values, beyond)
        keys, values = self.layers[layer]
        first, last = slots[0], slots[-1]
        if slots == list(range(first, last + 1)):
            key, value = keys[first : last + 1, :length], values[first : last + 1, :length]
        else:
            index = torch.tensor(slots, device=keys.device)
            key, value = keys[index, :length], values[index, :length]
        return key.transpose(1, 2), value.transpose(1, 2)
