"""Attention of base rows in a form whose bits do not depend on the rows beside them.

`scaled_dot_product_attention` chooses its kernel, and with it the order of addition, by how many rows and keys there
are.  Here a row's numbers depend on the row alone:

    products     rows that share a K/V head are rows of one matrix product, of a shape that the form names
    keys         lie in the order of positions, from a multiple of `piece` on; the product with V is cut at every
                 multiple of `piece`, and its parts are added in fp32 in that order
    unseen keys  weigh exactly 0; behind a row's last key, or before its first, they change no bit
    branches     zeros BETWEEN a row's keys would, so a tree row finds the K/V of its own path side by side

Which form holds on a machine is for the self-test (`exact_rows.py`) to say.  Not here: what a row sees
(`adapters/visibility.py`), and draft rows, whose bits may be anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.adapters.visibility import Group, Paths, Window, base_span, first_seen, hidden_keys, hiding, seen_by_all
from retrofit.runtime.backends.hf.elementwise import by_one_thread
from retrofit.runtime.backends.levels import HALF

COLUMNS = 16
"""The columns of V are filled up to a multiple of this: sums of what would be left over are made in another order."""
TILE = 64
"""Most rows of a sequence that attend at once; a prompt has more, and every tile reads the keys up to its own end."""
TILE_SCORES = 1 << 24
"""Most scores that are made at once."""
SPARED = 2
"""Up to so many times the keys, products over what nobody sees take less time than copying what somebody does."""


@dataclass(frozen=True)
class Form:
    """How products are shaped."""

    name: str
    rows: int
    """A product has a multiple of so many rows."""
    keys: int
    """It reads a multiple of so many keys, from a multiple of `piece` on."""
    piece: int
    """Keys per product with V, by absolute position."""
    dtype: torch.dtype | None = None
    """What products run in; None: what they are given in."""
    least: int = 2
    """Rows of a product, at least: a single one takes another path through the libraries, in another order."""
    cut: bool = False
    """Whether a product with K has `keys` keys and no more, whose number belongs to the shape too."""
    kernel: bool = False
    """Whether torch's attention kernel for CPUs is called over the pieces, wherever it can be (`parts/`)."""

    def padded(self, keys: int) -> int:
        """So many keys, filled up."""
        return -(-keys // self.keys) * self.keys

    def columns(self, keys: int, there: int, dtype: torch.dtype) -> int:
        """How many of the cache's columns are read for so many keys: those, filled up, or all `there` are.

        oneDNN, which multiplies 16 bits, copies K and V first where they are a part of each head's columns.
        """
        filled = self.padded(keys)
        if self.kernel or self.cut or dtype not in HALF:
            return filled
        return there if filled < there <= SPARED * filled and there % self.keys == 0 else filled


GROUPED = Form("rows as they are", rows=1, keys=16, piece=1024)
FOURS = Form("4 rows over 256", rows=4, keys=16, piece=256)
TILED = Form("tiles of 32 x 256", rows=32, keys=256, piece=256, cut=True)
KERNEL = Form("kernel over 256", rows=1, keys=256, piece=256, kernel=True)
FORMS = (
    KERNEL,
    Form("kernel over 256, 3 rows", rows=1, keys=256, piece=256, least=3, kernel=True),
    Form("kernel over 256, tiles of 32", rows=32, keys=256, piece=256, kernel=True),
    GROUPED,
    FOURS,
    TILED,
    Form("fp32 tiles of 32 x 256", rows=32, keys=256, piece=256, dtype=torch.float32, cut=True),
)
"""Cheapest first."""


def base_attention(
    group: Group,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    window: Window | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    form: Form,
    picked: Tensor | None = None,
) -> Tensor:
    """Base rows [S, Hq, T, D] over the cached keys [S, Hk, L, .], L = form.columns(group.keys, ..) -> [S, Hq, T, Dv].

    For forwards whose drafts do not branch.  picked: bool [S, 1 or Hk, T, P], positions that an indexer picked.
    """
    S, H, T = query.shape[:3]
    window = hiding(window, group.last)
    if T == S == 1 and window is softcap is sinks is picked is None and _unfilled(H // key.shape[1], form):
        return _one_row(group, query, key, value, scale, form)
    size = max(1, min(TILE, TILE_SCORES // (S * H * key.shape[2])))
    outs = []
    for first in range(0, T, size):
        stop = min(first + size, T)
        low, high = base_span(group, first, stop, window, form.piece)
        high = form.columns(high, key.shape[2], query.dtype) if low == 0 else form.padded(high)
        scores = _scores(_columns(query, first, stop), _columns(key, low, high), scale, softcap, form)
        _hide(scores, group, first, stop, window, low, high)
        if picked is not None:
            _leave_picked(scores, picked[:, :, first:stop], low, high)
        weights = weights_of(scores, _by_group(sinks, scores)).to(query.dtype).flatten(2, 3)
        out = _with_values(weights, _columns(value, low, high), form).to(query.dtype)
        outs.append(out.reshape(S, H, stop - first, -1))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 2)


def _unfilled(rows: int, form: Form) -> bool:
    """Whether a product of so many rows has the form's shape as it is."""
    return form.rows == 1 and rows >= form.least and form.dtype is None and not form.cut


def _one_row(group: Group, query: Tensor, key: Tensor, value: Tensor, scale: float, form: Form) -> Tensor:
    """`base_attention` of one row that sees every key before it, in as few operations as it takes: the same products.

    That is plain decoding, where what surrounds the products takes as long as they do.
    """
    H, D = query.shape[1], query.shape[3]
    Hk, L, width = value.shape[1:]
    scores = (query.reshape(1, Hk, H // Hk, D) @ key.transpose(2, 3)).float().mul_(scale)
    seen = group.last + 1
    if seen < L:
        scores.narrow(3, seen, L - seen).fill_(float("-inf"))
    weights = torch.softmax(scores, -1).to(query.dtype)
    straight = form.piece > L and width % COLUMNS == 0
    out = weights @ value if straight else _with_values(weights, value, form).to(query.dtype)
    return out.reshape(1, H, 1, width)


def tree_attention(
    group: Group,
    paths: Paths,
    query: Tensor,
    cached: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    window: Window | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
    form: Form,
    picked: Tensor | None = None,
) -> Tensor:
    """Base rows [S, Hq, T, D] of a forward whose drafts branch -> [S, Hq, T, Dv].

    cached: K and V [S, Hk, L, .] of the committed positions, L = form.columns(paths.stop, ..); own: those
    [S, Hk, T, .] of these rows.  A row's path takes the places that its tokens have in a chain: start, start + 1, ...
    """
    (key, value), (own_key, own_value) = cached, own
    (S, H, T), Hk = query.shape[:3], key.shape[1]
    window = hiding(window, group.last)
    scores = _scores(query, key, scale, softcap, form)
    scores.masked_fill_(hidden_keys(group, key.device, 0, T, window, 0, key.shape[2])[:, None, None], float("-inf"))
    filled = F.pad(own_key, (0, 0, 0, form.padded(T) - T))
    rows = paths.rows[:, None, None].expand(S, Hk, H // Hk, *paths.rows.shape[1:])
    along = _scores(query, filled, scale, softcap, form).gather(-1, rows)
    along.masked_fill_(~paths.seen(window)[:, None, None], float("-inf"))
    depth = paths.rows.shape[-1]
    for s, start in enumerate(paths.starts):  # neighbours: `scatter_` would take ten times as long
        scores[s, ..., start : start + depth] = along[s]
    if picked is not None:
        _leave_picked(scores, picked, 0, scores.shape[-1])
    weights = weights_of(scores, _by_group(sinks, scores)).to(query.dtype)

    first = min(paths.starts) // form.piece * form.piece
    shared = _with_values(weights[..., :first].flatten(2, 3), value[:, :, :first], form) if first else None
    # From there on each row has values of its own, and a row of every head of the group is a product.
    stop = form.padded(paths.stop)  # behind it, where columns are read whole, nobody sees anything
    tail = _room(group, (S, T, Hk, stop - first, value.shape[-1]), value)
    tail.copy_(value[:, None, :, first:stop])
    for s, start in enumerate(paths.starts):
        tail[s, :, :, start - first : start - first + depth] = own_value[s, :, paths.rows[s]].permute(1, 0, 2, 3)
    apart = weights[..., first:stop].permute(0, 3, 1, 2, 4).reshape(S * T, Hk, H // Hk, -1)
    if shared is not None:
        shared = shared.view(S, Hk, H // Hk, T, -1).permute(0, 3, 1, 2, 4).reshape(S * T, Hk, H // Hk, -1)
    out = _with_values(apart, tail.flatten(0, 1), form, shared).to(query.dtype)
    return out.reshape(S, T, H, -1).transpose(1, 2)


def _room(group: Group, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Memory that every layer of a forward writes anew: to be given it takes as long as to write it."""
    key = ("room", shape, like.dtype)
    if key not in group.masks:
        group.masks[key] = like.new_empty(shape)
    found: Tensor = group.masks[key]
    return found


def weights_of(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """softmax over the scores [.., L] of a row, and over its sink too, a score that stands for no key.

    sinks: [.., 1] as scores, but for dimensions that are expanded.
    """
    if sinks is None:
        return torch.softmax(scores, -1)
    # Behind the keys: whatever their number, the sink is then added last.
    column = sinks.to(scores.dtype).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1].contiguous()


def _columns(x: Tensor, low: int, high: int) -> Tensor:
    """[.., .., high - low, ..]; itself where that is all."""
    return x if high - low == x.shape[2] else x[:, :, low:high]


def _by_group(sinks: Tensor | None, scores_SHGTL: Tensor) -> Tensor | None:
    """[Hq] -> [Hk, G, 1, 1]."""
    return None if sinks is None else sinks.view(*scores_SHGTL.shape[1:3], 1, 1)


def _hide(
    scores_SHGTL: Tensor, group: Group, first: int, stop: int, window: Window | None, low: int, high: int
) -> None:
    """Minus infinity for the keys that a row does not see."""
    if group.width == 1 and len(group.slots) == 1:
        scores_SHGTL[..., group.last + 1 - low :] = float("-inf")
        if window is not None:
            scores_SHGTL[..., : first_seen(group.last, window) - low] = float("-inf")
    else:
        whole = max(low, seen_by_all(group, first, stop)) if window is None else low
        if whole == high:
            return
        hidden = hidden_keys(group, scores_SHGTL.device, first, stop, window, whole, high)
        scores_SHGTL[..., whole - low :].masked_fill_(hidden[:, None, None], float("-inf"))


def _leave_picked(scores_SHGTL: Tensor, picked_SHTP: Tensor, low: int, high: int) -> None:
    """Minus infinity for the keys `low` to `high` that were not picked."""
    there = F.pad(picked_SHTP, (0, max(0, high - picked_SHTP.shape[3])))[..., low:high]
    scores_SHGTL.masked_fill_(~there[:, :, None], float("-inf"))


def _scores(query: Tensor, key: Tensor, scale: float, softcap: float | None, form: Form) -> Tensor:
    """fp32 [S, Hk, G, T, L] of query [S, Hq, T, D] and key [S, Hk, L, D]."""
    S, H, T, D = query.shape
    Hk, L = key.shape[1:3]
    rows = query.reshape(S, Hk, H // Hk * T, D)
    columns = key.transpose(2, 3)
    if form.cut:
        made = [_product(rows, columns[..., a : a + form.keys], form) for a in range(0, L, form.keys)]
        scores = made[0] if len(made) == 1 else torch.cat(made, -1)
    else:
        scores = _product(rows, columns, form)
    scores = scores.float().mul_(scale)
    if softcap is not None:
        scores = by_one_thread(torch.tanh, scores / softcap) * softcap
    return scores.reshape(S, Hk, H // Hk, T, L)


def _with_values(weights: Tensor, value: Tensor, form: Form, total: Tensor | None = None) -> Tensor:
    """[S, Hk, M, Dv]: weights [S, Hk, M, L] by value [S, Hk, L, Dv], added to `total` piece by piece, in fp32."""
    width = value.shape[-1]
    if width % COLUMNS:
        value = F.pad(value, (0, -width % COLUMNS))
        total = None if total is None else F.pad(total, (0, -width % COLUMNS))
    for part in _parts(weights, value, form):
        total = part if total is None else total.float() + part
    assert total is not None
    return total[..., :width] if width % COLUMNS else total


def _parts(weights: Tensor, value: Tensor, form: Form) -> Iterator[Tensor]:
    """Products of a piece each, [S, Hk, M, Dv], in the order of the keys."""
    (S, Hk, M, L), piece = weights.shape, form.piece
    if piece > L:
        yield _product(weights, value, form)
        return
    whole = L // piece
    by_head = S * Hk < whole * (4 if value.dtype in HALF else 1)
    if by_head:
        # As few calls as there are heads, each of all whole pieces, which nobody copies: they are all of a head's rows.
        rows = weights[..., : whole * piece].unflatten(3, (whole, piece)).transpose(2, 3).flatten(0, 1)
        columns = value[:, :, : whole * piece].unflatten(2, (whole, piece)).flatten(0, 1)
        made = torch.stack([_product(*one, form) for one in zip(rows, columns, strict=True)], 1)
        yield from made.view(whole, S, Hk, M, -1)
    for a in range(whole * piece if by_head else 0, L, piece):
        yield _product(weights[..., a : a + piece], value[:, :, a : a + piece], form)


def _product(left: Tensor, right: Tensor, form: Form) -> Tensor:
    """left [.., M, X] by right [.., X, N], in the shape of the form."""
    rows = left.shape[-2]
    filled = max(form.least, -(-rows // form.rows) * form.rows)
    if filled > rows:
        left = F.pad(left, (0, 0, 0, filled - rows))
    if form.dtype is not None:
        left, right = left.to(form.dtype), right.to(form.dtype)
    out = left @ right
    return out if filled == rows else out[..., :rows, :]
