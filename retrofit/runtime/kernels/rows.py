"""The rows of one forward as the kernels read them, and how they are cut into tiles.

    row        0 .. num_base-1 | num_base .. num_rows-1 | .. padded-1
    kind       base              draft                    padding: matrix products run it, nothing else touches it

A page holds PAGE positions of one sequence; the block table says which page of the cache holds which.  K and V of one
layer are [pages, kv heads, PAGE, head width].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

PAGE = 64
"""Positions in a page of the K/V cache."""
QUERIES = 64
"""Query vectors (rows x heads of one K/V head) in a tile of the attention kernel, whatever the number of rows: a row's
reduction never depends on the rows beside it."""


@dataclass
class Rows:
    """Row numbers count from the first base row; the scratch of draft rows counts from the first draft row."""

    num_base: int
    num_draft: int
    padded: int
    """Rows of every matrix product, at least num_base + num_draft."""
    ids: Tensor
    """int64 [padded] token ids; -1: the mask vector stands in."""
    positions: Tensor
    """int64 [padded]."""
    slots: Tensor
    """int32 [padded] row of the block table."""
    limits: Tensor
    """int32 [padded] base K/V of positions below this are visible; 0 for a row that is not in use."""
    places: Tensor
    """int64 [num_base] page * PAGE + offset where a base row's K/V goes; -1: nowhere."""
    low: Tensor
    high: Tensor
    """int32 [num_draft] a draft row sees draft rows low <= d < high."""
    tile_first: Tensor
    tile_count: Tensor
    """int32 [tiles] rows first .. first + count - 1 of one sequence and kind; base tiles come first."""
    base_tiles: int
    starts: Tensor | None = None
    """Tree: int32 [padded] positions from here on are looked up in `paths`."""
    paths: Tensor | None = None
    """Tree: int32 [padded, depth]; the K/V of position start + d is kept at the place of position start + paths[d]."""

    @property
    def num_rows(self) -> int:
        return self.num_base + self.num_draft


def tile_rows(groups: int) -> int:
    """Rows in a tile of the attention kernel, where `groups` query heads share a K/V head."""
    return max(1, QUERIES // (1 << (groups - 1).bit_length()))


def cut_tiles(
    counts_base: Sequence[int], counts_draft: Sequence[int], size: int, device: torch.device | str
) -> tuple[Tensor, Tensor, int]:
    """(tile_first, tile_count, base_tiles) of rows that stand sequence by sequence, base rows before draft rows."""
    first: list[int] = []
    count: list[int] = []
    row, base_tiles = 0, 0
    for kind, counts in enumerate((counts_base, counts_draft)):
        for n in counts:
            for offset in range(0, n, size):
                first.append(row + offset)
                count.append(min(size, n - offset))
            row += n
        if kind == 0:
            base_tiles = len(first)
    return (
        torch.tensor(first, dtype=torch.int32, device=device),
        torch.tensor(count, dtype=torch.int32, device=device),
        base_tiles,
    )
