"""What the rows of one forward see, as rectangles and masks that an attention call takes.

Base rows, draft rows, and draft rows as blocks are each laid out as a rectangle [S, T], one line a sequence; the masks
follow from where each row stands and which block or path it belongs to.
Not here: which rows there are (`rows.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor


class Chunk(NamedTuple):
    """A layer whose rows see no further back than the last multiple of `size` (chunked attention, Llama 4)."""

    size: int


Window = int | Chunk
"""How far back the rows of a layer see that does not see everything: so many positions, or to where a chunk begins."""
Positions = TypeVar("Positions", int, np.ndarray, Tensor)


def first_seen(query: Positions, window: Window) -> Positions:
    """The first position that a row at `query` sees; may be negative."""
    if isinstance(window, Chunk):
        return query // window.size * window.size
    return query - window + 1


def hiding(window: Window | None, last: int) -> Window | None:
    """The window, where it hides something from rows of which the last stands at `last`."""
    if window is None:
        return None
    return window if last >= (window.size if isinstance(window, Chunk) else window) else None


@dataclass
class Group:
    """One kind's rows of all sequences as a rectangle [S, T] for one attention call.

    gather is None when the rows are a rectangle already (row = s * T + t); otherwise padding repeats row 0 of the
    kind, and `scatter` picks the real ones back out of the flattened rectangle.
    """

    slots: list[int]
    width: int
    gather: Tensor | None
    scatter: Tensor | None
    query: np.ndarray
    """[S, T] position of each row; padding -1."""
    limit: np.ndarray
    """[S, T] base K/V of positions below this are visible; padding 1 (anything finite: nobody reads it)."""
    block: np.ndarray
    """[S, T] number of the row's block within its sequence; padding -1."""
    keys: int
    """How many base positions the call has to read: max of limit."""
    ancestors: np.ndarray | None = None
    """Tree: [S, T, R] which base rows of this forward a row sees (of R, padded)."""
    plain_causal: bool = False
    """All sequences start at 0, so the lower triangle is the mask."""
    last: int = 0
    """Largest position of its rows."""
    masks: dict[Any, Any] = field(default_factory=dict)
    """What was made of the above for some window, which is the same in every layer that has it."""

    def counted_from(self, begins: Sequence[int]) -> Group:
        """The same rows where positions count from begins[s] on: whose keys begin there."""
        first = np.asarray(begins, dtype=np.int64)[:, None]
        query = np.where(self.query >= 0, self.query - first, -1)
        limit = np.where(self.query >= 0, self.limit - first, 1)
        keys, last = int(max(1, limit.max())), int(query.max())
        return replace(self, query=query, limit=limit, keys=keys, last=last, plain_causal=False, masks={})

    def some(self, first: int, stop: int) -> Group:
        """Those of some sequences."""
        key = ("some", first, stop)
        if key not in self.masks:
            query, limit = self.query[first:stop], self.limit[first:stop]
            ancestors = None if self.ancestors is None else self.ancestors[first:stop]
            self.masks[key] = replace(
                self,
                slots=self.slots[first:stop],
                query=query,
                limit=limit,
                block=self.block[first:stop],
                keys=int(max(1, limit.max())),
                last=int(query.max()),
                ancestors=ancestors,
                masks={},
            )
        found: Group = self.masks[key]
        return found

    def lone(self, number: int) -> Group:
        """Those of one sequence as if there were no other, so without padding; not of a tree."""
        key = ("lone", number)
        if key not in self.masks:
            width = int((self.query[number] >= 0).sum())
            one = slice(number, number + 1), slice(width)
            limit = self.limit[one]
            self.masks[key] = replace(
                self,
                slots=[self.slots[number]],
                width=width,
                gather=None,
                scatter=None,
                query=self.query[one],
                limit=limit,
                block=self.block[one],
                keys=int(limit.max()),
                last=int(self.query[one].max()),
                masks={},
            )
        found: Group = self.masks[key]
        return found

    @property
    def runs(self) -> list[tuple[int, int]]:
        """(first, stop) of the sequences whose slots are neighbours, in their order."""
        if "runs" not in self.masks:
            cuts = [i for i in range(1, len(self.slots)) if self.slots[i] != self.slots[i - 1] + 1]
            self.masks["runs"] = list(zip([0, *cuts], [*cuts, len(self.slots)], strict=True))
        found: list[tuple[int, int]] = self.masks["runs"]
        return found

    def rectangle(self, rows_NHD: Tensor) -> Tensor:
        """[N, H, D] rows of this kind to [S, H, T, D]."""
        if self.gather is not None:
            rows_NHD = rows_NHD[self.gather]
        return rows_NHD.view(len(self.slots), self.width, *rows_NHD.shape[1:]).transpose(1, 2)

    def flatten(self, out_SHTD: Tensor) -> Tensor:
        """[S, H, T, D] back to [N, H, D]."""
        flat = out_SHTD.transpose(1, 2).reshape(-1, out_SHTD.shape[1], out_SHTD.shape[3])
        return flat if self.scatter is None else flat[self.scatter]


@dataclass
class BlockRows:
    """Draft rows of one forward as blocks [n, K], one after another; shorter blocks are filled up with row 0.

    gather is None when all blocks are whole; else `scatter` picks the real rows back out.
    """

    slots: list[int]
    starts: list[int]
    lengths: list[int]
    block: int
    """K, the most rows that a block has."""
    device: torch.device
    gather: Tensor | None
    scatter: Tensor | None
    tiles: dict[Any, Any] = field(default_factory=dict)
    """How the attention call cuts them up, which is the same in every layer."""

    @property
    def last(self) -> int:
        """Largest position of its rows."""
        return max(start + n - 1 for start, n in zip(self.starts, self.lengths, strict=True))


@dataclass
class Paths:
    """Tree: the base rows of this forward that each base row follows, itself last; [S, T, D] padded to the deepest."""

    rows: Tensor
    """Numbers of the rows in their sequence; padding 0."""
    places: Tensor
    """Positions the rows would have in a chain: start, start + 1, ..."""
    there: Tensor
    """Which entries are no padding."""
    query: Tensor
    """[S, T] position of each row."""
    starts: list[int]
    stop: int
    """Behind the last place."""

    def seen(self, window: Window | None) -> Tensor:
        """[S, T, D] which entries a row sees."""
        return self.there if window is None else self.there & (self.places >= first_seen(self.query[..., None], window))


def base_span(group: Group, first: int, stop: int, window: Window | None, step: int) -> tuple[int, int]:
    """(low, high): cached keys that base rows `first` to `stop` of each sequence see, low a multiple of `step`."""
    if group.width == 1 and len(group.slots) == 1:
        lowest = last = group.last
    else:
        key = ("rows", first, stop)
        if key not in group.masks:
            query, limit = group.query[:, first:stop], group.limit[:, first:stop]
            there = query >= 0
            group.masks[key] = (int(query[there].min()), int(limit[there].max()) - 1) if there.any() else (0, 0)
        lowest, last = group.masks[key]
    low = 0 if window is None else max(0, first_seen(lowest, window)) // step * step
    return low, last + 1


def seen_by_all(group: Group, first: int, stop: int) -> int:
    """So many first cached keys are seen by each of base rows `first` to `stop`, where no window hides any."""
    key = ("seen by all", first, stop)
    if key not in group.masks:
        query, limit = group.query[:, first:stop], group.limit[:, first:stop]
        group.masks[key] = int(np.where(query >= 0, limit, group.keys).min())
    found: int = group.masks[key]
    return found


def hidden_keys(
    group: Group, device: torch.device, first: int, stop: int, window: Window | None, low: int, high: int
) -> Tensor:
    """[S, stop - first, high - low] which cached keys base rows `first` to `stop` of each sequence do not see."""
    key = ("hidden", first, stop, window, low, high)
    if key not in group.masks:
        query, limit = group.query[:, first:stop, None], group.limit[:, first:stop, None]
        k = np.arange(low, high)
        hidden = k >= limit
        if window is not None:
            hidden |= k < first_seen(query, window)
        hidden[:, :, 0] &= query[:, :, 0] >= 0  # padding: nobody reads it, but it has to be finite
        group.masks[key] = torch.from_numpy(hidden).to(device, non_blocking=True)
    found: Tensor = group.masks[key]
    return found


def base_visibility(group: Group, window: Window | None) -> np.ndarray:
    """[S, T, keys] whether a row sees base position k: k < limit, and within the window."""
    k = np.arange(group.keys)
    seen = k < group.limit[:, :, None]
    if window is not None:
        seen &= k >= first_seen(group.query[:, :, None], window)
    return seen


def block_visibility(group: Group, causal: bool, window: Window | None) -> np.ndarray:
    """[S, T, T] whether a draft row sees another of its sequence: same block, not later if causal, within the window.

    A window reaches as far ahead as back: |q - k| < window, or both in one chunk.
    """
    query, other = group.query[:, :, None], group.query[:, None, :]
    seen = group.block[:, :, None] == group.block[:, None, :]
    if causal:
        seen &= other <= query
    if window is not None:
        seen &= np.minimum(query, other) >= first_seen(np.maximum(query, other), window)
    return seen


def path_visibility(group: Group, base: Group, window: Window | None) -> np.ndarray:
    """[S, T, R] tree: whether a row sees base row r of this forward: an ancestor, and within the window."""
    assert group.ancestors is not None
    if window is None:
        return group.ancestors
    return group.ancestors & (base.query[:, None, :] >= first_seen(group.query[:, :, None], window))
