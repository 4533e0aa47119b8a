"""One call of torch's attention kernel for CPUs over some of the keys, and the sum of such calls.

    rows    [1, S * Hk, M, D]: the M rows that share a K/V head, and read it once
    part    [P, S * Hk, M, D] and, of each row, the logarithm of the sum of its weights: P times so many keys
    joined  softmax over all parts, as if it had been one call

Plain torch makes scores, weights and sums in a dozen operations and writes them all to memory; this is one.
Not here: who sees what.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.runtime.backends.hf.exact_attention import Form

HERE = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
"""Whether this torch has the kernel."""
BLOCK = 32
"""Rows that the kernel takes together."""
ROWS = 160
"""Most rows that share a K/V head in a call: from 192 on the kernel takes more together."""
NEGATIVE = float("-inf")


class Part(NamedTuple):
    """What rows made of some of their keys."""

    out: Tensor
    """[P, B, M, D], as if there were no other keys."""
    sums: Tensor
    """[P, B, M] logarithm of the sum of the weights; minus infinity where a row sees none of the keys."""


class Seen(NamedTuple):
    """Which keys of a part rows see."""

    mask: Tensor
    """Additive [P, 1 or B, 1 or M, keys]."""
    nothing: Tensor | None
    """[P, 1 or B, 1 or M] minus infinity where a row sees none, else 0; None: there is no such row."""


def fits(query: Tensor, value: Tensor, softcap: float | None) -> bool:
    """Whether the kernel does this: it soft-caps nothing, and K and V have to be equally wide."""
    return query.device.type == "cpu" and HERE and softcap is None and query.shape[-1] == value.shape[-1]


def part(rows: Tensor, key: Tensor, value: Tensor, seen: Seen | None, scale: float) -> Part:
    """rows [1 or P, B, M, D]; key, value [P, B, keys, D]."""
    mask = None if seen is None else seen.mask
    rows = rows.expand(key.shape[0], -1, -1, -1)
    out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows, key, value, attn_mask=mask, scale=scale
    )
    # Of rows that see nothing the kernel says 0, which would be a sum of 1.
    return Part(out, sums if seen is None or seen.nothing is None else sums + seen.nothing)


def joined(parts: Sequence[Part], sinks: Tensor | None = None) -> Tensor:
    """[B, M, D]; parts in the order of their keys; every row sees something of some part.

    sinks: [B, M] score of each row that stands for no key.
    Elementwise operations alone, for reductions add in an order that goes by how many rows there are; and in turn, for
    rows beside a row may put parts before, between and behind its own, which weigh nothing and then change nothing.
    """
    out, sums = parts[0] if len(parts) == 1 else (torch.cat(column) for column in zip(*parts, strict=True))
    if len(out) == 1 and sinks is None:
        return out[0]
    most = sums.amax(0) if sinks is None else torch.maximum(sums.amax(0), sinks)
    weights = (sums - most).exp_().unsqueeze(-1)
    made = out.float().mul_(weights) if out.dtype != torch.float32 else out * weights
    total = _in_turn(weights)
    if sinks is not None:
        total = total + (sinks - most).exp_().unsqueeze(-1)
    return _in_turn(made).div_(total).to(out.dtype)


def _in_turn(x: Tensor) -> Tensor:
    total = x[0]
    for one in x[1:]:
        total += one
    return total


def seen_of(hidden_STPL: Tensor, heads: int, group: int, rows: int, dtype: torch.dtype) -> Seen:
    """From which keys T rows of S sequences do not see, in P parts; heads: of K/V; group: query heads of each.

    rows: M, the rows of a call: all that share a K/V head, and filler, which sees everything.
    """
    S, T = hidden_STPL.shape[:2]
    mask = torch.zeros(hidden_STPL.shape, dtype=dtype).masked_fill_(hidden_STPL, NEGATIVE)
    none = hidden_STPL.all(-1)
    nothing = torch.zeros(none.shape).masked_fill_(none, NEGATIVE)[..., None]

    def laid_out(x_STPL: Tensor) -> Tensor:
        x = x_STPL.permute(2, 0, 1, 3)
        if S > 1:
            x = x[:, :, None].expand(-1, -1, heads, -1, -1).flatten(1, 2)
        if T > 1:
            x = x[:, :, None].expand(-1, -1, group, -1, -1).flatten(2, 3)
            x = F.pad(x, (0, 0, 0, rows - x.shape[2]))
        return x.contiguous()

    return Seen(laid_out(mask), laid_out(nothing)[..., 0] if none.any() else None)


def sinks_of(sinks_H: Tensor, sequences: int, heads: int, width: int, rows: int) -> Tensor:
    """fp32 [S * Hk, M] of each row, as `rows_of` lays out `width` rows of each head; 0 of filler up to M = rows."""
    by_row = sinks_H.float().view(heads, -1, 1).expand(-1, -1, width).flatten(1)
    return F.pad(by_row, (0, rows - by_row.shape[1])).repeat(sequences, 1)


def filled(rows: int, form: Form) -> int:
    """Rows of a call: with filler a multiple of `form.rows`, and no fewer than `form.least` in the last block."""
    rows = -(-rows // form.rows) * form.rows
    return rows + max(0, form.least - rows % BLOCK) if rows % BLOCK else rows


def rows_of(query_SHTD: Tensor, heads: int, form: Form | None = None) -> Tensor:
    """[1, S * Hk, M, D]: rows that share a K/V head together, filled up as the form wants it."""
    S, H, T, D = query_SHTD.shape
    rows = query_SHTD.reshape(1, S * heads, H // heads * T, D)
    filler = 0 if form is None else filled(rows.shape[2], form) - rows.shape[2]
    return F.pad(rows, (0, 0, 0, filler)) if filler else rows


def rectangle(out_BMD: Tensor, sequences: int, heads: int, width: int) -> Tensor:
    """`rows_of` undone: [S, H, T, D] of H query heads and T = width rows each."""
    group = heads * sequences // out_BMD.shape[0]
    out = out_BMD[:, : group * width]
    return out.reshape(sequences, heads, width, out.shape[-1])


def pieces(cached_SHLD: Tensor, low: int, high: int, piece: int) -> Tensor:
    """[P, S * Hk, piece, D] of keys `low` to `high`, a view: sequences are neighbours in memory."""
    S, H, _, D = cached_SHLD.shape
    _, head, key, _ = cached_SHLD.stride()
    sizes, strides = ((high - low) // piece, S * H, piece, D), (piece * key, head, key, 1)
    return cached_SHLD.as_strided(sizes, strides, cached_SHLD.storage_offset() + low * key)
