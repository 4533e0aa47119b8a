"""The fused backend's K/V cache: pages of one pool, handed to a sequence when it starts, taken back when it ends.

All memory is allocated up front.  Rollback is not advancing: a rejected row's K/V is overwritten by the next row at its
place.  Rows of a draft tree take a place each behind the seed (row j at position p + j); the accepted ones are then
moved to their own positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from retrofit.errors import ResourceError
from retrofit.runtime.kernels.rows import PAGE

UNOWNED = -1
"""A page that a slot does not have."""
HEADROOM = 128
"""Positions a sequence owns beyond its last token: a draft tree's rows stand there until they are accepted."""


def pages_for(positions: int) -> int:
    """Pages that hold so many positions and the headroom of a draft tree."""
    return -(-(positions + HEADROOM) // PAGE)


class PagedCache:
    """keys, values [layers, pages, K/V heads, PAGE, head width]; block_table int32 [slots, pages per slot]."""

    most_rows: int | None = None

    def __init__(
        self,
        shape: tuple[int, int, int],
        slots: int,
        capacity: int,
        pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        """shape: (layers, K/V heads, head width).  capacity: positions of the longest sequence.

        Raises ResourceError when the pool does not fit into the device's free memory.
        """
        layers, heads, width = shape
        self.slots, self.capacity, self.pages = slots, capacity, pages
        need = 2 * layers * pages * heads * PAGE * width * torch.empty(0, dtype=dtype).element_size()
        if device.type == "cuda" and need > (free := torch.cuda.mem_get_info(device)[0]):
            raise ResourceError(
                f"the K/V cache of {slots} requests of up to {capacity} tokens needs {need / 2**30:.1f} GiB, "
                f"{free / 2**30:.1f} GiB of {device} are free",
                "run fewer requests at once (--batch-size), shorter ones (--max-new-tokens), or use a larger GPU",
            )
        self.keys = torch.zeros(layers, pages, heads, PAGE, width, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        # One row more than there are slots: a lane of the device loop that is idle reads it.
        self.block_table = torch.zeros(slots + 1, pages_for(capacity), dtype=torch.int32, device=device)
        self.free = list(range(pages - 1, -1, -1))
        self.owned: dict[int, list[int]] = {}
        self.table = [[UNOWNED] * pages_for(capacity) for _ in range(slots)]
        """The block table as the host knows it."""
        self.loops: dict[Any, Any] = {}
        """Sampling parameters -> the steps recorded over this memory (`device.loop.DeviceLoop`), latest last."""
        self.leased = False
        """Whether somebody decodes with it."""
        self.staged: Tensor | None = None
        """Places of the base rows of the last tree forward."""

    @property
    def nbytes(self) -> int:
        return 2 * self.keys.nbytes

    def open(self, slot: int, positions: int) -> None:
        """Give `slot` the pages for a sequence of so many positions.

        Raises ResourceError where the pool is too small for it.
        """
        self.close(slot)
        count = pages_for(positions)
        if count > len(self.free) or count > len(self.table[slot]):
            raise ResourceError(
                f"a request of {positions} tokens needs {count} pages of the K/V cache; "
                f"{min(len(self.free), len(self.table[slot]))} are free",
                "run fewer requests at once, or shorter ones",
            )
        pages = [self.free.pop() for _ in range(count)]
        self.owned[slot] = pages
        self.table[slot] = pages + [UNOWNED] * (len(self.table[slot]) - count)
        self.block_table[slot, :count] = torch.tensor(pages, dtype=torch.int32)

    def close(self, slot: int) -> None:
        self.free.extend(reversed(self.owned.pop(slot, [])))

    def release(self) -> None:
        """All sequences are finished; the next call may use the same memory, and the steps recorded over it."""
        for slot in list(self.owned):
            self.close(slot)
        self.leased = False

    def take_out(self, slot: int, first: int, stop: int) -> tuple[Tensor, Tensor]:
        """Copies of the pages [layers, n, K/V heads, PAGE, head width] that hold these positions."""
        pages = self._pages(slot, first // PAGE, -(-stop // PAGE))
        return self.keys[:, pages], self.values[:, pages]

    def put_in(self, slot: int, first: int, kept: Sequence[tuple[Tensor, Tensor]], stop: int | None = None) -> None:
        """kept: whole pages, but for the last one."""
        page = first // PAGE
        for keys, values in kept:
            pages = self._pages(slot, page, page + keys.shape[1])
            self.keys[:, pages], self.values[:, pages] = keys, values
            page += keys.shape[1]

    def _pages(self, slot: int, first: int, stop: int) -> Tensor:
        return torch.tensor(self.table[slot][first:stop], device=self.keys.device)

    def place(self, slot: int, position: int) -> int:
        """page * PAGE + offset of a position."""
        assert self.table[slot][position // PAGE] != UNOWNED, f"position {position} is beyond what slot {slot} owns"
        return self.table[slot][position // PAGE] * PAGE + position % PAGE

    def places(self, slot: int, positions: Sequence[int]) -> list[int]:
        return [self.place(slot, p) for p in positions]

    def store(self, rows: Tensor, slots: Tensor, positions: Tensor) -> None:
        """Move base row rows[n] of the last tree forward to (slots[n], positions[n]), in every layer."""
        assert self.staged is not None
        source = self.staged[rows]
        page = self.block_table[slots, positions // PAGE].long()
        offset = positions % PAGE
        for kept in (self.keys, self.values):
            kept[:, page, :, offset] = kept[:, source // PAGE, :, source % PAGE]
        self.staged = None
