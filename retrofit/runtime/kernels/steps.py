"""What happens between two forwards, on the device: lay the rows of a step, accept drafts, move a tree's K/V.

    lay_rows    program = lane                     state -> rows; the lanes share the padding rows
    accept       program = lane                     targets -> state, outcome
    compact      program = (layer, lane, K/V head)  K/V of the accepted path -> places without gaps

A program of the first two holds all base rows of its lane as one vector, all its draft rows as another.  Whatever is
not in use is written too, as what `reference.py` calls not in use, so a step never sees what the one before it left.
Two lanes never serve the same slot.  Not here: what a step does, and who gets a slot.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from retrofit.runtime.kernels.rows import PAGE, Rows, cut_tiles, tile_rows
from retrofit.runtime.kernels.sampling import hash_bits
from retrofit.runtime.kernels.state import ALL, LAST, Outcome, State, StepTensors

_PAGE = tl.constexpr(PAGE)
_ALL = tl.constexpr(ALL)
_LAST = tl.constexpr(LAST)

LAY_WARPS = 4
"""Up to some hundred draft rows in a vector."""
ONE_WARP = 1
"""`accept` reads state that it then writes, `compact` moves into places that it has read: warps would have to wait for
each other.  There is no work for more than one either."""
PADDING_ROWS = 64
"""Padding rows that a lane clears at once."""


def allocate_rows(step: StepTensors, lanes: int, padded: int | None, groups: int, device: torch.device | str) -> Rows:
    """Rows of a step for so many lanes, none in use yet; the tiles are laid for good.

    padded: rows of every matrix product, if that is more than there are.  groups: query heads that share a K/V head.
    """
    num_base, num_draft = lanes * step.base_rows, lanes * step.draft_rows
    padded = max(padded or 0, num_base + num_draft)

    def zeros(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(*size, dtype=dtype, device=device)

    first, count, base_tiles = cut_tiles([step.base_rows] * lanes, [step.draft_rows] * lanes, tile_rows(groups), device)
    return Rows(
        num_base=num_base,
        num_draft=num_draft,
        padded=padded,
        ids=zeros(padded, dtype=torch.int64),
        positions=zeros(padded, dtype=torch.int64),
        slots=zeros(padded, dtype=torch.int32),
        limits=zeros(padded, dtype=torch.int32),
        places=zeros(num_base, dtype=torch.int64).fill_(-1),
        low=zeros(num_draft, dtype=torch.int32),
        high=zeros(num_draft, dtype=torch.int32),
        tile_first=first,
        tile_count=count,
        base_tiles=base_tiles,
        starts=None if step.chain else zeros(padded, dtype=torch.int32),
        paths=None if step.chain else zeros(padded, step.deepest + 1, dtype=torch.int32),
    )


def lay_rows(
    state: State,
    lanes: Tensor,
    step: StepTensors,
    block_table: Tensor,
    context: int,
    noise_inputs: int | None,
    rows: Rows,
    seeds: Tensor,
    indices: Tensor,
) -> None:
    """Write the rows of a step into `rows` and each base row's noise key; see `reference.lay_rows`."""
    _lay_kernel[(len(lanes),)](
        lanes,
        state.tokens,
        state.length,
        state.end,
        state.origin,
        state.seed,
        state.active,
        state.drafts,
        state.num_drafts,
        state.anchors,
        step.depths,
        step.paths,
        block_table,
        rows.ids,
        rows.positions,
        rows.slots,
        rows.limits,
        rows.places,
        rows.low,
        rows.high,
        rows.starts,
        rows.paths,
        seeds,
        indices,
        state.tokens.stride(0),
        state.drafts.stride(0),
        state.anchors.stride(0),
        block_table.stride(0),
        context,
        rows.num_base,
        rows.num_rows,
        rows.padded,
        VOCABULARY=noise_inputs or 0,
        TREE=rows.starts is not None,
        BASE=step.base_rows,
        BLOCKS=step.blocks,
        BLOCK=step.block,
        HANG=step.hang,
        DEPTHS=step.deepest + 1,
        BASE_VECTOR=triton.next_power_of_2(step.base_rows),
        DRAFT_VECTOR=triton.next_power_of_2(max(1, step.draft_rows)),
        DEPTH_VECTOR=triton.next_power_of_2(step.deepest + 1),
        PADDING=PADDING_ROWS,
        num_warps=LAY_WARPS,
    )


def accept(
    state: State, lanes: Tensor, step: StepTensors, targets: Tensor, rows: Rows, first_drafting_row: int
) -> Outcome:
    """Accept drafts, emit targets and move the state on; see `reference.accept`."""
    n, depths, slots = len(lanes), step.deepest + 1, max(1, step.block)

    def unwritten(*size: int) -> Tensor:
        return torch.empty(*size, dtype=torch.int64, device=targets.device)

    outcome = Outcome(unwritten(n, 3 + depths), unwritten(n, depths), unwritten(n), unwritten(n, slots))
    _accept_kernel[(n,)](
        lanes,
        state.tokens,
        state.length,
        state.end,
        state.active,
        state.drafts,
        state.num_drafts,
        state.anchors,
        state.eos,
        step.parents,
        step.depths,
        targets,
        rows.limits,
        rows.high,
        outcome.record,
        outcome.path,
        outcome.kept,
        outcome.chosen,
        state.tokens.stride(0),
        state.drafts.stride(0),
        state.anchors.stride(0),
        rows.num_base,
        FIRST=first_drafting_row,
        BASE=step.base_rows,
        BLOCKS=step.blocks,
        BLOCK=step.block,
        HANG=step.hang,
        DEPTHS=depths,
        SLOTS=slots,
        ENDS=len(state.eos),
        BASE_VECTOR=triton.next_power_of_2(step.base_rows),
        BLOCKS_VECTOR=triton.next_power_of_2(max(1, step.blocks)),
        DEPTH_VECTOR=triton.next_power_of_2(depths),
        SLOT_VECTOR=triton.next_power_of_2(slots),
        END_VECTOR=triton.next_power_of_2(len(state.eos)),
        num_warps=ONE_WARP,
    )
    return outcome


def compact(
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lanes: Tensor,
    length_before: Tensor,
    path: Tensor,
    kept: Tensor,
) -> None:
    """`reference.compact` of K and V at once: [layers, pages, Hkv, PAGE, D] both, of equal strides."""
    layers, _, heads, _, width = key_cache.shape
    _compact_kernel[(layers, len(lanes), heads)](
        key_cache,
        value_cache,
        block_table,
        lanes,
        length_before,
        path,
        kept,
        key_cache.stride(0),
        key_cache.stride(1),
        block_table.stride(0),
        path.stride(0),
        WIDTH=width,
        WIDTH_VECTOR=triton.next_power_of_2(width),
        num_warps=ONE_WARP,
    )


@triton.jit
def _anchors(anchors_ptr, m, drafted, inside, HANG: tl.constexpr):
    """The base rows that blocks m of a request hang on, int64; -1 outside."""
    if HANG == _ALL:
        anchor = m.to(tl.int64)
    elif HANG == _LAST:
        anchor = drafted + tl.zeros_like(m)
    else:
        anchor = tl.load(anchors_ptr + m, mask=inside, other=-1)
    return tl.where(inside, anchor, -1)


@triton.jit
def _write_paths(
    starts_ptr, row_paths_ptr, paths_ptr, row, inside, used, anchor, p, DEPTHS: tl.constexpr, DEPTH_VECTOR: tl.constexpr
):
    """Where rows that hang on `anchor` find the K/V of a tree; zeros for rows not in use."""
    d = tl.arange(0, DEPTH_VECTOR)[None, :]
    tl.store(starts_ptr + row, tl.where(used, p, 0), mask=inside)
    path = tl.load(paths_ptr + anchor[:, None] * DEPTHS + d, mask=used[:, None] & (d < DEPTHS), other=0)
    tl.store(row_paths_ptr + row[:, None] * DEPTHS + d, path, mask=inside[:, None] & (d < DEPTHS))


# Row counts and widths of the state differ between calls; none is worth code of its own.
@triton.jit(
    do_not_specialize=[
        "tokens_stride", "drafts_stride", "anchors_stride", "table_stride", "context", "num_base", "num_rows", "padded",
    ]
)  # fmt: skip
def _lay_kernel(
    lanes_ptr,
    tokens_ptr,
    length_ptr,
    end_ptr,
    origin_ptr,
    seed_ptr,
    active_ptr,
    drafts_ptr,
    num_drafts_ptr,
    anchors_ptr,
    depths_ptr,
    paths_ptr,
    table_ptr,
    ids_ptr,
    positions_ptr,
    slots_ptr,
    limits_ptr,
    places_ptr,
    low_ptr,
    high_ptr,
    starts_ptr,
    row_paths_ptr,
    seeds_ptr,
    indices_ptr,
    tokens_stride,
    drafts_stride,
    anchors_stride,
    table_stride,
    context,
    num_base,
    num_rows,
    padded,
    VOCABULARY: tl.constexpr,
    TREE: tl.constexpr,
    BASE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    HANG: tl.constexpr,
    DEPTHS: tl.constexpr,
    BASE_VECTOR: tl.constexpr,
    DRAFT_VECTOR: tl.constexpr,
    DEPTH_VECTOR: tl.constexpr,
    PADDING: tl.constexpr,
):
    lane = tl.program_id(0)
    served = tl.load(lanes_ptr + lane)
    slot = tl.maximum(served, 0)  # an idle lane reads slot 0 and uses nothing of it
    live = (served >= 0) & (tl.load(active_ptr + slot) != 0)
    p = tl.load(length_ptr + slot) - 1
    end = tl.load(end_ptr + slot)
    seed = tl.load(seed_ptr + slot)
    drafted = tl.load(num_drafts_ptr + slot)

    j = tl.arange(0, BASE_VECTOR)
    inside = j < BASE
    depth = tl.load(depths_ptr + j, mask=inside, other=0)
    used = inside & live & (j <= drafted) & (p + depth + 1 < end)
    newest = tl.load(tokens_ptr + slot * tokens_stride + p, mask=live, other=0)
    draft = tl.load(drafts_ptr + slot * drafts_stride + j - 1, mask=used & (j > 0), other=0)
    page = tl.load(table_ptr + slot * table_stride + (p + j) // _PAGE, mask=used, other=0).to(tl.int64)
    row = lane * BASE + j
    tl.store(ids_ptr + row, tl.where(used & (j == 0), newest, draft), mask=inside)
    tl.store(positions_ptr + row, tl.where(used, p + depth, 0), mask=inside)
    tl.store(slots_ptr + row, tl.where(used, slot, 0), mask=inside)
    tl.store(limits_ptr + row, tl.where(used, p + depth + 1, 0), mask=inside)
    tl.store(places_ptr + row, tl.where(used, page * _PAGE + (p + j) % _PAGE, -1), mask=inside)
    tl.store(seeds_ptr + row, tl.where(used, seed, 0), mask=inside)
    index = p + depth + 1 - tl.load(origin_ptr + slot)
    tl.store(indices_ptr + row, tl.where(used, index, 0), mask=inside)
    if TREE:
        _write_paths(starts_ptr, row_paths_ptr, paths_ptr, row, inside, used, j, p, DEPTHS, DEPTH_VECTOR)

    if BLOCKS * BLOCK > 0:
        t = tl.arange(0, DRAFT_VECTOR)
        i = t % BLOCK
        inside = t < BLOCKS * BLOCK
        anchor = _anchors(anchors_ptr + slot * anchors_stride, t // BLOCK, drafted, inside, HANG)
        hangs = live & (anchor >= 0) & (anchor < BASE) & (anchor <= drafted)
        start = p + tl.load(depths_ptr + anchor, mask=hangs, other=0) + 1
        length = tl.minimum(context - start, BLOCK)
        used = hangs & (start < end) & (i < length)
        row = lane * (BLOCKS * BLOCK) + t
        first = row - i
        ids = tl.full((DRAFT_VECTOR,), -1, tl.int64)
        if VOCABULARY > 0:
            ids = hash_bits(seed, start + i, tl.zeros_like(start)).to(tl.int64) % VOCABULARY
        tl.store(low_ptr + row, tl.where(used, first, 0), mask=inside)
        tl.store(high_ptr + row, tl.where(used, first + length, 0), mask=inside)
        row += num_base
        tl.store(ids_ptr + row, tl.where(used, ids, 0), mask=inside)
        tl.store(positions_ptr + row, tl.where(used, start + i, 0), mask=inside)
        tl.store(slots_ptr + row, tl.where(used, slot, 0), mask=inside)
        tl.store(limits_ptr + row, tl.where(used, start, 0), mask=inside)
        if TREE:
            _write_paths(starts_ptr, row_paths_ptr, paths_ptr, row, inside, used, anchor, p, DEPTHS, DEPTH_VECTOR)

    nothing = tl.zeros((PADDING,), tl.int64)
    for first_spare in range(num_rows + lane * PADDING, padded, tl.num_programs(0) * PADDING):
        spare = first_spare + tl.arange(0, PADDING)
        exists = spare < padded
        tl.store(ids_ptr + spare, nothing, mask=exists)
        tl.store(positions_ptr + spare, nothing, mask=exists)
        tl.store(slots_ptr + spare, nothing, mask=exists)
        tl.store(limits_ptr + spare, nothing, mask=exists)
        if TREE:
            _write_paths(
                starts_ptr, row_paths_ptr, paths_ptr, spare, exists, nothing > 0, nothing, p, DEPTHS, DEPTH_VECTOR
            )


@triton.jit(do_not_specialize=["tokens_stride", "drafts_stride", "anchors_stride", "num_base"])
def _accept_kernel(
    lanes_ptr,
    tokens_ptr,
    length_ptr,
    end_ptr,
    active_ptr,
    drafts_ptr,
    num_drafts_ptr,
    anchors_ptr,
    eos_ptr,
    parents_ptr,
    depths_ptr,
    targets_ptr,
    limits_ptr,
    high_ptr,
    record_ptr,
    path_ptr,
    kept_ptr,
    chosen_ptr,
    tokens_stride,
    drafts_stride,
    anchors_stride,
    num_base,
    FIRST: tl.constexpr,
    BASE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    HANG: tl.constexpr,
    DEPTHS: tl.constexpr,
    SLOTS: tl.constexpr,
    ENDS: tl.constexpr,
    BASE_VECTOR: tl.constexpr,
    BLOCKS_VECTOR: tl.constexpr,
    DEPTH_VECTOR: tl.constexpr,
    SLOT_VECTOR: tl.constexpr,
    END_VECTOR: tl.constexpr,
):
    lane = tl.program_id(0)
    served = tl.load(lanes_ptr + lane)
    slot = tl.maximum(served, 0)
    live = (served >= 0) & (tl.load(active_ptr + slot) != 0) & (tl.load(limits_ptr + lane * BASE) > 0)
    length = tl.load(length_ptr + slot)
    end = tl.load(end_ptr + slot)
    drafted = tl.load(num_drafts_ptr + slot)
    targets_ptr += lane * BASE

    # A row in use agrees if its draft is the target of its parent; the path goes on through rows that agree.
    j = tl.arange(0, BASE_VECTOR)
    used = live & (tl.load(limits_ptr + lane * BASE + j, mask=j < BASE, other=0) > 0)
    node = used & (j > 0)
    parent = tl.load(parents_ptr + j, mask=node, other=-1)
    draft = tl.load(drafts_ptr + slot * drafts_stride + j - 1, mask=node, other=-1)
    agrees = node & (draft == tl.load(targets_ptr + parent, mask=node, other=-2))
    d = tl.arange(0, DEPTH_VECTOR)
    path = tl.zeros((DEPTH_VECTOR,), tl.int32)
    current = 0
    kept = 1
    for depth in range(1, DEPTHS):
        following = tl.min(tl.where(agrees & (parent == current), j, BASE_VECTOR), 0)
        found = following < BASE_VECTOR
        path = tl.where(found & (d == depth), following, path)
        kept += found.to(tl.int32)
        current = tl.where(found, following, -2)  # -2: nobody's parent
    kept = tl.where(live, kept, 0)

    # Targets of the path, up to the first that ends the request.
    on_path = d < kept
    token = tl.load(targets_ptr + path, mask=on_path, other=0)
    e = tl.arange(0, END_VECTOR)
    eos = tl.load(eos_ptr + e, mask=e < ENDS, other=-1)
    is_eos = tl.max((token[:, None] == eos[None, :]).to(tl.int32), 1) > 0
    stop = on_path & (is_eos | (length + d + 1 >= end))
    ending = tl.min(tl.where(stop, d + 1, DEPTH_VECTOR + 1), 0)
    taken = tl.minimum(ending, kept)
    runs = live & (ending > DEPTH_VECTOR)
    emitted = d < taken
    tl.store(tokens_ptr + slot * tokens_stride + length + d, token, mask=emitted)
    tl.store(length_ptr + slot, length + taken, mask=live)
    tl.store(active_ptr + slot, runs.to(tl.int64), mask=live)
    tl.store(num_drafts_ptr + slot, 0, mask=live)

    depths = tl.load(depths_ptr + j, mask=used, other=0)
    record_ptr += lane * (3 + DEPTHS)
    tl.store(record_ptr, taken)
    tl.store(record_ptr + 1, tl.where(live, tl.minimum(kept - 1, taken), 0))
    tl.store(record_ptr + 2, tl.max(depths, 0))
    tl.store(record_ptr + 3 + d, tl.where(emitted, token, 0), mask=d < DEPTHS)
    tl.store(path_ptr + lane * DEPTHS + d, path, mask=d < DEPTHS)
    tl.store(kept_ptr + lane, kept)

    # The first block that hangs on the last row of the path (rows rise along it) proposes what comes next.
    m = tl.arange(0, BLOCKS_VECTOR)
    anchor = _anchors(anchors_ptr + slot * anchors_stride, m, drafted, m < BLOCKS, HANG)
    block = tl.min(tl.where(anchor == tl.max(path, 0), m, BLOCKS_VECTOR), 0)
    proposes = runs & (block < BLOCKS_VECTOR) & (end - (length + taken) >= 2)
    i = tl.arange(0, SLOT_VECTOR)
    row = (lane * BLOCKS + block) * BLOCK + i + FIRST
    high = tl.load(high_ptr + row, mask=proposes & (i + FIRST < BLOCK), other=0)
    tl.store(chosen_ptr + lane * SLOTS + i, tl.where(high > 0, num_base + row, -1), mask=i < SLOTS)


@triton.jit
def _compact_kernel(
    key_ptr,
    value_ptr,
    table_ptr,
    lanes_ptr,
    length_ptr,
    path_ptr,
    kept_ptr,
    layer_stride,
    page_stride,
    table_stride,
    path_stride,
    WIDTH: tl.constexpr,
    WIDTH_VECTOR: tl.constexpr,
):
    lane = tl.program_id(1)
    slot = tl.load(lanes_ptr + lane)
    p = tl.load(length_ptr + lane) - 1
    kept = tl.where(slot >= 0, tl.load(kept_ptr + lane), 0)
    c = tl.arange(0, WIDTH_VECTOR)
    corner = tl.program_id(0).to(tl.int64) * layer_stride + tl.program_id(2) * (_PAGE * WIDTH) + c
    # path[d] >= d and the path rises: moved in this order, a place is read before another row comes to it.
    for d in range(1, kept):
        source = p + tl.load(path_ptr + lane * path_stride + d)
        target = p + d
        if source != target:
            table = table_ptr + slot * table_stride
            old_page = tl.load(table + source // _PAGE).to(tl.int64)
            new_page = tl.load(table + target // _PAGE).to(tl.int64)
            old = corner + old_page * page_stride + source % _PAGE * WIDTH
            new = corner + new_page * page_stride + target % _PAGE * WIDTH
            tl.store(key_ptr + new, tl.load(key_ptr + old, mask=c < WIDTH), mask=c < WIDTH)
            tl.store(value_ptr + new, tl.load(value_ptr + old, mask=c < WIDTH), mask=c < WIDTH)
