"""Attention as is fastest, where no bits are promised: one call, or pieces where the mask of one would be too large."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.adapters.rows import RowPlan
from retrofit.adapters.visibility import Chunk, Window, hiding
from retrofit.runtime.backends.hf.exact_attention import weights_of

LARGE_MASK = 1 << 22
"""Rows times keys of one sequence from which base rows are masked in pieces."""
LARGE_SCORES = 1 << 24
"""Heads times rows times keys of one sequence from which scores, where they are made, are made in pieces."""
PIECE = 1 << 22
"""Elements of a piece's mask, or of its scores, over all sequences."""


def attend(
    query_SHTD: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(scaling * q k^T [soft-capped] + mask) v for grouped queries; with sinks [Hq], over them too.

    query [S, Hq, T, D], key [S, Hkv, L, D], value [S, Hkv, L, Dv], mask additive [S, 1, T, L] -> [S, Hq, T, Dv].
    """
    groups = query_SHTD.shape[1] // key.shape[1]
    plain = softcap is None and sinks is None
    if plain and value.shape[-1] < key.shape[-1]:
        # MLA: the fast kernels want equal widths; zero columns of V only add zero columns to the output.
        padded = F.pad(value, (0, key.shape[-1] - value.shape[-1]))
        return attend(query_SHTD, key, padded, mask, causal, scaling, None)[..., : value.shape[-1]]
    if plain:
        return F.scaled_dot_product_attention(
            query_SHTD, key, value, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=groups > 1
        )
    S, H, T, D = query_SHTD.shape
    scores = query_SHTD.reshape(S, H // groups, groups * T, D) @ key.transpose(2, 3) * scaling
    scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)).view(S, H, T, -1)
    if causal:
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=scores.device).triu(1), float("-inf"))
    if mask is not None:
        scores = scores + mask
    weights = weights_of(scores.float(), None if sinks is None else sinks[:, None, None]).to(query_SHTD.dtype)
    out = weights.view(S, H // groups, groups * T, -1) @ value
    return out.view(S, H, T, -1)


def base_rows(
    plan: RowPlan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Base rows [S, Hq, T, D] over the base keys [S, Hk, L, .]."""
    group = plan.base
    assert group is not None
    S, H, T = query.shape[:3]
    window = hiding(window, group.last)
    masked = window is not None or not (group.plain_causal or T == 1)
    made = softcap is not None or sinks is not None  # scores of all rows and keys
    scores = H * T * group.keys if made else 0
    if plan.tree or not (scores > LARGE_SCORES or (masked and T * group.keys > LARGE_MASK)):
        mask, causal = plan.base_mask(window, query.dtype)
        return attend(query, key, value, mask, causal, scale, softcap, sinks)
    room = max(1, PIECE // (S * (H if made else 1)))
    rows = max(1, room // group.keys)
    if window is not None:  # a piece reads rows + window keys
        size = window.size if isinstance(window, Chunk) else window
        rows = max(rows, int((size**2 + 4 * room) ** 0.5 - size) // 2)
    out = query.new_empty(S, H, T, value.shape[-1])
    for first in range(0, T, rows):
        piece = slice(first, min(first + rows, T))
        low, high, seen = plan.base_part(window, piece.start, piece.stop)
        mask = torch.zeros(seen.shape, dtype=query.dtype, device=seen.device).masked_fill_(~seen, float("-inf"))
        k, v = (t[:, :, low:high] for t in (key, value))
        out[:, :, piece] = attend(query[:, :, piece], k, v, mask[:, None], False, scale, softcap, sinks)
    return out
