"""Base rows of a forward whose drafts branch, by the CPU's attention kernel: each with the bits it has in a chain.

    pieces 0 .. a-1   committed keys, read where they are, as in `base_rows.py`
    piece a           in which the drafts begin: copies of it, with the drafts as `branches.py` says
    pieces a+1 ..     the same without committed keys, where drafts reach that far

Not here: storing what is accepted.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.adapters.visibility import Group, Paths, Window, base_span, first_seen, hiding
from retrofit.runtime.backends.hf.exact_attention import Form
from retrofit.runtime.backends.hf.parts.branches import copies
from retrofit.runtime.backends.hf.parts.call import (
    NEGATIVE,
    ROWS,
    Part,
    Seen,
    filled,
    joined,
    part,
    pieces,
    rectangle,
    rows_of,
    seen_of,
    sinks_of,
)


@dataclass(frozen=True)
class _Heads:
    """What is the same for all calls of a forward."""

    kv: int
    group: int
    """Query heads of each K/V head."""
    form: Form
    window: Window | None
    dtype: torch.dtype

    @property
    def most(self) -> int:
        """Tokens whose rows a call may have."""
        return max(1, ROWS // self.group)


@dataclass(frozen=True)
class _Tail:
    """N copies of a piece in which drafts lie."""

    sequence: Tensor
    """[N, 1]"""
    keys: Tensor
    """[N, piece] which key of the sequence's piece, or behind those, of which row."""
    rows: Tensor
    """[N, R] which rows of the sequence attend there; filler is row 0."""
    seen: Seen
    where: tuple[Tensor, Tensor]
    """[S, T] in which copy a row attends, and as which of its rows."""
    absent: Tensor | None
    """[S, T] minus infinity for rows without a key in this piece, else 0; None: there is no such row."""


def tree_attention(
    group: Group,
    paths: Paths,
    query: Tensor,
    cached: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    window: Window | None,
    scale: float,
    sinks: Tensor | None,
    form: Form,
) -> Tensor:
    """Base rows [S, Hq, T, D] -> [S, Hq, T, D].

    cached: K and V [S, Hk, L, D] of the committed positions, L = form.padded(paths.stop); own: those [S, Hk, T, D] of
    these rows.
    """
    S, H, T = query.shape[:3]
    window = hiding(window, group.last)
    heads = _Heads(cached[0].shape[1], H // cached[0].shape[1], form, window, query.dtype)
    key = ("tree", heads)
    if key not in group.masks:
        group.masks[key] = _shared(group, paths, heads), _tails(group, paths, heads)
    shared, tails = group.masks[key]
    parts: list[Part] = []
    if shared is not None:
        low, high, calls = shared
        k, v = (pieces(t, low, high, form.piece) for t in cached)
        parts.append(_over_committed(query, k, v, calls, heads, scale))
    begins = [start // form.piece * form.piece for start in paths.starts]
    sources = [torch.cat([_piece(c, begins, form.piece), o], 2) for c, o in zip(cached, own, strict=True)]
    parts += [_attended(tail, query, sources, heads, scale) for tail in tails]
    sink = None if sinks is None else sinks_of(sinks, S, heads.kv, T, T * heads.group)
    return rectangle(joined(parts, sink), S, H, T)


def _piece(cached: Tensor, begins: list[int], piece: int) -> Tensor:
    """[S, Hk, piece, D] in which each sequence's drafts begin."""
    if len(begins) == 1:
        return cached[:, :, begins[0] : begins[0] + piece]
    return torch.stack([cached[s, :, begin : begin + piece] for s, begin in enumerate(begins)])


def _attended(tail: _Tail, query: Tensor, sources: list[Tensor], heads: _Heads, scale: float) -> Part:
    """[1, S * Hk, G * T, D]: each row from the copy that it attends in."""
    S, _, T, D = query.shape
    key, value = (t[tail.sequence, :, tail.keys].transpose(1, 2) for t in sources)
    N, R = tail.rows.shape
    rows = query[tail.sequence, :, tail.rows].view(N, R, heads.kv, heads.group, D).permute(0, 2, 3, 1, 4)
    rows = F.pad(rows.flatten(2, 3), (0, 0, 0, filled(R * heads.group, heads.form) - R * heads.group))
    out, sums = part(rows, key, value, tail.seen, scale)
    # [N, Hk, G * R, ..] -> [S, T, Hk, G, ..] -> [1, S * Hk, G * T, ..]
    out, sums = (t[:, :, : R * heads.group].unflatten(2, (heads.group, R)) for t in (out, sums.unsqueeze(-1)))
    out, sums = (t.permute(0, 3, 1, 2, 4)[tail.where] for t in (out, sums))
    if tail.absent is not None:
        sums = sums + tail.absent[:, :, None, None, None]
    out, sums = (t.permute(0, 2, 3, 1, 4).reshape(1, S * heads.kv, heads.group * T, -1) for t in (out, sums))
    return Part(out, sums[..., 0])


def _over_committed(
    query: Tensor, key: Tensor, value: Tensor, calls: list[tuple[int, int, Seen | None]], heads: _Heads, scale: float
) -> Part:
    """[P, S * Hk, G * T, .] of whole pieces of committed keys; calls: (first row, behind the last, what they see)."""
    outs, sums = [], []
    for first, stop, seen in calls:
        rows = rows_of(query[:, :, first:stop], heads.kv, heads.form)
        made = part(rows, key, value, seen, scale)
        shape = (heads.group, stop - first)
        outs.append(made.out[:, :, : shape[0] * shape[1]].unflatten(2, shape))
        sums.append(made.sums[:, :, : shape[0] * shape[1]].unflatten(2, shape))
    return Part(torch.cat(outs, 3).flatten(2, 3), torch.cat(sums, 3).flatten(2, 3))


def _shared(group: Group, paths: Paths, heads: _Heads) -> tuple[int, int, list[tuple[int, int, Seen | None]]] | None:
    """The calls over whole pieces of committed keys: (low, high, [(first row, behind the last, what is seen)])."""
    piece, T = heads.form.piece, group.width
    begins = [start // piece * piece for start in paths.starts]
    low, high = base_span(group, 0, T, heads.window, piece)[0], max(begins)
    if high <= low:
        return None
    k = np.arange(low, high)
    hidden = np.broadcast_to(k >= np.asarray(begins)[:, None, None], (len(begins), T, len(k)))
    if heads.window is not None:
        hidden = hidden | (k < first_seen(group.query[:, :, None], heads.window))
    calls: list[tuple[int, int, Seen | None]] = []
    for first in range(0, T, heads.most):
        stop, seen = min(first + heads.most, T), None
        if heads.window is not None or min(begins) < high:
            here = torch.from_numpy(np.ascontiguousarray(hidden[:, first:stop])).unflatten(2, (-1, piece))
            rows = filled((stop - first) * heads.group, heads.form)
            seen = seen_of(here, heads.kv, heads.group, rows, heads.dtype)
        calls.append((first, stop, seen))
    return low, high, calls


def _tails(group: Group, paths: Paths, heads: _Heads) -> list[_Tail]:
    """Of each piece from the one on in which the drafts begin."""
    assert group.ancestors is not None
    piece = heads.form.piece
    chains = [[np.flatnonzero(seen).tolist() for seen in of] for of in group.ancestors]
    firsts = [start % piece for start in paths.starts]
    deepest = max(first + len(path) for of, first in zip(chains, firsts, strict=True) for path in of)
    return [_tail(number, chains, group, paths, heads) for number in range(-(-deepest // piece))]


def _tail(number: int, chains: list[list[list[int]]], group: Group, paths: Paths, heads: _Heads) -> _Tail:
    """number: how many pieces behind the one in which the drafts begin."""
    piece, found = heads.form.piece, []
    for s, (of, start) in enumerate(zip(chains, paths.starts, strict=True)):
        first = start % piece
        begin, end = max(0, number * piece - first), (number + 1) * piece - first
        here = copies([path[begin:end] for path in of], first if number == 0 else 0, piece, heads.most)
        found += [(s, copy, start - first + number * piece) for copy in here]
    N, R = len(found), max(len(copy.rows) for _, copy, _ in found)
    keys, rows = np.zeros((N, piece), dtype=np.int64), np.zeros((N, R), dtype=np.int64)
    seen = np.zeros((N, R, piece), dtype=bool)
    where, absent = np.zeros((2, *group.query.shape), dtype=np.int64), group.query >= 0
    for n, (s, copy, begin) in enumerate(found):
        keys[n, : len(copy.keys)] = copy.keys
        rows[n, : len(copy.rows)] = copy.rows
        seen[n, len(copy.rows) :, 0] = True  # filler has to be finite
        for r, (row, places) in enumerate(zip(copy.rows, copy.seen, strict=True)):
            # The places that it sees are those of a chain, from the piece's first on.
            lowest = 0 if heads.window is None else first_seen(int(group.query[s, row]), heads.window) - begin
            seen[n, r, places[max(0, lowest) :]] = True
            where[:, s, row] = n, r
            absent[s, row] = False
    hidden = torch.from_numpy(~seen).transpose(0, 1)[None]
    return _Tail(
        torch.tensor([[s] for s, _, _ in found]),
        torch.from_numpy(keys),
        torch.from_numpy(rows),
        seen_of(hidden, heads.kv, heads.group, filled(R * heads.group, heads.form), heads.dtype),
        (torch.from_numpy(where[0]), torch.from_numpy(where[1])),
        torch.zeros(absent.shape).masked_fill_(torch.from_numpy(absent), NEGATIVE) if absent.any() else None,
    )
