"""Draft rows over cached keys and their own block by the CPU's attention kernel; no bit of theirs is promised.

    all        cached keys that every row sees, where they are; few of them go with the rows' own
    some       the other cached keys, where they are; likewise
    own        a tree's base rows, and the rows of the blocks

So a step copies no K/V but its own rows', and a few.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retrofit.adapters.rows import RowPlan
from retrofit.adapters.visibility import Window, first_seen, hiding
from retrofit.runtime.backends.hf.parts.call import Seen, joined, part, rectangle, rows_of, seen_of, sinks_of

FEW = 512
"""Cached keys that are copied rather than read by a call of their own."""


def draft_attention(
    plan: RowPlan,
    query: Tensor,
    cached: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    window: Window | None,
    scale: float,
    sinks: Tensor | None,
) -> Tensor:
    """Draft rows [S, Hq, T, D] over cached K and V [S, Hk, keys, D] and own ones [S, Hk, R, D] -> [S, Hq, T, D]."""
    group = plan.draft
    assert group is not None
    S, H, T, _ = query.shape
    heads = cached[0].shape[1]
    window = hiding(window, group.last)
    rows = rows_of(query, heads)
    key = ("parts", window, heads, query.dtype)
    if key not in group.masks:
        group.masks[key] = _layout(plan, window, heads, H // heads, rows)
    low, whole, some, rest = group.masks[key]
    calls: list[tuple[list[Tensor], Seen | None]] = []
    if whole > low:
        calls.append(([t[:, :, low:whole] for t in cached], None))
    if some is not None:
        calls.append(([t[:, :, whole:] for t in cached], some))
        calls.append((list(own), rest))
    else:
        calls.append(([torch.cat([c[:, :, whole:], o], 2) for c, o in zip(cached, own, strict=True)], rest))
    made = []
    for (k, v), seen in calls:
        k, v = (t.flatten(0, 1)[None] if S > 1 else t for t in (k, v))
        made.append(part(rows, k, v, seen, scale))
    sink = None if sinks is None else sinks_of(sinks, S, heads, T, rows.shape[2])
    return rectangle(joined(made, sink), S, H, T)


def _layout(
    plan: RowPlan, window: Window | None, heads: int, query_heads: int, rows: Tensor
) -> tuple[int, int, Seen | None, Seen]:
    """(first key of all, behind the last key that all rows see, the others', the rest's): equal in such layers."""
    group = plan.draft
    assert group is not None
    there = group.query >= 0
    low, whole = 0, int(np.where(there, group.limit, group.keys).min())
    if window is not None:
        low = whole = max(0, first_seen(int(group.query[there].min()), window))
    whole = min(whole, group.keys)
    low = min(low, whole)
    if group.keys - low <= FEW:
        whole = low  # one call over a few keys that are copied takes less time than two that have to be joined
    seen = plan.draft_visibility(window)
    seen[~there, : 1 + whole] = True  # padding: nobody reads it, but it has to be finite
    how = (heads, query_heads, rows.shape[2], rows.dtype)
    if group.keys - whole <= FEW:
        return low, whole, None, _seen(~seen[:, :, whole:], how)
    return low, whole, _seen(~seen[:, :, whole : group.keys], how), _seen(~seen[:, :, group.keys :], how)


def _seen(hidden_STL: np.ndarray, how: tuple[int, int, int, torch.dtype]) -> Seen:
    return seen_of(torch.from_numpy(np.ascontiguousarray(hidden_STL))[:, :, None], *how)
