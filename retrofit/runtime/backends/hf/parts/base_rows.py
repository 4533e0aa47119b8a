"""Base rows over cached keys by the CPU's attention kernel, with bits that do not depend on the rows beside them.

Keys are cut at every multiple of `Form.piece`, so that every call of the kernel is over so many keys, whatever the
context; what a row does not see of a piece weighs exactly 0.  K/V are read where they are.
Not here: forwards whose drafts branch (`tree_rows.py`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrofit.adapters.visibility import Group, Window, base_span, hidden_keys, hiding, seen_by_all
from retrofit.runtime.backends.hf.exact_attention import Form
from retrofit.runtime.backends.hf.parts.call import (
    ROWS,
    Seen,
    joined,
    part,
    pieces,
    rectangle,
    rows_of,
    seen_of,
    sinks_of,
)

PARTS = 1 << 23
"""Most numbers that the parts of a call have before they are joined."""


def base_attention(
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window | None,
    scale: float,
    sinks: Tensor | None,
    form: Form,
) -> Tensor:
    """Base rows [S, Hq, T, D] over the cached keys [S, Hk, L, D], L = form.padded(group.keys) -> [S, Hq, T, D]."""
    S, H, T, D = query.shape
    heads = key.shape[1]
    window = hiding(window, group.last)
    size = max(1, min(ROWS * heads // H, PARTS * form.piece // (S * H * D * key.shape[2])))
    outs = []
    for first in range(0, T, size):
        stop = min(first + size, T)
        rows = rows_of(query[:, :, first:stop], heads, form)
        parts = []
        for low, high, seen in _calls(group, first, stop, window, form, heads, H // heads, rows):
            k, v = (pieces(t, low, high, form.piece) for t in (key, value))
            parts.append(part(rows, k, v, seen, scale))
        sink = None if sinks is None else sinks_of(sinks, S, heads, stop - first, rows.shape[2])
        outs.append(rectangle(joined(parts, sink), S, H, stop - first))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _calls(
    group: Group, first: int, stop: int, window: Window | None, form: Form, heads: int, query_heads: int, rows: Tensor
) -> list[tuple[int, int, Seen | None]]:
    """(low, high, what is seen) of each call, the same in every layer: first the pieces that all rows see whole."""
    key = ("calls", first, stop, window, heads, query_heads)
    if key not in group.masks:
        low, high = base_span(group, first, stop, window, form.piece)
        high = form.padded(high)
        whole = low
        if window is None and stop - first > 1:  # one row's mask is small
            whole = max(low, seen_by_all(group, first, stop) // form.piece * form.piece)
        calls: list[tuple[int, int, Seen | None]] = [(low, whole, None)] if whole > low else []
        if high > whole:
            hidden = hidden_keys(group, rows.device, first, stop, window, whole, high).unflatten(2, (-1, form.piece))
            seen = seen_of(hidden, heads, query_heads, rows.shape[2], rows.dtype)
            calls.append((whole, high, seen))
        group.masks[key] = calls
    found: list[tuple[int, int, Seen | None]] = group.masks[key]
    return found
