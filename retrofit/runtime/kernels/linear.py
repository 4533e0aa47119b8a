"""What the kernels behind a matrix product share: its output for a tile of rows, with LoRA on draft rows.

    tile        rows:  base 0..15 | base 16..19 | draft 20..35 | draft 36..      (20 base rows)

A tile has rows of one kind, so the branch that reads the adapter is taken by whole programs and no adapter value can
reach a base row.  Every element is a sum over the splits in index order: nothing depends on the number of rows or on
what the others hold.
"""

from __future__ import annotations

import triton
import triton.language as tl

from retrofit.runtime.kernels.rows import Rows

ROWS = 16
"""Rows in a tile: the least that tensor cores multiply."""


def row_tiles(rows: Rows) -> int:
    """How many tiles `row_tile` knows."""
    return triton.cdiv(rows.num_base, ROWS) + triton.cdiv(rows.num_draft, ROWS)


def dot_block(size: int) -> int:
    """Block for a dimension of a dot product, whose blocks are powers of two and at least 16."""
    return max(16, triton.next_power_of_2(size))


@triton.jit
def row_tile(tile, num_base, num_draft, ROWS: tl.constexpr):
    """(row numbers int64 [ROWS], which of them exist, whether they are draft rows)."""
    base_tiles = tl.cdiv(num_base, ROWS)
    is_draft = tile >= base_tiles
    first = tl.where(is_draft, num_base + (tile - base_tiles) * ROWS, tile * ROWS)
    end = tl.where(is_draft, num_base + num_draft, num_base)
    row = first + tl.arange(0, ROWS)
    return row.to(tl.int64), row < end, is_draft


@triton.jit
def total(parts, R, N, row, row_mask, column, column_mask, SPLITS: tl.constexpr):
    """Partial sums of a tile of parts [SPLITS, R, N], added in index order, fp32; 0 outside the masks."""
    at = row[:, None] * N + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    out = tl.load(parts + at, mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        # Not strides of the tensor: an R that happens to be a multiple of 16 must not compile another kernel.
        start = tl.cast(R, tl.int64) * N * split
        out += tl.load(parts + start + at, mask, other=0.0).to(tl.float32)
    return out


@triton.jit
def linear_tile(
    parts, R, N, bias, row, row_mask, column, column_mask, SPLITS: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Output of a linear layer without LoRA for a tile, rounded to DTYPE, as fp32.  bias may be None."""
    out = total(parts, R, N, row, row_mask, column, column_mask, SPLITS)
    if bias is not None:
        out += tl.load(bias + column, column_mask, other=0.0).to(tl.float32)[None, :]
    return out.to(DTYPE).to(tl.float32)


@triton.jit
def add_lora(
    out, parts, R, N, row, row_mask, column, column_mask, up, up_stride, start,
    SPLITS: tl.constexpr, RANK: tl.constexpr, RANK_BLOCK: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """out + hidden (columns start .. start + RANK - 1 of parts) times the tile's columns of up [RANK, ..]."""
    rank = tl.arange(0, RANK_BLOCK)
    rank_mask = rank < RANK
    hidden = total(parts, R, N, row, row_mask, start + rank, rank_mask, SPLITS)
    hidden = hidden.to(DTYPE).to(tl.float32).to(up.dtype.element_ty)
    mask = rank_mask[:, None] & column_mask[None, :]
    weight = tl.load(up + rank[:, None] * up_stride + column[None, :], mask, other=0.0)
    update = tl.dot(hidden, weight, input_precision="ieee").to(DTYPE).to(tl.float32)
    return (out + update).to(DTYPE).to(tl.float32)
