"""RMS norm, with what stands before it: the embedding, or the residual sum of a finished linear layer.

    program = row            one block over the whole hidden size, so a row is reduced the same way wherever it stands
    add_rms_norm             add the partial sums -> + bias -> (draft row: + LoRA) -> + residual -> norm

A base row's program never touches the adapter: it branches around the mask vector and LoRA's second factor, and holds
the same bits whatever those hold.  LoRA's first factor is part of the matrix product; see `reference.py`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrofit.runtime.kernels.rows import Rows

WARP_VALUES = 512
"""Values of a row per warp, 16 per thread: fewer leave loads too small, more need too many registers."""
RANKS = 8
"""Rows of LoRA's second factor that a draft row's program loads at once: one by one each would wait for memory."""


def embed_rms_norm(
    ids_R: Tensor, table_VH: Tensor, mask_vector_H: Tensor, weight_H: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(token embeddings, the mask vector where the id is -1; the same normed)."""
    R, H = ids_R.shape[0], table_VH.shape[1]
    x = torch.empty(R, H, dtype=table_VH.dtype, device=table_VH.device)
    normed = torch.empty(R, H, dtype=table_VH.dtype, device=table_VH.device)
    block = triton.next_power_of_2(H)
    _embed_rms_norm[(R,)](
        ids_R, table_VH, mask_vector_H, weight_H, x, normed, eps, H=H, BLOCK=block, num_warps=_num_warps(block)
    )
    return x, normed


def add_rms_norm(
    parts_SRN: Tensor,
    residual_RH: Tensor,
    weight_H: Tensor,
    eps: float,
    up_rH: Tensor | None,
    rows: Rows,
    bias_H: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """residual + linear output (with LoRA on draft rows), and that normed.  N = H + r.  Rows in use only."""
    S, R, N = parts_SRN.shape
    H = residual_RH.shape[1]
    residual = torch.empty(R, H, dtype=residual_RH.dtype, device=residual_RH.device)
    normed = torch.empty(R, H, dtype=residual_RH.dtype, device=residual_RH.device)
    block = triton.next_power_of_2(H)
    _add_rms_norm[(rows.num_rows,)](
        parts_SRN,
        residual_RH,
        weight_H,
        up_rH,
        bias_H,
        residual,
        normed,
        eps,
        R,
        N,
        rows.num_base,
        H=H,
        BLOCK=block,
        SPLITS=S,
        RANK=0 if up_rH is None else up_rH.shape[0],
        AT_ONCE=RANKS,
        num_warps=_num_warps(block),
    )
    return residual, normed


def _num_warps(block: int) -> int:
    return min(16, max(1, block // WARP_VALUES))


@triton.jit
def _rounded(x, like_ptr):
    """fp32 x, rounded to what like_ptr points to."""
    return x.to(like_ptr.dtype.element_ty).to(tl.float32)


@triton.jit
def _total(part_ptr, part_size, mask, SPLITS: tl.constexpr):
    """Partial sums added in index order, fp32; a masked place is 0."""
    total = tl.load(part_ptr, mask=mask, other=0.0).to(tl.float32)
    for split in tl.static_range(1, SPLITS):
        total += tl.load(part_ptr + split * part_size, mask=mask, other=0.0).to(tl.float32)
    return total


@triton.jit
def _normed(x, weight_ptr, out_ptr, eps, H: tl.constexpr, BLOCK: tl.constexpr):
    """weight * x / rms(x) of one row [BLOCK] that is 0 beyond H, fp32."""
    h = tl.arange(0, BLOCK)
    x = _rounded(x * tl.rsqrt(tl.sum(x * x, axis=0) / H + eps), out_ptr)
    return tl.load(weight_ptr + h, mask=h < H, other=0.0).to(tl.float32) * x


@triton.jit
def _store(out_ptr, row, x, H: tl.constexpr, BLOCK: tl.constexpr):
    h = tl.arange(0, BLOCK)
    tl.store(out_ptr + row * H + h, x.to(out_ptr.dtype.element_ty), mask=h < H)


@triton.jit
def _embed_rms_norm(
    ids_ptr, table_ptr, mask_vector_ptr, weight_ptr, x_ptr, normed_ptr, eps, H: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + row)
    if token < 0:
        x = _rounded(tl.load(mask_vector_ptr + h, mask=h < H, other=0.0).to(tl.float32), table_ptr)
    else:
        x = tl.load(table_ptr + token * H + h, mask=h < H, other=0.0).to(tl.float32)
    _store(x_ptr, row, x, H, BLOCK)
    _store(normed_ptr, row, _normed(x, weight_ptr, normed_ptr, eps, H, BLOCK), H, BLOCK)


@triton.jit(do_not_specialize=["R", "num_base"])
def _add_rms_norm(
    parts_ptr,
    residual_ptr,
    weight_ptr,
    up_ptr,
    bias_ptr,
    sum_ptr,
    normed_ptr,
    eps,
    R,
    N,
    num_base,
    H: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, BLOCK)
    part_size = R.to(tl.int64) * N
    parts_ptr += row * N

    x = _total(parts_ptr + h, part_size, h < H, SPLITS)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + h, mask=h < H, other=0.0).to(tl.float32)
    x = _rounded(x, residual_ptr)
    if RANK > 0 and row >= num_base:
        update = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, RANK, AT_ONCE):
            j = first + tl.arange(0, AT_ONCE)
            hidden = _rounded(_total(parts_ptr + H + j, part_size, j < RANK, SPLITS), residual_ptr)
            mask = (j < RANK)[:, None] & (h < H)[None, :]
            up = tl.load(up_ptr + j[:, None] * H + h[None, :], mask=mask, other=0.0).to(tl.float32)
            update += tl.sum(hidden[:, None] * up, axis=0)
        x = _rounded(x + _rounded(update, residual_ptr), residual_ptr)
    residual = tl.load(residual_ptr + row * H + h, mask=h < H, other=0.0).to(tl.float32)
    x = _rounded(residual + x, residual_ptr)
    _store(sum_ptr, row, x, H, BLOCK)
    _store(normed_ptr, row, _normed(x, weight_ptr, normed_ptr, eps, H, BLOCK), H, BLOCK)
