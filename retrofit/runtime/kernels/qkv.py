"""What happens to the product q | k | v before attention, in one launch: bias, LoRA, q/k norm, rotary embedding, store.

    program_id(0) = tile of 16 rows of one kind, as in swiglu.py: base tiles, then draft tiles
    program_id(1) = head: query heads | key heads | value heads, as their columns stand in the product

              query head          key head                      value head
    base      q [R, Hq, D]        key cache, at `places`        value cache, at `places`
    draft     q [R, Hq, D]        draft_k [num_draft, Hkv, D]   draft_v

A head is read as two halves, lo and hi, because the rotation pairs column d with column d + D/2; each is padded to a
power of two.  A norm's sum runs over one row's head in one program, so nothing depends on the other rows.  Values are
stored as they come.  Not here: the matrix product, attention, and which pages a sequence has.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrofit.runtime.kernels.linear import ROWS, add_lora, dot_block, linear_tile, row_tile, row_tiles
from retrofit.runtime.kernels.rows import PAGE, Rows

WARPS = 4
"""16 elements a thread for heads 128 wide: enough loads in flight, and 48 programs or more a row tile."""


@triton.jit
def _norm(lo, hi, weight, column, mask, eps, D: tl.constexpr, DTYPE: tl.constexpr):
    """RMS norm over both halves of a head; rounded before and after the weight, as transformers does."""
    mean = (tl.sum(lo * lo, axis=1) + tl.sum(hi * hi, axis=1)) / D
    scale = tl.rsqrt(mean + eps)[:, None]
    weight_lo = tl.load(weight + column, mask, other=0.0).to(tl.float32)[None, :]
    weight_hi = tl.load(weight + D // 2 + column, mask, other=0.0).to(tl.float32)[None, :]
    lo = (lo * scale).to(DTYPE).to(tl.float32) * weight_lo
    hi = (hi * scale).to(DTYPE).to(tl.float32) * weight_hi
    return lo.to(DTYPE).to(tl.float32), hi.to(DTYPE).to(tl.float32)


@triton.jit
def _store(lo, hi, start, row_mask, column, column_mask, D: tl.constexpr):
    """Write the halves of one head of each row to start [ROWS], pointers."""
    at = start[:, None] + column[None, :]
    mask = row_mask[:, None] & column_mask[None, :]
    tl.store(at, lo.to(start.dtype.element_ty), mask)
    tl.store(at + D // 2, hi.to(start.dtype.element_ty), mask)


@triton.jit
def _store_kv(
    lo, hi, cache, stride, draft, places, num_base, row, row_mask, head, column, column_mask,
    IS_DRAFT: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Write a K/V head of base rows to the cache, of draft rows to draft [num_draft, HKV, D]."""
    if IS_DRAFT:
        _store(lo, hi, draft + ((row - num_base) * HKV + head) * D, row_mask, column, column_mask, D)
    else:
        place = tl.load(places + row, row_mask, other=-1)
        start = cache + (place // PAGE) * stride + (head * PAGE + place % PAGE) * D
        _store(lo, hi, start, place >= 0, column, column_mask, D)


@triton.jit
def _finish(
    lo, hi, norm_q, norm_k, cos, sin, positions, places, q, draft_k, draft_v, key_cache, value_cache,
    num_base, table_stride, key_stride, value_stride, eps, row, row_mask, head, column, column_mask,
    IS_DRAFT: tl.constexpr, HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Norm, rotation and store of a head whose linear output is complete."""
    if head < HQ + HKV:
        if norm_q is not None:
            if head < HQ:
                lo, hi = _norm(lo, hi, norm_q, column, column_mask, eps, D, DTYPE)
            else:
                lo, hi = _norm(lo, hi, norm_k, column, column_mask, eps, D, DTYPE)
        position = tl.load(positions + row, row_mask, other=0)
        at = position[:, None] * table_stride + column[None, :]
        mask = row_mask[:, None] & column_mask[None, :]
        c = tl.load(cos + at, mask, other=0.0).to(tl.float32)
        s = tl.load(sin + at, mask, other=0.0).to(tl.float32)
        lo, hi = (
            (lo * c).to(DTYPE).to(tl.float32) - (hi * s).to(DTYPE).to(tl.float32),
            (hi * c).to(DTYPE).to(tl.float32) + (lo * s).to(DTYPE).to(tl.float32),
        )
    if head < HQ:
        _store(lo, hi, q + (row * HQ + head) * D, row_mask, column, column_mask, D)
    elif head < HQ + HKV:
        _store_kv(
            lo, hi, key_cache, key_stride, draft_k, places, num_base, row, row_mask, head - HQ,
            column, column_mask, IS_DRAFT, HKV, D, PAGE,
        )  # fmt: skip
    else:
        _store_kv(
            lo, hi, value_cache, value_stride, draft_v, places, num_base, row, row_mask, head - HQ - HKV,
            column, column_mask, IS_DRAFT, HKV, D, PAGE,
        )  # fmt: skip


# Numbers of rows change from step to step: no kernel of its own for 1 or for multiples of 16.
@triton.jit(do_not_specialize=["R", "num_base", "num_draft"])
def _qkv(
    parts,
    bias,
    norm_q,
    norm_k,
    cos,
    sin,
    up,
    positions,
    places,
    q,
    draft_k,
    draft_v,
    key_cache,
    value_cache,
    R,
    N,
    num_base,
    num_draft,
    up_stride,
    table_stride,
    key_stride,
    value_stride,
    eps,
    SPLITS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
    HQ: tl.constexpr,
    HKV: tl.constexpr,
    D: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    PAGE: tl.constexpr,
):
    DTYPE: tl.constexpr = q.dtype.element_ty
    row, row_mask, is_draft = row_tile(tl.program_id(0), num_base, num_draft, ROWS)
    head = tl.program_id(1)
    column = tl.arange(0, HALF_BLOCK)
    column_mask = column < D // 2
    at_lo = head * D + column
    at_hi = at_lo + D // 2
    lo = linear_tile(parts, R, N, bias, row, row_mask, at_lo, column_mask, SPLITS, DTYPE)
    hi = linear_tile(parts, R, N, bias, row, row_mask, at_hi, column_mask, SPLITS, DTYPE)
    # Two copies of the rest, though one would do after the LoRA: behind a dot product the compiler lays a tile out
    # differently, and a norm would add in another order in a kernel with LoRA than in one without.
    if is_draft:
        if up is not None:
            role = (head >= HQ).to(tl.int32) + (head >= HQ + HKV).to(tl.int32)
            start = (HQ + 2 * HKV) * D + role * RANK
            lo = add_lora(
                lo, parts, R, N, row, row_mask, at_lo, column_mask,
                up, up_stride, start, SPLITS, RANK, RANK_BLOCK, DTYPE,
            )  # fmt: skip
            hi = add_lora(
                hi, parts, R, N, row, row_mask, at_hi, column_mask,
                up, up_stride, start, SPLITS, RANK, RANK_BLOCK, DTYPE,
            )  # fmt: skip
        _finish(
            lo, hi, norm_q, norm_k, cos, sin, positions, places, q, draft_k, draft_v, key_cache, value_cache,
            num_base, table_stride, key_stride, value_stride, eps, row, row_mask, head, column, column_mask,
            True, HQ, HKV, D, PAGE, DTYPE,
        )  # fmt: skip
    else:
        _finish(
            lo, hi, norm_q, norm_k, cos, sin, positions, places, q, draft_k, draft_v, key_cache, value_cache,
            num_base, table_stride, key_stride, value_stride, eps, row, row_mask, head, column, column_mask,
            False, HQ, HKV, D, PAGE, DTYPE,
        )  # fmt: skip


def qkv(
    parts_SRN: Tensor,
    heads: tuple[int, int, int],
    bias: Tensor | None,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    cos_PD: Tensor,
    sin_PD: Tensor,
    up_rN: Tensor | None,
    rows: Rows,
    key_cache: Tensor,
    value_cache: Tensor,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `reference.qkv`.  Rows of q from num_rows on are not written.

    parts contiguous, rows of up contiguous, cos and sin of one layout; of the caches only the first dimension may be
    strided.
    """
    assert parts_SRN.is_contiguous()
    Hq, Hkv, D = heads
    S, R, N = parts_SRN.shape
    rank = 0 if up_rN is None else up_rN.shape[0]
    norm_q, norm_k = (None, None) if norms is None else norms
    device = parts_SRN.device
    q = torch.empty(R, Hq, D, dtype=dtype, device=device)
    draft_k, draft_v = (torch.empty(rows.num_draft, Hkv, D, dtype=dtype, device=device) for _ in range(2))
    _qkv[row_tiles(rows), Hq + 2 * Hkv](
        parts_SRN,
        bias,
        norm_q,
        norm_k,
        cos_PD,
        sin_PD,
        up_rN,
        rows.positions,
        rows.places,
        q,
        draft_k,
        draft_v,
        key_cache,
        value_cache,
        R,
        N,
        rows.num_base,
        rows.num_draft,
        0 if up_rN is None else up_rN.stride(0),
        cos_PD.stride(0),
        key_cache.stride(0),
        value_cache.stride(0),
        eps,
        SPLITS=S,
        RANK=rank,
        RANK_BLOCK=dot_block(rank),
        HQ=Hq,
        HKV=Hkv,
        D=D,
        HALF_BLOCK=dot_block(D // 2),
        ROWS=ROWS,
        PAGE=PAGE,
        num_warps=WARPS,
        # Where a product and a sum become one instruction is the compiler's choice, and could differ with LoRA.
        enable_fp_fusion=False,
    )
    return q, draft_k, draft_v
