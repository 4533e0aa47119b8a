"""silu(gate) * up of an MLP from the split product of its two layers, LoRA added on draft rows; one launch.

    program_id(0) = tile of ROWS rows:    base 0..15 | base 16..20 | draft 0..15 | ..      (20 base rows, padded tiles)
    program_id(1) = COLUMNS columns of the gate and the same ones of up

A tile has rows of one kind, so the branch that reads the adapter is taken by whole programs and no adapter value can
reach a base row.  Every element is a sum over the splits in index order: nothing depends on the number of rows or on
what the others hold.

Also here, because qkv.py cuts its work in the same way: `row_tile`, `linear_tile` and `add_lora`.  Not here: the matrix
products and the layer that follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrofit.runtime.kernels.rows import Rows

ROWS = 16
"""Rows in a tile: the least that tensor cores multiply."""
COLUMNS = 128
"""Columns in a tile: 112 programs a row tile at an MLP width of 14336, about one for each multiprocessor."""
WARPS = 8
"""A decode step has about one program on a multiprocessor, so a program has to keep many loads in flight."""


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


# Numbers of rows change from step to step: no kernel of its own for 1 or for multiples of 16.
@triton.jit(do_not_specialize=["R", "num_base", "num_draft"])
def _swiglu(
    parts,
    bias,
    up,
    out,
    R,
    N,
    num_base,
    num_draft,
    width,
    up_stride,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    DTYPE: tl.constexpr = out.dtype.element_ty
    row, row_mask, is_draft = row_tile(tl.program_id(0), num_base, num_draft, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    column_mask = column < width
    gate = linear_tile(parts, R, N, bias, row, row_mask, column, column_mask, SPLITS, DTYPE)
    value = linear_tile(parts, R, N, bias, row, row_mask, width + column, column_mask, SPLITS, DTYPE)
    if up is not None and is_draft:
        gate = add_lora(
            gate, parts, R, N, row, row_mask, column, column_mask,
            up, up_stride, 2 * width, SPLITS, RANK, RANK_BLOCK, DTYPE,
        )  # fmt: skip
        value = add_lora(
            value, parts, R, N, row, row_mask, width + column, column_mask,
            up, up_stride, 2 * width + RANK, SPLITS, RANK, RANK_BLOCK, DTYPE,
        )  # fmt: skip
    silu = tl.div_rn(gate, 1.0 + tl.exp(-gate)).to(DTYPE).to(tl.float32)
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(out + row[:, None] * width + column[None, :], (silu * value).to(DTYPE), mask)


def swiglu(
    parts_SRN: Tensor, width: int, up_rW: Tensor | None, rows: Rows, dtype: torch.dtype, bias_W: Tensor | None = None
) -> Tensor:
    """See `reference.swiglu`.  parts contiguous, rows of up contiguous; rows from num_rows on are not written."""
    assert parts_SRN.is_contiguous()
    S, R, N = parts_SRN.shape
    rank = 0 if up_rW is None else up_rW.shape[0]
    out_RW = torch.empty(R, width, dtype=dtype, device=parts_SRN.device)
    _swiglu[row_tiles(rows), triton.cdiv(width, COLUMNS)](
        parts_SRN,
        bias_W,
        up_rW,
        out_RW,
        R,
        N,
        rows.num_base,
        rows.num_draft,
        width,
        0 if up_rW is None else up_rW.stride(0),
        SPLITS=S,
        RANK=rank,
        RANK_BLOCK=dot_block(rank),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
        num_warps=WARPS,
    )
    return out_RW
