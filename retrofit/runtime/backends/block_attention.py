"""Attention of draft rows in training: frozen keys below each block, and the block itself, under one softmax.

    a tile: blocks of one sequence      keys of the cache, no gradient    rows of the tile's own blocks
                                        low ..................... high    block 0   block 1   block 2
    rows of block 0 (starts at 20)      seen up to 19 | hidden            seen      hidden    hidden
    rows of block 1 (starts at 31)      seen up to 30      | hidden       hidden    seen      hidden
    rows of block 2 (starts at 47)      seen up to 46                     hidden    hidden    seen

A tile reads the keys up to the last that any of its blocks sees, from the first inside the sliding window; scores exist
for one tile at a time and are made anew in the backward pass, which keeps nothing but its inputs and computes nothing
for the frozen keys.  So time and memory follow what is seen, and are linear in length.  Plain torch, any device.

Shapes: N rows = n blocks * K, Hq query heads, Hk key heads, G = Hq / Hk; in a tile c blocks, R = c * K rows, L keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retrofit.adapters.rows import BlockRows

TILE_SCORES = {"cpu": 1 << 17, "cuda": 1 << 26}
"""Scores of one tile, if it has more than one block.  On a CPU they should stay in its cache."""


@dataclass(frozen=True)
class Tile:
    """Blocks `first` to `stop`, all of one sequence, against the keys `low` to `high` of its slot."""

    slot: int
    first: int
    stop: int
    low: int
    high: int
    hidden_from: int
    """Columns before this one are seen by all its rows."""
    mask: Tensor
    """[R, L + R - hidden_from] 0 where a row sees a column, else -inf: keys of the cache, then the tile's own rows."""


@dataclass(frozen=True)
class Call:
    """All of a call that is not a tensor of the model."""

    tiles: list[Tile]
    block: int
    groups: int
    scaling: float
    softcap: float | None


def tiles_of(rows: BlockRows, heads: int, window: int | None, causal: bool) -> list[Tile]:
    """How the draft rows of a forward are cut up; the same in all layers with this window, so kept in `rows`."""
    budget = TILE_SCORES.get(rows.device.type, TILE_SCORES["cuda"])
    window = None if window is None or rows.last < window else window
    key = (window, heads, budget)
    if key not in rows.tiles:
        tiles = []
        first = 0
        while first < len(rows.slots):
            stop = first + 1
            while stop < len(rows.slots) and rows.slots[stop] == rows.slots[first]:
                low, high = _reach(rows.starts[first : stop + 1], window)
                more = (stop + 1 - first) * rows.block
                if heads * more * (high - low + more) > budget:
                    break
                stop += 1
            tiles.append(_tile(rows, first, stop, window, causal))
            first = stop
        rows.tiles[key] = tiles
    return rows.tiles[key]


def _reach(starts: list[int], window: int | None) -> tuple[int, int]:
    """The keys that any row of blocks with these starts sees."""
    return (0 if window is None else max(0, min(starts) - window + 1)), max(starts)


def _tile(rows: BlockRows, first: int, stop: int, window: int | None, causal: bool) -> Tile:
    starts, count, K = rows.starts[first:stop], stop - first, rows.block
    low, high = _reach(starts, window)
    start = torch.tensor(starts).repeat_interleave(K)[:, None]
    slot = torch.arange(K).repeat(count)
    query = start[:, 0] + slot
    all_see = low if window is not None else min(starts)
    keys = torch.arange(all_see, high)
    far = keys >= start
    block = torch.arange(count).repeat_interleave(K)
    near = block[:, None] != block
    # A row that is not there is seen by itself alone, which keeps its sum finite.
    near |= (slot >= torch.tensor(rows.lengths[first:stop]).repeat_interleave(K)) & (slot[:, None] != slot)
    if causal:
        near |= slot > slot[:, None]
    if window is not None:
        far |= query[:, None] - keys >= window
        near |= (slot[:, None] - slot).abs() >= window
    hidden = torch.cat([far, near], dim=1)
    mask = torch.zeros(hidden.shape).masked_fill_(hidden, float("-inf")).to(rows.device)
    return Tile(rows.slots[first], first, stop, low, high, all_see - low, mask)


def block_attention(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, call: Call) -> Tensor:
    """query [Hq, N, D], key [Hk, N, D] and value [Hk, N, Dv] of draft rows -> [Hq, N, Dv].

    keys [slots, capacity, Hk, D] and values [slots, capacity, Hk, Dv] are a cache layer; they get no gradient.
    """
    out: Tensor = _BlockAttention.apply(query, key, value, keys, values, call)  # type: ignore[no-untyped-call]
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, call: Call
    ) -> Tensor:
        out = query.new_empty(*query.shape[:2], value.shape[2])
        for tile in call.tiles:
            q, k, v = _rows(query, tile, call), _columns(keys, key, tile, call), _columns(values, value, tile, call)
            _put(out, _weights(_scores(q, k, tile, call)).to(v.dtype) @ v, tile, call)
        ctx.save_for_backward(query, key, value, keys, values)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, keys, values = ctx.saved_tensors
        call: Call = ctx.call
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        for tile in call.tiles:
            q, k, v = _rows(query, tile, call), _columns(keys, key, tile, call), _columns(values, value, tile, call)
            given = _rows(gradient, tile, call)
            scores = _scores(q, k, tile, call)
            slope = None if call.softcap is None else _slope(scores, call.softcap)
            weights = _weights(scores)
            d_weights = (given @ v.transpose(1, 2)).float()
            d_scores = torch._softmax_backward_data(d_weights, weights, -1, torch.float32)
            d_scores = (d_scores if slope is None else d_scores.mul_(slope)).to(q.dtype)
            own, rows = tile.high - tile.low, slice(tile.first * call.block, tile.stop * call.block)
            d_value[:, rows] = weights[:, :, own:].to(given.dtype).transpose(1, 2) @ given
            d_key[:, rows] = (d_scores[:, :, own:].transpose(1, 2) @ q).mul_(call.scaling)
            _put(d_query, (d_scores @ k).mul_(call.scaling), tile, call)
        return d_query, d_key, d_value, None, None, None


def _rows(rows_HND: Tensor, tile: Tile, call: Call) -> Tensor:
    """The tile's rows of [Hq, N, D] as one matrix per key head: [Hk, G * R, D]."""
    part = rows_HND[:, tile.first * call.block : tile.stop * call.block]
    return part.reshape(part.shape[0] // call.groups, -1, part.shape[2])


def _put(rows_HND: Tensor, matrix: Tensor, tile: Tile, call: Call) -> None:
    """Write what `_rows` would read."""
    rows_HND[:, tile.first * call.block : tile.stop * call.block] = matrix.view(rows_HND.shape[0], -1, matrix.shape[2])


def _columns(cached: Tensor, own_HND: Tensor, tile: Tile, call: Call) -> Tensor:
    """[Hk, L + R, D] what a tile's rows may see: keys or values of the cache, then those of its own rows."""
    seen = cached[tile.slot, tile.low : tile.high].transpose(0, 1)
    return torch.cat([seen, own_HND[:, tile.first * call.block : tile.stop * call.block]], dim=1)


def _scores(q: Tensor, k: Tensor, tile: Tile, call: Call) -> Tensor:
    """[Hk, G * R, L + R] scaled, soft-capped, -inf where hidden."""
    scores = torch.bmm(q * call.scaling, k.transpose(1, 2))
    if call.softcap is not None:
        scores.div_(call.softcap).tanh_().mul_(call.softcap)
    per_row = scores.view(q.shape[0], call.groups, -1, scores.shape[2])
    per_row[..., tile.hidden_from :].add_(tile.mask)
    return scores


def _weights(scores: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1, dtype=torch.float32)


def _slope(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of softcap * tanh(x / softcap), from its value; 0 where the score is hidden."""
    return (capped.float() / softcap).square_().neg_().add_(1).clamp_(min=0)
