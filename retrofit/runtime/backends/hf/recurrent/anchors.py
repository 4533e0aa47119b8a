"""States at anchors: what a text that was run whole leaves behind, so that blocks can hang anywhere on it.

A state after every row would be too much, so of each layer are kept the inputs of every row and a state every STRIDE
positions; the state at an anchor is made from the one before it, by the model's own function over the rows between.
Blocks are run in pieces of so many states as fit, and again on the way back, when their gradients are wanted: what
stands in memory is the inputs of all rows, and the states of one piece.

    position     0 ... 255 | 256 ... 300 | 301 ... 308
                   kept ^     rows run ^    block that hangs on 300
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retrofit.runtime.backends.sizes import size_for

if TYPE_CHECKING:
    from retrofit.adapters.visibility import BlockRows

STRIDE = 256
"""Positions from one kept state to the next; a multiple of the chunks that the models' functions work in."""
PIECE_BYTES = {"cpu": 1 << 26, "cuda": 1 << 29}
"""Of the states that are there at once."""

Inputs = Mapping[str, Tensor]
"""Of a rule, by the name of its argument: [.., rows, heads, ..]."""


class Record:
    """What all rows of some texts had, by layer."""

    def __init__(self, slots: int, length: int):
        """length: of the longest text."""
        self.slots, self.length = slots, length
        self.rows: dict[tuple[int, str], Tensor] = {}
        """(layer, name of an input) -> [slots, length, ..]; the convolution's is "before", its reach more in front."""
        self.states: dict[int, Tensor] = {}
        """Layer -> [slots, n, H, Dk, Dv] after 0, STRIDE, 2 STRIDE, .. rows."""
        self.watched = False
        """Whether gradients of all that is kept here are wanted."""

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (*self.rows.values(), *self.states.values()))

    def note(self, layer: int, slot: int, first: int, inputs: Inputs, reach: int = 0) -> None:
        """Of a text's rows from position `first` on."""
        for name, given in inputs.items():
            key = (layer, name)
            if key not in self.rows:
                self.rows[key] = given.new_zeros(self.slots, reach + self.length, *given.shape[1:])
            self.rows[key][slot, reach + first : reach + first + len(given)] = given

    def passed(self, layer: int, slot: int, position: int, state: Tensor) -> None:
        """The state [H, Dk, Dv] after so many rows, kept where it is one of those that are."""
        if layer not in self.states:
            self.states[layer] = state.new_zeros(self.slots, self.length // STRIDE + 1, *state.shape)
        if position % STRIDE == 0:
            self.states[layer][slot, position // STRIDE] = state

    def before(self, layer: int, blocks: BlockRows, reach: int) -> Tensor:
        """[n, reach, C] the convolution's inputs before each block."""
        slots, starts = _places(blocks)
        return self.rows[layer, "before"][slots[:, None], starts[:, None] + torch.arange(reach, device=starts.device)]


def at_anchors(
    record: Record,
    layer: int,
    blocks: BlockRows,
    block_inputs: dict[str, Tensor],
    run: Callable[[Inputs, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """What a rule makes of blocks that hang on recorded texts: [n, K, H, width].

    block_inputs: [n, K, ..] of each argument.  run: (inputs, states before them, [n, m] which of their rows are there,
    or None: all) -> outputs, or where some are not, the states behind those that are.
    """
    slots, starts = _places(blocks)
    one = record.states[layer][0, 0]
    most = max(1, size_for(PIECE_BYTES, one.device) // one.nbytes)
    names = list(block_inputs)

    def piece(some: slice, *tensors: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and record.watched):
            states = _state_at(record, layer, slots[some], starts[some], names, run)
        return run(dict(zip(names, tensors, strict=True)), states, None)

    outs = []
    for first in range(0, len(slots), most):
        some = slice(first, first + most)
        tensors = [given[some] for given in block_inputs.values()]
        if torch.is_grad_enabled():
            outs.append(checkpoint(piece, some, *tensors, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(piece(some, *tensors))
    return torch.cat(outs)


def _state_at(
    record: Record,
    layer: int,
    slots: Tensor,
    starts: Tensor,
    names: list[str],
    run: Callable[[Inputs, Tensor, Tensor | None], Tensor],
) -> Tensor:
    """[n, H, Dk, Dv] the states before these positions."""
    states = record.states[layer][slots, starts // STRIDE]
    missing = starts % STRIDE
    rows = torch.arange(int(missing.max()), device=starts.device)
    if not len(rows):
        return states
    there = rows < missing[:, None]
    places = torch.where(there, (starts - missing)[:, None] + rows, 0)
    inputs = {name: record.rows[layer, name][slots[:, None], places] for name in names if (layer, name) in record.rows}
    return run(inputs, states, there)


def _places(blocks: BlockRows) -> tuple[Tensor, Tensor]:
    """Slots and first positions of blocks."""
    return torch.tensor(blocks.slots, device=blocks.device), torch.tensor(blocks.starts, device=blocks.device)
