"""silu(gate) * up of an MLP from the split product of its two layers, LoRA added on draft rows; one launch.

    program_id(0) = tile of rows of one kind (`linear.py`)
    program_id(1) = COLUMNS columns of the gate and the same ones of up

Not here: the matrix products and the layer that follows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrofit.runtime.kernels.linear import ROWS, add_lora, dot_block, linear_tile, row_tile, row_tiles
from retrofit.runtime.kernels.rows import Rows

COLUMNS = 128
"""Columns in a tile: 112 programs a row tile at an MLP width of 14336, about one for each multiprocessor."""
WARPS = 8
"""A decode step has about one program on a multiprocessor, so a program has to keep many loads in flight."""


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
