"""Attention of base rows over what their indexer picked.

Not here: the picking (`indexers.py`); draft rows, which attend to all that a row of theirs may see.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from retrofit.adapters.rows import RowPlan
from retrofit.adapters.visibility import Window, base_visibility, path_visibility
from retrofit.runtime.backends.hf import exact_attention
from retrofit.runtime.backends.hf.dense_attention import PIECE, attend


def picked_attention(
    context: Any,
    plan: RowPlan,
    layer: int,
    query: Tensor,
    tree: list[tuple[Tensor, Tensor]],
    how: tuple[Window | None, float, float | None, Tensor | None],
    picked: Tensor,
) -> Tensor:
    """Base rows [S, Hq, T, D] -> [S, Hq, T, Dv].

    picked: `Picked.mask`; tree: K and V of the rows, where they branch.
    """
    group, form, cache = plan.base, context.form, context.cache
    assert group is not None
    if form is None:
        k, v = cache.read(layer, group.slots, group.keys)
        if tree:
            k, v = (torch.cat([old, new], 2) for old, new in zip((k, v), tree[0], strict=True))
        return _dense(plan, query, k, v, how, picked)
    there = cache.columns(layer)
    if tree:
        cached = cache.read(layer, group.slots, form.columns(plan.paths.stop, there, query.dtype))
        return exact_attention.tree_attention(group, plan.paths, query, cached, tree[0], *how, form, picked)
    outs = []
    for first, stop in group.runs:
        some = group.some(first, stop)
        k, v = cache.read(layer, some.slots, form.columns(some.keys, there, query.dtype))
        part = picked[first:stop]
        outs.append(exact_attention.base_attention(some, query[first:stop], k, v, *how, form, part))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _dense(
    plan: RowPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    how: tuple[Window | None, float, float | None, Tensor | None],
    picked: Tensor,
) -> Tensor:
    """In pieces of rows, so that masks stay small."""
    window, scale, softcap, sinks = how
    S, Hq, T = query.shape[:3]
    seen_STL = torch.from_numpy(_visible(plan, window)).to(query.device)
    heads = Hq // picked.shape[1] if picked.shape[1] > 1 else 1
    rows = max(1, PIECE // (S * key.shape[2] * picked.shape[1] * heads))
    outs = []
    for first in range(0, T, rows):
        piece = slice(first, min(first + rows, T))
        seen = seen_STL[:, None, piece] & _over_keys(plan, picked[:, :, piece], key.shape[2])
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device).masked_fill_(~seen, float("-inf"))
        mask = mask.repeat_interleave(heads, 1) if heads > 1 else mask
        outs.append(attend(query[:, :, piece], key, value, mask, False, scale, softcap, sinks))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _visible(plan: RowPlan, window: Window | None) -> np.ndarray:
    """bool [S, T, L] what rows may see: base positions, and of a tree its rows."""
    group = plan.base
    assert group is not None
    seen = base_visibility(group, window)
    return np.concatenate([seen, path_visibility(group, group, window)], axis=2) if plan.tree else seen


def _over_keys(plan: RowPlan, picked: Tensor, keys: int) -> Tensor:
    """[S, G, T, P] by position -> [S, G, T, L] by key: base positions, and of a tree its rows, each at its own."""
    group = plan.base
    assert group is not None
    if not plan.tree:
        return picked[..., :keys]
    at = torch.from_numpy(np.maximum(group.query, 0)).to(picked.device)
    own = picked.gather(3, at[:, None, None].expand(*picked.shape[:3], -1))
    return torch.cat([picked[..., : group.keys], own], 3)
