"""Attention of base and draft rows over the paged K/V cache and the scratch of draft rows, in two launches.

    tile        rows of one sequence and kind x the query heads of one K/V head = 64 query vectors
    part        0        1        2        ...   splits - 1  |  splits
    walks       0..255   256..511 512..767 ...               |  scratch; draft tiles only
    grid        tiles x K/V heads x parts; a program whose rows see nothing in its part leaves at once

The first launch leaves, for each part a row needs, (sum of weighted values, largest score, sum of weights); the second
adds a row's parts in index order.  Parts and the pages in them are cut by absolute position, and a masked score adds
exactly 0: so a row's bits depend neither on the rows beside it nor on the capacity.

Of a tree, K/V of positions from the start on lie elsewhere for each row: those positions keep their place in the
reduction, and are gathered and multiplied row by row.  K/V of base rows must be in the cache before.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrofit.runtime.kernels.rows import PAGE, Rows, tile_rows

SPLIT = 256
"""Positions in a part.  One sequence of 4096 with 8 K/V heads makes 128 programs: one wave on an H100 or H200."""
NO_WINDOW = 1 << 30
"""A window no position reaches beyond: full attention runs the binary that sliding attention runs."""


def row_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    draft_key: Tensor,
    draft_value: Tensor,
    rows: Rows,
    scale: float,
    window: int | None,
    softcap: float | None,
    causal_blocks: bool,
    *,
    split: int = SPLIT,
) -> Tensor:
    """softmax(scale q k^T [soft-capped]) v of every row over what it sees -> [R, Hq * D]; see `reference.py`.

    query [R, Hq, D]; caches [pages, Hkv, PAGE, D]; block_table int32 [slots, pages per slot]; draft_key, draft_value
    [num_draft, Hkv, D].  split: positions in a part, whole pages; bits are equal at equal `split`.  Of block_table and
    the caches only positions below a row's limit are read.
    """
    R, Hq, D = query.shape
    Hkv = key_cache.shape[1]
    groups = Hq // Hkv
    splits = triton.cdiv(block_table.shape[1] * PAGE, split)
    parts = splits + (rows.num_draft > 0)
    assert split % PAGE == 0 and all(t.is_contiguous() for t in (query, key_cache, value_cache, block_table))
    assert draft_key.is_contiguous() and draft_value.is_contiguous() and (rows.paths is None or rows.starts is not None)
    made: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    values = torch.empty(rows.num_rows, Hq, parts, D, **made)
    tops = torch.empty(rows.num_rows, Hq, parts, **made)
    totals = torch.empty(rows.num_rows, Hq, parts, **made)
    out = torch.empty(R, Hq * D, dtype=query.dtype, device=query.device)
    padded_groups, block_d = triton.next_power_of_2(groups), max(16, triton.next_power_of_2(D))
    _attend[(len(rows.tile_first), Hkv, parts)](
        query, key_cache, value_cache, block_table, draft_key, draft_value,
        rows.positions, rows.slots, rows.limits, rows.low, rows.high, rows.tile_first, rows.tile_count,
        rows.starts, rows.paths, values, tops, totals,
        rows.num_base, rows.base_tiles, block_table.shape[1], 0 if rows.paths is None else rows.paths.shape[1],
        splits, parts, split, NO_WINDOW if window is None else window, scale,
        softcap, causal_blocks, rows.paths is not None,
        Hkv, groups, D, tile_rows(groups), padded_groups, block_d, PAGE,
        num_warps=4, num_stages=_stages(block_d * query.element_size()), enable_fp_fusion=False,
    )  # fmt: skip
    _combine[(rows.num_rows, Hkv)](
        values, tops, totals, out, rows.positions, rows.limits, rows.low, rows.high,
        rows.num_base, splits, parts, split, NO_WINDOW if window is None else window,
        Hkv, groups, D, padded_groups, block_d,
        num_warps=min(8, triton.cdiv(padded_groups * block_d, 128)), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _stages(row_bytes: int) -> int:
    """Tiles of K and V in flight: three of 32 KiB, so that two programs fit beside each other; wider ones fewer."""
    return max(1, min(3, 1024 // row_bytes))


# Both kernels run without fused multiply-add outside tl.dot, so each operation rounds once in whatever code surrounds
# it; and no integer is specialised on, so that all capacities and row counts run the same binary.


@triton.jit(
    do_not_specialize=["num_base", "base_tiles", "pages_per_slot", "depth", "splits", "parts", "split", "window"]
)
def _attend(
    query,
    key_cache,
    value_cache,
    block_table,
    draft_key,
    draft_value,
    positions,
    slots,
    limits,
    low,
    high,
    tile_first,
    tile_count,
    starts,
    paths,
    values,
    tops,
    totals,
    num_base,
    base_tiles,
    pages_per_slot,
    depth,
    splits,
    parts,
    split,
    window,
    scale,
    SOFTCAP: tl.constexpr,
    CAUSAL: tl.constexpr,
    TREE: tl.constexpr,
    HKV: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE: tl.constexpr,
):
    """One part of one tile and K/V head.  M = TILE_ROWS * PADDED_GROUPS query vectors, row by row, head by head."""
    tile, kv, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, count = tl.load(tile_first + tile), tl.load(tile_count + tile)
    m = tl.arange(0, TILE_ROWS * PADDED_GROUPS)
    of_tile = m // PADDED_GROUPS
    in_tile = of_tile < count
    row = first + of_tile
    position = tl.load(positions + row, mask=in_tile, other=0).to(tl.int32)
    limit = tl.load(limits + row, mask=in_tile, other=0)
    row_slot = tl.load(slots + row, mask=in_tile, other=0)
    oldest = tl.maximum(position - window + 1, 0)

    # Rows that see none of the base K/V (such as those not in use, whose slot is 0) have no say in what is walked.
    sees_base = oldest < limit
    begin = tl.maximum(tl.min(tl.where(sees_base, oldest, 1 << 30)) // PAGE * PAGE, part * split)
    end = tl.minimum(tl.max(tl.where(sees_base, limit, 0)), (part + 1) * split)
    end = tl.where(part < splits, end, 0)

    own = row - num_base
    reads_scratch = in_tile & (tile >= base_tiles) & (part == splits)
    row_low = tl.load(low + own, mask=reads_scratch, other=0)
    row_high = tl.load(high + own, mask=reads_scratch, other=0)
    scratch_begin, scratch_end = 0, 0
    if part == splits:
        scratch_begin = tl.min(tl.where(row_low < row_high, row_low, 1 << 30))
        scratch_end = tl.max(row_high)
    if (begin >= end) & (scratch_begin >= scratch_end):
        return

    pages = block_table + tl.max(tl.where(sees_base, row_slot, 0)).to(tl.int64) * pages_per_slot
    head = kv * GROUPS + m % PADDED_GROUPS
    written = in_tile & (m % PADDED_GROUPS < GROUPS)
    d = tl.arange(0, BLOCK_D)
    in_head = d < D
    n_tile = tl.arange(0, PAGE)
    vector = row.to(tl.int64) * (HKV * GROUPS) + head
    q = tl.load(query + vector[:, None] * D + d[None, :], mask=written[:, None] & in_head[None, :], other=0.0)
    top = tl.full((TILE_ROWS * PADDED_GROUPS,), float("-inf"), tl.float32)
    total = tl.full((TILE_ROWS * PADDED_GROUPS,), 0.0, tl.float32)
    acc = tl.full((TILE_ROWS * PADDED_GROUPS, BLOCK_D), 0.0, tl.float32)

    shared_end = end
    if TREE:
        start = tl.max(tl.where(sees_base, tl.load(starts + row, mask=in_tile, other=0), 0))
        shared_end = tl.minimum(end, start // PAGE * PAGE)
    # The page is looked up a tile ahead: K and V of the next tiles can be fetched without waiting for it.
    page = tl.load(pages + begin // PAGE, mask=begin < shared_end, other=0)
    for n0 in range(begin, shared_end, PAGE):
        n = n0 + n_tile
        place = ((page.to(tl.int64) * HKV + kv) * PAGE + n_tile)[:, None] * D + d[None, :]
        page = tl.load(pages + n0 // PAGE + 1, mask=n0 + PAGE < shared_end, other=0)
        # Beyond the last limit nothing need be written yet, and 0 * NaN would be NaN.
        held = (n < end)[:, None] & in_head[None, :]
        k = tl.load(key_cache + place, mask=held, other=0.0)
        v = tl.load(value_cache + place, mask=held, other=0.0)
        visible = (n[None, :] >= oldest[:, None]) & (n[None, :] < limit[:, None])
        top, total, acc = _add_tile(q, k, v, visible, top, total, acc, scale, SOFTCAP)

    if TREE:
        for n0 in range(tl.maximum(begin, start // PAGE * PAGE), end, PAGE):
            n = n0 + n_tile
            ahead = n - start
            for r in range(0, count):
                held = n < tl.load(limits + first + r)
                to = paths + (first + r).to(tl.int64) * depth + ahead
                at = tl.where(ahead < 0, n, start + tl.load(to, mask=held & (ahead >= 0), other=0))
                page_of = tl.load(pages + at // PAGE, mask=held, other=0).to(tl.int64)
                place = ((page_of * HKV + kv) * PAGE + at % PAGE)[:, None] * D + d[None, :]
                k = tl.load(key_cache + place, mask=held[:, None] & in_head[None, :], other=0.0)
                v = tl.load(value_cache + place, mask=held[:, None] & in_head[None, :], other=0.0)
                visible = (n[None, :] >= oldest[:, None]) & (n[None, :] < limit[:, None]) & (of_tile == r)[:, None]
                top, total, acc = _add_tile(q, k, v, visible, top, total, acc, scale, SOFTCAP)

    for n0 in range(scratch_begin, scratch_end, PAGE):
        n = n0 + n_tile
        place = (n.to(tl.int64) * HKV + kv)[:, None] * D + d[None, :]
        held = (n < scratch_end)[:, None] & in_head[None, :]
        k = tl.load(draft_key + place, mask=held, other=0.0)
        v = tl.load(draft_value + place, mask=held, other=0.0)
        other = tl.load(positions + num_base + n, mask=n < scratch_end, other=0).to(tl.int32)
        visible = (n[None, :] >= row_low[:, None]) & (n[None, :] < row_high[:, None])
        visible &= tl.abs(position[:, None] - other[None, :]) < window
        if CAUSAL:
            visible &= n[None, :] <= own[:, None]
        top, total, acc = _add_tile(q, k, v, visible, top, total, acc, scale, SOFTCAP)

    partial = vector * parts + part
    tl.store(values + partial[:, None] * D + d[None, :], acc, mask=written[:, None] & in_head[None, :])
    tl.store(tops + partial, top, mask=written)
    tl.store(totals + partial, total, mask=written)


@triton.jit
def _add_tile(q, k, v, visible, top, total, acc, scale, SOFTCAP: tl.constexpr):
    """One step of the online softmax.  Where nothing is visible it changes no bit: alpha is 1 and p is 0."""
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if SOFTCAP is not None:
        # tanh from an exponential that cannot overflow
        e = tl.exp(-2.0 * tl.abs(scores / SOFTCAP))
        scores = tl.where(scores < 0, -SOFTCAP, SOFTCAP) * ((1.0 - e) / (1.0 + e))
    scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    finite = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row that saw nothing yet: -inf - -inf is NaN
    p = tl.exp(scores - finite[:, None])
    alpha = tl.exp(top - finite)
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision="ieee")
    return new_top, total * alpha + tl.sum(p, 1), acc


@triton.jit(do_not_specialize=["num_base", "splits", "parts", "split", "window"])
def _combine(
    values,
    tops,
    totals,
    out,
    positions,
    limits,
    low,
    high,
    num_base,
    splits,
    parts,
    split,
    window,
    HKV: tl.constexpr,
    GROUPS: tl.constexpr,
    D: tl.constexpr,
    PADDED_GROUPS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One row and the heads of one K/V head: adds the parts the row needs, reads no other, rounds once."""
    row, kv = tl.program_id(0), tl.program_id(1)
    limit, own = tl.load(limits + row), row - num_base
    oldest = tl.maximum(tl.load(positions + row).to(tl.int32) - window + 1, 0)
    is_draft = own >= 0
    sees_scratch = tl.load(low + own, mask=is_draft, other=0) < tl.load(high + own, mask=is_draft, other=0)
    begin = oldest // split
    end = tl.where(oldest < limit, (limit + split - 1) // split, begin)

    g, d = tl.arange(0, PADDED_GROUPS), tl.arange(0, BLOCK_D)
    in_group = g < GROUPS
    held = in_group[:, None] & (d < D)[None, :]
    vector = row.to(tl.int64) * (HKV * GROUPS) + kv * GROUPS + g
    top = tl.full((PADDED_GROUPS,), float("-inf"), tl.float32)
    total = tl.full((PADDED_GROUPS,), 0.0, tl.float32)
    acc = tl.full((PADDED_GROUPS, BLOCK_D), 0.0, tl.float32)
    # Unrolled, because the loads of the next parts need not wait for this sum.
    for i in tl.range(begin, end + sees_scratch.to(tl.int32), loop_unroll_factor=4):
        partial = vector * parts + tl.where(i < end, i, splits)
        part_top = tl.load(tops + partial, mask=in_group, other=float("-inf"))
        part_total = tl.load(totals + partial, mask=in_group, other=0.0)
        part_acc = tl.load(values + partial[:, None] * D + d[None, :], mask=held, other=0.0)
        new_top = tl.maximum(top, part_top)
        finite = tl.where(new_top == float("-inf"), 0.0, new_top)
        alpha, beta = tl.exp(top - finite), tl.exp(part_top - finite)
        total = total * alpha + part_total * beta
        acc = acc * alpha[:, None] + part_acc * beta[:, None]
        top = new_top
    result = acc / tl.where(total == 0, 1.0, total)[:, None]
    tl.store(out + vector[:, None] * D + d[None, :], result.to(out.dtype.element_ty), mask=held)
