"""The states of recurrent layers, one a sequence, and what base rows wrote that may yet be rejected.

    state of a slot     that of the text up to position `at`: the convolution's last inputs, and the recurrence's matrix
    a step              base rows from `at` on; what they wrote is kept, the state is not touched
    the next step       says by its first position how many of them were accepted: so many are replayed

Replaying takes two elementwise operations a row and layer, and a row's write is a hundredth of a state, which is why
writes are kept and not the state after every row.  A rejected row leaves nothing: what it wrote is dropped.
A text's state is at one position only; there is no way back but from its start.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from retrofit.adapters.rows import RowPlan
from retrofit.runtime.backends.hf.recurrent.advance import Writes, replay
from retrofit.runtime.backends.hf.recurrent.anchors import Record


@dataclass(eq=False)
class Step:
    """What the base rows of one forward wrote, by layer: inputs [B, C] of the convolution, and to the state."""

    inputs: dict[int, Tensor] = field(default_factory=dict)
    writes: dict[int, Writes] = field(default_factory=dict)


class States:
    """By layer: `inputs` [slots, reach, C], the last ones, oldest first, and `matrices` [slots, H, Dk, Dv], fp32."""

    def __init__(self, slots: int):
        self.slots = slots
        self.at = [0] * slots
        """The position up to which each slot's text is in its state."""
        self.inputs: dict[int, Tensor] = {}
        self.matrices: dict[int, Tensor] = {}
        self.step = Step()
        """What the base rows of the newest forward wrote."""
        self.pending: dict[int, tuple[Step, list[int] | None]] = {}
        """Slot -> its base rows of its newest step, from `at` on; None: they branch, and no path was kept."""
        self.record: Record | None = None
        """Of texts that blocks hang on anywhere: what all their rows had."""

    @property
    def nbytes(self) -> int:
        recorded = 0 if self.record is None else self.record.nbytes
        return recorded + sum(t.nbytes for t in (*self.inputs.values(), *self.matrices.values()))

    @property
    def layers(self) -> set[int]:
        """Those that have a state; not every one convolves, nor does every one have a matrix."""
        return self.inputs.keys() | self.matrices.keys()

    def close(self, slot: int) -> None:
        """Forget what may yet be accepted."""
        self.pending.pop(slot, None)

    def begin(self, plan: RowPlan) -> None:
        """Before a forward: commit what its sequences have accepted of the rows before, and forget the others.

        A sequence whose base rows begin at position 0 begins anew.  Raises ValueError for one that goes back.
        """
        if self.record is not None and plan.base is None:
            return
        accepted: dict[Step, list[tuple[int, list[int]]]] = {}
        for sequence in plan.sequences:
            slot, start = sequence.slot, sequence.start
            if start == 0:
                self._reset(slot)
                continue
            step, rows = self.pending.pop(slot, (self.step, []))
            count = start - self.at[slot]
            rows = [] if rows is None and not count else rows
            if rows is None or not 0 <= count <= len(rows):
                raise ValueError(
                    f"slot {slot} has the state of recurrent layers at position {self.at[slot]}; rows from {start} on "
                    "would need another"
                )
            if count:
                accepted.setdefault(step, []).append((slot, rows[:count]))
            self.at[slot] = start
        for step, paths in accepted.items():
            self._commit(step, paths)
        self.step, row = Step(), 0
        for sequence in plan.sequences:
            count = len(sequence.tokens)
            if plan.prompts:
                self.at[sequence.slot] += count
            elif count:
                rows = None if sequence.parents is not None else list(range(row, row + count))
                self.pending[sequence.slot] = self.step, rows
            row += count

    def keep(self, rows: Sequence[int], slots: Sequence[int]) -> None:
        """Of the newest forward, whose drafts branched: base row rows[n] continues the text of slots[n]."""
        paths: dict[int, list[int]] = {}
        for row, slot in zip(rows, slots, strict=True):
            paths.setdefault(slot, []).append(row)
        for slot, path in paths.items():
            if slot in self.pending:
                self.pending[slot] = self.pending[slot][0], path

    def take_out(self, slot: int, stop: int) -> dict[int, tuple[Tensor, ...]]:
        """Layer -> copies of its state.  Raises ValueError where that is not the one at position `stop`."""
        if self.layers and self.at[slot] != stop:
            raise ValueError(f"slot {slot} has the state of recurrent layers at position {self.at[slot]}, not {stop}")
        return {layer: tuple(held[slot].clone() for held in self._held(layer)) for layer in self.layers}

    def put_in(self, slot: int, stop: int, taken: dict[int, tuple[Tensor, ...]]) -> None:
        """What was taken out of another slot: the state at position `stop`."""
        self.pending.pop(slot, None)
        self.at[slot] = stop
        for layer, tensors in taken.items():
            for held, tensor in zip(self._held(layer), tensors, strict=True):
                held[slot] = tensor

    def inputs_of(self, layer: int, row_NC: Tensor, reach: int) -> Tensor:
        """[slots, reach, C] for inputs that look like these rows."""
        if layer not in self.inputs:
            self.inputs[layer] = row_NC.new_zeros(self.slots, reach, row_NC.shape[1])
        return self.inputs[layer]

    def matrices_of(self, layer: int, heads: int, left: int, right: int, device: torch.device) -> Tensor:
        """[slots, heads, left, right]."""
        if layer not in self.matrices:
            self.matrices[layer] = torch.zeros(self.slots, heads, left, right, device=device)
        return self.matrices[layer]

    def _held(self, layer: int) -> list[Tensor]:
        return [held[layer] for held in (self.inputs, self.matrices) if layer in held]

    def _reset(self, slot: int) -> None:
        self.pending.pop(slot, None)
        self.at[slot] = 0
        for held in (*self.inputs.values(), *self.matrices.values()):
            held[slot].zero_()

    def _commit(self, step: Step, paths: list[tuple[int, list[int]]]) -> None:
        for layer, new in step.inputs.items():
            held = self.inputs[layer]
            for slot, rows in paths:
                held[slot] = torch.cat([held[slot], new[rows]])[-held.shape[1] :]
        for depth in range(max(len(rows) for _, rows in paths)):
            there = [(slot, rows[depth]) for slot, rows in paths if len(rows) > depth]
            slots, rows = [slot for slot, _ in there], [row for _, row in there]
            for layer, writes in step.writes.items():
                if len(slots) == 1:
                    slot, row = slots[0], rows[0]
                    replay(self.matrices[layer][slot : slot + 1], writes.some(slice(row, row + 1)))
                else:
                    states = self.matrices[layer][slots]
                    replay(states, writes.some(torch.tensor(rows, device=states.device)))
                    self.matrices[layer][slots] = states
