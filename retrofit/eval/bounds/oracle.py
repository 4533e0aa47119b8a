"""What a drafter's blocks hold of the text that comes, whatever rule accepts them.

The text is written first.  Then a block is drafted at every position of it: each step verifies drafts and keeps none,
so the next one begins a token later.  A slot's rank is the place of the true token among the drafter's candidates
behind the true ones before it: what no rule that keeps the text can do without.

    block at 5, ranks of the true tokens      0 0 3 0 ...
    1 candidate a slot     2 accepted, and the next token: a cycle of 3, on to the block at 8
    4 candidates a slot    all of these accepted

Not here: what real decoding accepts (`trace.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from retrofit.runtime.host import modes
from retrofit.runtime.rules.sampling import gumbel_noise, process_logits

if TYPE_CHECKING:
    from retrofit.runtime.engine import Engine

CANDIDATES = (1, 2, 4, 8, 16)
"""Of a slot, that an oracle may choose among."""
Ranks = Mapping[int, list[int]]
"""Output index of a block's first draft -> rank of the true token in each slot, in one text."""


def block_ranks(
    engine: Engine, prompts: Sequence[Sequence[int]], *, temperature: float, max_new_tokens: int, seed: int = 0
) -> list[Ranks]:
    """Of every position of each prompt's text.  Drafts are those of a chain, with the noise that decoding gives them.

    Only for steps that are planned on the host.  Raises UsageError as `Engine.generate` does.
    """
    options: dict[str, Any] = {
        "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, "ignore_eos": True,
        "original_settings": False,
    }  # fmt: skip
    texts = [result.tokens for result in engine.generate(prompts, "ar", **options)]
    found: list[dict[int, list[int]]] = [{} for _ in texts]
    way = {"strategy": "fused", "tree": 0, "prepare": 1} if engine.layout.anchored else {"strategy": "two_forward"}
    with _keeping_none(texts, found, engine.backend.heads, seed):
        engine.generate(prompts, "self_spec", **way, **options)
    return list(found)


@contextmanager
def _keeping_none(
    texts: Sequence[Sequence[int]], found: Sequence[dict[int, list[int]]], heads: Any, seed: int
) -> Iterator[None]:
    """Inside, no draft is accepted, and of every block that is drafted the ranks go into `found`."""
    draft, accepted, patched = modes.draft_tokens, modes.accepted_length, cast(Any, modes)

    def drafted(hidden: Tensor, previous: Any, seeds: Any, indices: Any, seen: Any, trunk: Tensor, *rest: Any) -> Any:
        made = draft(hidden, previous, seeds, indices, seen, trunk, *rest)
        if not any(part is heads for part in rest):  # another engine's drafts are none of ours
            return made
        for logits_DV, own, index in zip(trunk, seeds, indices, strict=True):
            found[own - seed][index] = _ranks(logits_DV, texts[own - seed], own, index, heads, rest[1])
        # A block hangs on the likeliest end of the drafts: let that be the one that comes true.
        return replace(made, confidence=torch.zeros(trunk.shape[:2]))

    patched.draft_tokens = drafted
    patched.accepted_length = lambda draft, target, lengths: torch.zeros_like(lengths)
    try:
        yield
    finally:
        patched.draft_tokens, patched.accepted_length = draft, accepted


def _ranks(trunk_DV: Tensor, text: Sequence[int], seed: int, index: int, heads: Any, params: Any) -> list[int]:
    """Of the true token in each slot that the text reaches."""
    count = min(len(trunk_DV), len(text) - index)
    device = trunk_DV.device
    true, before = (torch.tensor(text[at : at + count], device=device) for at in (index, index - 1))
    scores = process_logits(heads.draft_logits(trunk_DV[:count], before), params, None)
    if params.temperature > 0:
        numbers = index + torch.arange(count, device=device)
        scores = scores + gumbel_noise(torch.full_like(numbers, seed), numbers, scores.shape[1])
    own = scores.gather(1, true[:, None])
    return [int(rank) for rank in (scores > own).sum(1)]


def walked(texts: Sequence[Ranks], slots: int, candidates: int) -> dict[str, Any]:
    """What an oracle takes that may choose among so many candidates of each slot, walking over every text.

    slots: drafts of a block; a block of fewer, at the end of its text, ends the walk.  `tokens_per_cycle`: 1 for the
    token after the drafts, and those; None without a whole block.  `accept_cond`: of each slot, given those before it.
    """
    lengths = [length for ranks in texts for length in _walk(ranks, slots, candidates)]
    cycles = len(lengths)
    reached = [sum(length >= slot for length in lengths) for slot in range(slots + 1)]
    conditional = [round(after / before, 4) for before, after in pairwise(reached) if before]
    return {
        "candidates": candidates,
        "cycles": cycles,
        "tokens_per_cycle": round(1 + sum(lengths) / cycles, 4) if cycles else None,
        "accept_cond": conditional,
    }


def _walk(ranks: Ranks, slots: int, candidates: int) -> Iterator[int]:
    """Accepted drafts of each cycle."""
    at = min(ranks, default=0)
    while len(ranks.get(at, ())) == slots:
        length = next((slot for slot, rank in enumerate(ranks[at]) if rank >= candidates), slots)
        yield length
        at += length + 1
