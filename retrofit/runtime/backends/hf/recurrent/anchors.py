"""States at anchors: what a text that was run whole leaves behind, so that blocks can hang anywhere on it.

A state after every row would be too much, so of each layer are kept the inputs of every row and a state every STRIDE
positions; the states at anchors are made from the kept one before them, row by row through the rows between, once for
all anchors that it serves.  Blocks are run in pieces of so many states as fit, and again on the way back, when their
gradients are wanted: what stands in memory is the inputs of all rows, and the states of one piece.

    position     0 ... 255 | 256 ... 280 ... 300 | 301 ... 308
                   kept ^     rows run ^ state ^    block that hangs on 300
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retrofit.runtime.backends.hf.recurrent.advance import Told
from retrofit.runtime.backends.sizes import size_for

if TYPE_CHECKING:
    from retrofit.adapters.visibility import BlockRows

STRIDE = 256
"""Positions from one kept state to the next; a multiple of the chunks that the models' functions work in."""
SPAN = 16
"""Rows whose states stand together on the way back, where gradients of the text's own rows are wanted."""
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
    run: Callable[[Inputs, Tensor], Tensor],
    told: Callable[[Inputs], Told],
) -> Tensor:
    """What a rule makes of blocks that hang on recorded texts: [n, K, H, width].

    block_inputs: [n, K, ..] of each argument.  run: (inputs, states before them) -> outputs.  told: what rows with such
    inputs [rows, texts, ..] do to states.
    """
    one = record.states[layer][0, 0]
    most = max(1, size_for(PIECE_BYTES, one.device) // one.nbytes)
    names = list(block_inputs)

    def piece(some: slice, *tensors: Tensor) -> Tensor:
        with torch.set_grad_enabled(torch.is_grad_enabled() and record.watched):
            states = _states_at(record, layer, blocks.slots[some], blocks.starts[some], told)
        return run(dict(zip(names, tensors, strict=True)), states)

    outs = []
    for first in range(0, len(blocks.slots), most):
        some = slice(first, first + most)
        tensors = [given[some] for given in block_inputs.values()]
        if torch.is_grad_enabled():
            outs.append(checkpoint(piece, some, *tensors, use_reentrant=False, preserve_rng_state=False))
        else:
            outs.append(piece(some, *tensors))
    return torch.cat(outs)


def _states_at(
    record: Record, layer: int, slots: Sequence[int], starts: Sequence[int], told: Callable[[Inputs], Told]
) -> Tensor:
    """[n, H, Dk, Dv] the states before these positions.

    Row by row through the stretches behind kept states, and not by the model's function for each anchor: of a text of
    256 positions with 64 anchors that would be 32 times the rows.
    """
    stretches = sorted({(slot, start // STRIDE) for slot, start in zip(slots, starts, strict=True)})
    number = {stretch: n for n, stretch in enumerate(stretches)}
    reached: dict[int, list[tuple[int, int]]] = {}
    for n, (slot, start) in enumerate(zip(slots, starts, strict=True)):
        reached.setdefault(start % STRIDE, []).append((n, number[slot, start // STRIDE]))
    device = record.states[layer].device
    slot_G, kept_G = torch.tensor(stretches, device=device).T
    state, count = record.states[layer][slot_G, kept_G], max(reached)
    rows = (kept_G * STRIDE + torch.arange(count, device=device)[:, None]).clamp_max(record.length - 1)
    inputs = {name: given[slot_G, rows] for (n, name), given in record.rows.items() if n == layer and name != "before"}
    does = told(inputs)

    def wanted(row: int, state: Tensor) -> list[Tensor]:
        """Of the anchors before this row."""
        return [state[[of for _, of in reached[row]]]] if row in reached else []

    def span(first: int, state: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The state behind so many rows from `first` on, and those of anchors among them."""
        found = []
        for row in range(first, min(first + SPAN, count)):
            state = does.passed(state, row)
            found += wanted(row + 1, state)
        return state, found

    found = wanted(0, state)
    for first in range(0, count, SPAN):
        if torch.is_grad_enabled():
            state, more = checkpoint(span, first, state, use_reentrant=False, preserve_rng_state=False)
        else:
            state, more = span(first, state)
        found += more
    order = [n for row in sorted(reached) for n, _ in reached[row]]
    return torch.cat(found)[torch.tensor(order, device=device).argsort()]


def _places(blocks: BlockRows) -> tuple[Tensor, Tensor]:
    """Slots and first positions of blocks."""
    return torch.tensor(blocks.slots, device=blocks.device), torch.tensor(blocks.starts, device=blocks.device)
