"""Attention of draft rows in training: the cache's keys below each block, and the block itself, under one softmax.

    a tile: some blocks of one sequence     far: keys of the cache                near: the block's own rows
                                            low ......................... high
    rows of a block that starts at 20       seen up to 19 | hidden                all, or those to the left
    rows of a block that starts at 31       seen up to 30         | hidden        all, or those to the left
    rows of a block that starts at 47       seen up to 46                         all, or those to the left

A tile reads the keys up to the last that any of its blocks sees, from the first inside the sliding window; scores exist
for one tile at a time and are made anew in the backward pass, and nothing is computed for the gradient of far keys
where nobody asks for it, as in the `frozen` profile.
So time follows what is seen, and memory is linear in length.  Far and near are normalised apart and mixed by their
shares of the whole sum, so that the keys of the cache are read in place.  Plain torch, any device.

Shapes: N rows = n blocks * K, Hq query heads, Hk key heads, G = Hq / Hk; a tile has c blocks and L far keys.  Its rows
are ordered (c, G, K): one matrix per key head, and one small matrix per key head and block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from retrofit.adapters.visibility import BlockRows, Window, first_seen, hiding
from retrofit.runtime.backends.sizes import size_for

TILE_SCORES = {"cpu": 1 << 19, "cuda": 1 << 26}
"""Scores of one tile, if it has more than one block.  On a CPU they should stay in its cache."""
HIDDEN = -1e30
"""Score of what is not seen: finite, because a row at the edge of its window may see none of the far keys."""


@dataclass(frozen=True)
class Tile:
    """Blocks `first` to `stop`, all of one sequence, against the keys `low` to `high` of its slot."""

    slot: int
    first: int
    stop: int
    low: int
    high: int
    hidden_from: int
    """Far keys before this one are seen by all its rows."""
    far_mask: Tensor
    """[c, 1, K, L - hidden_from] 0 or HIDDEN."""
    near_mask: Tensor
    """[c, 1, K, K]."""


@dataclass(frozen=True)
class Call:
    """All of a call that is not a tensor of the model."""

    tiles: list[Tile]
    block: int
    groups: int
    scaling: float
    softcap: float | None
    sinks: Tensor | None = None
    """[Hq] score of each head that stands for no key; gets no gradient."""


def tiles_of(rows: BlockRows, heads: int, window: Window | None, causal: bool) -> list[Tile]:
    """How the draft rows of a forward are cut up; the same in all layers with this window, so kept in `rows`."""
    budget = size_for(TILE_SCORES, rows.device)
    window = hiding(window, rows.last)
    key = (window, heads, budget)
    if key not in rows.tiles:
        tiles = []
        first = 0
        while first < len(rows.slots):
            stop = first + 1
            while stop < len(rows.slots) and rows.slots[stop] == rows.slots[first]:
                low, high = _reach(rows.starts[first : stop + 1], window)
                more = (stop + 1 - first) * rows.block
                if heads * more * (high - low) > budget:
                    break
                stop += 1
            tiles.append(_tile(rows, first, stop, window, causal))
            first = stop
        rows.tiles[key] = tiles
    return rows.tiles[key]


def _reach(starts: list[int], window: Window | None) -> tuple[int, int]:
    """The keys that any row of blocks with these starts sees."""
    return (0 if window is None else max(0, first_seen(min(starts), window))), max(starts)


def _tile(rows: BlockRows, first: int, stop: int, window: Window | None, causal: bool) -> Tile:
    starts, K = rows.starts[first:stop], rows.block
    low, high = _reach(starts, window)
    start, length = (torch.tensor(t[first:stop])[:, None, None] for t in (rows.starts, rows.lengths))
    slot = torch.arange(K)
    all_see = low if window is not None else min(starts)
    keys = torch.arange(all_see, high)
    far = (keys >= start).expand(-1, K, -1)
    # A row that is not there is seen by itself alone, which keeps its sum finite.
    near = (slot >= length) & (slot[:, None] != slot)
    if causal:
        near = near | (slot > slot[:, None])
    if window is not None:
        query, other = start + slot[:, None], start + slot
        far = far | (keys < first_seen(query, window))
        near = near | (torch.minimum(query, other) < first_seen(torch.maximum(query, other), window))
    masks = (torch.zeros(t.shape).masked_fill_(t, HIDDEN)[:, None].to(rows.device) for t in (far, near))
    return Tile(rows.slots[first], first, stop, low, high, all_see - low, *masks)


def block_attention(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, call: Call) -> Tensor:
    """query [Hq, N, D], key [Hk, N, D] and value [Hk, N, Dv] of draft rows -> [Hq, N, Dv].

    keys [slots, Hk, capacity, D] and values [slots, Hk, capacity, Dv] are a cache layer.
    """
    out: Tensor = _BlockAttention.apply(query, key, value, keys, values, call)
    return out


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, call: Call
    ) -> Tensor:
        out = query.new_empty(*query.shape[:2], value.shape[2])
        far_share, lse = (torch.zeros(query.shape[:2], dtype=torch.float32, device=query.device) for _ in range(2))
        for tile in call.tiles:
            view = _View(tile, call)
            q, v = view.rows(query), view.block(value)
            near = view.near_scores(q, view.block(key))
            total = near.logsumexp(-1, keepdim=True)
            if call.sinks is not None:
                total = torch.logaddexp(total, view.sinks(call.sinks))
            mixed = torch.zeros((), device=q.device)
            if tile.high > tile.low:
                far = view.far_scores(q, view.cached(keys))
                largest = far.amax(-1, keepdim=True)
                weights = torch.softmax(far, dim=-1)
                far_total = largest - weights.amax(-1, keepdim=True).log()
                total = torch.logaddexp(total, far_total)
                share = (far_total - total).exp_()
                view.put(far_share[..., None], share)
                mixed = torch.bmm(weights.to(q.dtype), view.cached(values)).float().mul_(share)
            near = near.sub_(total).exp_().to(q.dtype)
            view.put(out, mixed + view.per_block(near, v))
            view.put(lse[..., None], total)
        ctx.save_for_backward(query, key, value, keys, values, out, far_share, lse)
        ctx.call = call
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, keys, values, out, far_share, lse = ctx.saved_tensors
        call: Call = ctx.call
        d_query, d_key, d_value = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
        d_keys, d_values = (
            torch.zeros(t.shape, device=t.device) if wanted else None  # fp32: many blocks add to one key
            for t, wanted in zip((keys, values), ctx.needs_input_grad[3:5], strict=True)
        )
        for tile in call.tiles:
            view = _View(tile, call)
            q, k, v, given = view.rows(query), view.block(key), view.block(value), view.rows(gradient)
            mean = (given.float() * view.rows(out)).sum(-1, keepdim=True)
            near = view.near_scores(q, k)
            slope = view.slope(near)
            near = near.sub_(view.rows(lse[..., None])).exp_()
            view.put_block(d_value, view.per_block_transposed(near, given))
            d_near = view.per_block(given, v.transpose(1, 2)).sub_(mean).mul_(near)
            d_near = (d_near if slope is None else d_near.mul_(slope)).to(q.dtype)
            view.put_block(d_key, view.per_block_transposed(d_near, q).mul_(call.scaling))
            into = view.per_block(d_near, k)
            if tile.high > tile.low:
                seen = view.cached(keys)
                far = view.far_scores(q, seen)
                slope = view.slope(far)
                far = torch.softmax(far, dim=-1)
                d_far = product(given, view.cached(values).transpose(1, 2)).sub_(mean).mul_(far)
                d_far = (d_far if slope is None else d_far.mul_(slope)).to(q.dtype)
                share = view.rows(far_share[..., None])
                if d_values is not None:
                    view.cached(d_values).add_(product(far.mul(share).to(q.dtype).transpose(1, 2), given))
                if d_keys is not None:
                    shared = d_far.mul(share.to(q.dtype)).transpose(1, 2)
                    view.cached(d_keys).add_(product(shared, q), alpha=call.scaling)
                into = torch.bmm(d_far, seen).float().mul_(share).add_(into)
            view.put(d_query, into.mul_(call.scaling))
        far_gradients = (None if d is None else d.to(t.dtype) for d, t in ((d_keys, keys), (d_values, values)))
        return d_query, d_key, d_value, *far_gradients, None


def product(left: Tensor, right: Tensor) -> Tensor:
    """[n, x, y] times [n, y, z] in fp32, whatever type both have: a score is not rounded before the softmax."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.is_cuda:
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


@dataclass(frozen=True)
class _View:
    """A tile's part of the tensors, in the order of its rows, and back."""

    tile: Tile
    call: Call

    def _slice(self, rows_HND: Tensor) -> Tensor:
        return rows_HND[:, self.tile.first * self.call.block : self.tile.stop * self.call.block]

    @property
    def _shape(self) -> tuple[int, ...]:
        """(c, G, K)."""
        return self.tile.stop - self.tile.first, self.call.groups, self.call.block

    def rows(self, rows_HND: Tensor) -> Tensor:
        """[Hq, N, D] -> [Hk, c * G * K, D]."""
        c, G, K = self._shape
        part = self._slice(rows_HND)
        Hk, D = part.shape[0] // G, part.shape[2]
        return part.reshape(Hk, G, c, K, D).transpose(1, 2).reshape(Hk, -1, D)

    def put(self, rows_HND: Tensor, tile: Tensor) -> None:
        """Write what `rows` would read."""
        c, G, K = self._shape
        Hk, _, D = tile.shape
        part = self._slice(rows_HND)
        part.view(Hk, G, c, K, D).copy_(tile.view(Hk, c, G, K, D).transpose(1, 2))

    def sinks(self, sinks_H: Tensor) -> Tensor:
        """[Hq] -> fp32 [Hk, c * G * K, 1]."""
        c, G, K = self._shape
        return sinks_H.float().view(-1, 1, G, 1).expand(-1, c, G, K).reshape(-1, c * G * K, 1)

    def block(self, rows_HND: Tensor) -> Tensor:
        """[Hk, N, D] -> [Hk * c, K, D]."""
        return self._slice(rows_HND).reshape(-1, self.call.block, rows_HND.shape[2])

    def put_block(self, rows_HND: Tensor, tile: Tensor) -> None:
        """Write what `block` would read."""
        self._slice(rows_HND).copy_(tile.view(rows_HND.shape[0], -1, rows_HND.shape[2]))

    def cached(self, layer: Tensor) -> Tensor:
        """[slots, Hk, capacity, D] -> [Hk, L, D]."""
        return layer[self.tile.slot, :, self.tile.low : self.tile.high]

    def far_scores(self, q: Tensor, seen: Tensor) -> Tensor:
        """[Hk, c * G * K, L] fp32."""
        scores = self._scaled(product(q, seen.transpose(1, 2)))
        scores.view(-1, *self._shape, scores.shape[-1])[..., self.tile.hidden_from :].add_(self.tile.far_mask)
        return scores

    def near_scores(self, q: Tensor, own: Tensor) -> Tensor:
        """[Hk, c * G * K, K] fp32."""
        scores = self._scaled(self.per_block(q, own.transpose(1, 2)))
        scores.view(-1, *self._shape, scores.shape[-1]).add_(self.tile.near_mask)
        return scores

    def _scaled(self, scores: Tensor) -> Tensor:
        scores = scores.mul_(self.call.scaling)
        softcap = self.call.softcap
        return scores if softcap is None else scores.div_(softcap).tanh_().mul_(softcap)

    def slope(self, scores: Tensor) -> Tensor | None:
        """Derivative of softcap * tanh(x / softcap), from its value; nobody asks where it is hidden."""
        if self.call.softcap is None:
            return None
        return (scores / self.call.softcap).square_().neg_().add_(1).clamp_(min=0)

    def per_block(self, rows: Tensor, own: Tensor) -> Tensor:
        """[Hk, c * G * K, x] times one matrix [x, y] per block -> [Hk, c * G * K, y] in fp32."""
        found = product(rows.reshape(own.shape[0], -1, rows.shape[2]), own)
        return found.view(rows.shape[0], rows.shape[1], -1)

    def per_block_transposed(self, weights: Tensor, rows: Tensor) -> Tensor:
        """Per block: weights [G * K, K]^T times rows [G * K, D] -> [Hk * c, K, D]."""
        count = rows.shape[0] * self._shape[0]
        left = weights.to(rows.dtype).view(count, -1, weights.shape[2])
        return torch.bmm(left.transpose(1, 2), rows.reshape(count, -1, rows.shape[2]))
