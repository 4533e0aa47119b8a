"""May prompts share forwards at `invariant`: are a prompt's K/V and logits there, bit for bit, those it has alone?

A step is tried out by the few rows that it has (`exact_rows.py`).  Prompts bring many, and of any number, and then a
model may take other paths: plain experts run by another kernel, and a function of a width that fills no vector rounds a
tensor's last numbers otherwise.  So prompts are run alone, then all in one forward, then in parts beside others'.

Not here: whether a prompt may be cut (`prefixes/reuse.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from retrofit.adapters.rows import SequenceRows
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.threads import thread_limit

LENGTHS = (3, 40, 12, 90, 5, 61, 45)
"""Of the prompts; together as many rows as a forward of prompts has at most."""
TURNS = ((0,), (17, 33), (2, 50, 81))
"""Of each arrangement, where every prompt that is longer is cut: what lies between two cuts shares a forward."""
SEED = 0


@torch.inference_mode()
def prompts_share(backend: HFBackend) -> bool:
    """Whether prompts of random tokens have the same K/V and last logits alone and beside each other."""
    end = min(backend.context_length, backend.rope_boundary or backend.context_length)
    lengths = [min(n, end - 1) for n in LENGTHS]
    generator = torch.Generator().manual_seed(SEED)
    prompts = [torch.randint(backend.input_vocab, (n,), generator=generator).tolist() for n in lengths]
    cache = backend.new_cache(len(prompts), max(lengths))

    def run(rows: Sequence[SequenceRows]) -> Tensor:
        with thread_limit(backend.device):
            return backend.forward(backend.row_plan(list(rows)), cache).base_logits

    def left(logits: Sequence[Tensor]) -> list[Tensor]:
        """All that is compared: what stands in the cache, and the logits after each prompt."""
        kept = [cache.take_out(slot, 0, n) for slot, n in enumerate(lengths)]
        return [*logits, *(t for one in kept for layer in one.values() for t in layer)]

    for slot, n in enumerate(lengths):
        cache.open(slot, n)
    whole = [_part(slot, prompt, 0, len(prompt)) for slot, prompt in enumerate(prompts)]
    alone = left([run([rows])[-1] for rows in whole])
    for cuts in TURNS:
        logits: dict[int, Tensor] = {}
        for first, stop in pairwise(sorted({0, max(lengths), *(n for n in cuts if n < max(lengths))})):
            parts = [_part(slot, p, first, min(stop, len(p))) for slot, p in enumerate(prompts) if len(p) > first]
            logits |= dict(zip([part.slot for part in parts], run(parts), strict=True))
        together = left([logits[slot] for slot in range(len(prompts))])
        if not all(torch.equal(a, b) for a, b in zip(alone, together, strict=True)):
            return False
    return True


def _part(slot: int, prompt: Sequence[int], first: int, stop: int) -> SequenceRows:
    return SequenceRows(slot, first, prompt[first:stop], last_logits_only=True)
