"""Where K/V that one text left behind are, bit for bit, those that another one would compute.

At the level `invariant` a row has its bits whatever runs beside it, so it is all one whether a prompt ran whole, in
parts behind what was kept, or was decoded.  That is tried out here with as many rows as a prompt's forward may have:
experts of many rows may run by another path than those of few.  At the other levels, and on the fused backend, whose
prompts attend in another order of addition than its steps, nothing is kept beyond one call.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch

from retrofit.adapters.rows import SequenceRows
from retrofit.errors import UsageError
from retrofit.runtime.backends.interface import Backend
from retrofit.runtime.options import bytes_of, whole
from retrofit.runtime.prefixes.pieces import PIECE, Pieces

SEED = 0


def check_budget(given: Any) -> int | None:
    """Bytes of a budget: a number of them, a text such as 512MB, or None for `auto`.  Raises UsageError."""
    if isinstance(given, str):
        return None if given == "auto" else bytes_of("prefix_cache", given)
    return whole("prefix_cache", given, 0)


def pieces_for(backend: Backend, budget: int | None) -> Pieces | None:
    """Where an engine keeps prefixes; None: it does not.

    Raises UsageError where a budget was asked for and reuse would not be exact.
    """
    if budget == 0:
        return None
    reason = why_not(backend)
    if reason is None:
        return Pieces(budget)
    if budget is None:
        return None
    raise UsageError(
        f"prefix_cache is {budget}, and {reason}", "leave it out, or use exact='invariant' where that holds"
    )


def pieces_of(backend: Backend, pieces: Pieces | None) -> Pieces | None:
    """What an engine keeps, without what another model made that this one was before."""
    if pieces is not None:
        pieces.made_by(backend.made_by())
    return pieces


def why_not(backend: Backend) -> str | None:
    """Why prefixes cannot be kept; None: they can."""
    if not backend.one_order:
        return f"the {backend.name} backend computes prompts in another order of addition than what follows them"
    if backend.exact != "invariant":
        return f"at exact={backend.exact} K/V depend on what runs beside them"
    if not same_bits(backend):
        return "on this machine K/V of a prompt depend on how it is cut"
    return None


@torch.inference_mode()
def same_bits(backend: Backend) -> bool:
    """Whether a random prompt's K/V and last logits are the same computed whole, in parts, and decoded."""
    end = min(backend.context_length, backend.rope_boundary or backend.context_length)
    count = min(backend.prefill_rows, end - 1)
    tokens = torch.randint(backend.input_vocab, (count,), generator=torch.Generator().manual_seed(SEED)).tolist()
    cuts = sorted({0, *(n for n in (PIECE, PIECE + 1, PIECE + 4, 2 * PIECE, count - 1) if n < count), count})
    cache = backend.new_cache(2, count)

    def run(slot: int, first: int, stop: int, decoded: bool = False) -> torch.Tensor:
        rows = SequenceRows(slot, first, tokens[first:stop], last_logits_only=not decoded)
        return backend.forward(backend.row_plan([rows]), cache).base_logits[-1]

    try:
        for slot in range(2):
            cache.open(slot, count)
        logits = [run(0, 0, count)]
        for first, stop in pairwise(cuts):
            logits[1:] = [run(1, first, stop, decoded=stop - first < PIECE)]
        kept, other = (cache.take_out(slot, 0, count) for slot in range(2))
    finally:
        cache.release()
    pairs = ((a, b) for layer in kept for a, b in zip(kept[layer], other[layer], strict=True))
    return torch.equal(*logits) and all(torch.equal(a, b) for a, b in pairs)
