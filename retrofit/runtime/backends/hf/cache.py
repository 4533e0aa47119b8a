"""Base K/V of every layer, one slot a sequence.

Rollback is not advancing: lengths live with the requests, a rejected row's K/V is overwritten by the next row at its
position, and what lies beyond a sequence's length is never visible.  Memory starts as zeros, because a masked slot
must be finite (0 * NaN = NaN).  Draft rows never come here.

A layer that slides keeps its window and some room: when the room is used up, what is still within the window moves to
the front, once in hundreds of positions.

    position   ..  begin  begin + 1  ..             begin: of each slot, a multiple of `STEP`
    column             0          1  ..  length     so products find the positions cut where a full layer cuts them
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.runtime.backends.hf.recurrent.states import States

STEP = 256
"""Keys are cut at multiples of so many positions."""
ROOM = 512
"""Positions that a sliding layer takes in before what it keeps moves to the front."""

Taken = dict[int, tuple[Tensor, ...]]
"""layer -> K and V [positions, heads, width]; its state, where it has one, under `state_of(layer)`."""


def state_of(layer: int) -> int:
    """What stands for a layer's state beside its K and V: some layers have both."""
    return ~layer


class KVCache:
    """Per layer K and V of shape [slots, heads, columns, width]; K and V widths may differ (MLA)."""

    def __init__(self, slots: int, capacity: int, sliding: Mapping[int, int] | None = None):
        """sliding: layer -> window, of layers that keep no more than that."""
        self.slots = slots
        self.capacity = capacity
        sliding = sliding or {}
        self.window = max(sliding.values(), default=0)
        kept = max(self.window, STEP)
        self.length = -(-kept // STEP) * STEP + STEP + ROOM
        """Columns of a sliding layer."""
        self.sliding = frozenset(sliding) if self.length < capacity else frozenset()
        self.most_rows = ROOM - STEP if sliding else None  # not by the capacity, which others' texts decide
        self.begins = [0] * slots
        """The position in column 0 of each slot's sliding layers."""
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.staged: dict[int, tuple[Tensor, Tensor]] = {}
        self.states = States(slots)
        """What recurrent layers have in the place of K and V."""
        self.views: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        """(layer, slot) -> that sequence's K and V as [1, heads, columns, width]."""

    def open(self, slot: int, positions: int) -> None:
        """Every slot has room for `capacity` positions already."""
        self.begins[slot] = 0

    def close(self, slot: int) -> None:
        """What a slot holds is overwritten by its next sequence."""
        self.states.close(slot)

    def release(self) -> None:
        """Its memory goes with it."""

    @property
    def nbytes(self) -> int:
        """Of what has been allocated: a layer is at its first row."""
        return self.states.nbytes + sum(t.nbytes for pair in self.layers.values() for t in pair)

    def columns(self, layer: int) -> int:
        return self.length if layer in self.sliding else self.capacity

    def begins_of(self, layer: int) -> Sequence[int] | None:
        """The position in column 0 of each slot; None: it is 0 in all."""
        return self.begins if layer in self.sliding and any(self.begins) else None

    def make_room(self, slot: int, start: int, count: int) -> None:
        """Before a forward writes positions start, start + 1, ... of a sequence: let sliding layers move on.

        What the rows see stays, and at least `STEP` positions before them, where they were there.
        Raises ValueError for rows of which sliding layers have let go what they see, or more than `most_rows`.
        """
        if not self.sliding:
            return
        begin, stop = self.begins[slot], start + count
        if start == 0:  # the sequence begins, or begins again
            begin = self.begins[slot] = 0
        elif stop > begin + self.length:
            begin = max(begin, (start - max(self.window, STEP)) // STEP * STEP)
        if begin > max(0, start - self.window + 1) or stop > begin + self.length:
            raise ValueError(
                f"slot {slot} holds positions from {begin} on in layers that slide over {self.window}; "
                f"{count} rows from {start} on do not fit"
            )
        moved, self.begins[slot] = begin - self.begins[slot], begin
        if moved:
            for layer in self.sliding & self.layers.keys():
                for kept in self.layers[layer]:
                    seen = kept[slot, :, moved : moved + start - begin].clone()
                    kept[slot, :, : seen.shape[1]] = seen

    def take_out(self, slot: int, first: int, stop: int) -> Taken:
        """layer -> copies of K and V [positions, heads, width], or of a state, which has to be that at `stop`.

        A sliding layer's begin where it still has them, so they may be fewer; the last of them is the same position.
        """
        taken: Taken = {state_of(layer): held for layer, held in self.states.take_out(slot, stop).items()}
        for layer, (keys, values) in self.layers.items():
            begin = self.begins[slot] if layer in self.sliding else 0
            columns = slice(max(first - begin, 0), max(stop - begin, 0))
            taken[layer] = tuple(t[slot, :, columns].transpose(0, 1).clone() for t in (keys, values))
        return taken

    def put_in(self, slot: int, first: int, kept: Sequence[Taken], stop: int | None = None) -> None:
        """A sliding layer takes what rows behind the last part see; with recurrent layers there is one part, whole."""
        if self.states.layers:
            assert stop is not None and len(kept) == 1
            self.states.put_in(slot, stop, {state_of(n): held for n, held in kept[0].items() if n < 0})
            kept = [{n: pair for n, pair in kept[0].items() if n >= 0}]
        for layer, pair in kept[0].items():
            if layer not in self.layers:
                self.allocate(layer, *(t.transpose(0, 1)[None] for t in pair))
        counts = [max((len(pair[0]) for pair in part.values()), default=0) for part in kept]
        if stop is not None:  # of what was taken out whole, each sliding layer may have the end alone
            counts[0] += stop - first - sum(counts)
        stop = first + sum(counts)
        if self.sliding:
            self.begins[slot] = max(0, stop - max(self.window, STEP)) // STEP * STEP
        for layer, pair in self.layers.items():
            end = stop - (self.begins[slot] if layer in self.sliding else 0)
            for part, count in zip(reversed(kept), reversed(counts), strict=True):
                for whole, rows in zip(pair, part[layer], strict=True):
                    there = min(len(rows), max(end, 0))
                    whole[slot, :, max(end, 0) - there : max(end, 0)] = rows[len(rows) - there :].transpose(0, 1)
                end -= count

    def write(self, layer: int, slots: Tensor, columns: Tensor, key_NHD: Tensor, value_NHD: Tensor) -> None:
        """Store row n at (slots[n], columns[n]); in a full layer a column is a position."""
        if layer not in self.layers:
            self.allocate(layer, key_NHD.transpose(0, 1)[None], value_NHD.transpose(0, 1)[None])
        keys, values = self.layers[layer]
        keys[slots, :, columns] = key_NHD
        values[slots, :, columns] = value_NHD

    def append(
        self, layer: int, slot: int, column: int, key_1HND: Tensor, value_1HND: Tensor, length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Store neighbouring rows of one sequence from `column` on; returns its K and V as `read` does.

        length: of columns < length; None: up to these rows.
        The common case of plain decoding, in as few operations as it takes.
        """
        if layer not in self.layers:
            self.allocate(layer, key_1HND, value_1HND)
        if (layer, slot) not in self.views:
            keys, values = (t[slot : slot + 1] for t in self.layers[layer])
            self.views[layer, slot] = (keys, values)
        keys, values = self.views[layer, slot]
        count = key_1HND.shape[2]
        keys.narrow(2, column, count).copy_(key_1HND)
        values.narrow(2, column, count).copy_(value_1HND)
        length = column + count if length is None else length
        if length > keys.shape[2]:
            return self.read(layer, [slot], length)
        return keys.narrow(2, 0, length), values.narrow(2, 0, length)

    def allocate(self, layer: int, key_1HND: Tensor, value_1HND: Tensor) -> None:
        """Make room for a layer whose rows look like these."""
        key, value = (
            t.new_zeros(self.slots, t.shape[1], self.columns(layer), t.shape[3]) for t in (key_1HND, value_1HND)
        )
        self.layers[layer] = key, value

    def stage(self, layer: int, key_NHD: Tensor, value_NHD: Tensor) -> None:
        """Keep a tree forward's base rows until it is known which of them are accepted."""
        self.staged[layer] = (key_NHD, value_NHD)

    def store(self, rows: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Store staged row rows[n] at (slots[n], positions[n]) in every layer; forget the others."""
        if self.states.layers:
            self.states.keep(rows.tolist(), slots.tolist())
        begins = torch.tensor(self.begins, device=slots.device)
        columns = positions - begins[slots] if self.sliding else positions
        for layer, (key_NHD, value_NHD) in self.staged.items():
            where = columns if layer in self.sliding else positions
            self.write(layer, slots, where, key_NHD[rows], value_NHD[rows])
        self.staged = {}

    def read(self, layer: int, slots: list[int], length: int) -> tuple[Tensor, Tensor]:
        """K and V of columns < length as [S, heads, length, width]; a view where the slots are neighbours.

        What lies beyond the last column is zeros.
        """
        keys, values = self.layers[layer]
        if length > keys.shape[2]:
            beyond = (0, 0, 0, length - keys.shape[2])
            keys, values = self.read(layer, slots, keys.shape[2])
            return F.pad(keys, beyond), F.pad(values, beyond)
        first, last = slots[0], slots[-1]
        if slots == list(range(first, last + 1)):
            return keys[first : last + 1, :, :length], values[first : last + 1, :, :length]
        index = torch.tensor(slots, device=keys.device)
        return keys[index, :, :length], values[index, :, :length]
