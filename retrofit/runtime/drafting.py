"""Turn the hidden states of a draft block into proposed tokens, left to right through the Markov head.

Drafts go through the same processors and the same keyed noise as the targets they are held against (coupled drafts):
    d_i = argmax(log q_i(. | d_{i-1}) + g),  g keyed by (request seed, output index of d_i, token)
Not here: which block came true, acceptance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from retrofit.adapters.heads import Heads
from retrofit.runtime.sampling import SamplingParams, choose, process_logits


@dataclass(frozen=True)
class Drafted:
    """tokens [B, D]; confidence [B, D] that each is accepted given all before it are, None without the head."""

    tokens: Tensor
    confidence: Tensor | None


def draft_tokens(
    hidden_BDH: Tensor,
    previous: Sequence[int],
    seeds: Sequence[int],
    indices: Sequence[int],
    seen_BV: Tensor | None,
    project: Callable[[Tensor], Tensor],
    heads: Heads,
    params: SamplingParams,
    with_confidence: bool,
) -> Drafted:
    """Draft D tokens for each of B blocks.

    previous: the token before the first draft (the newest emitted one); indices: output index of the first draft;
    seen_BV: tokens of each request's path so far, needed under a repetition penalty.
    """
    B, D, H = hidden_BDH.shape
    device = hidden_BDH.device
    trunk_BDV = project(hidden_BDH.reshape(B * D, H)).view(B, D, -1)
    token = torch.tensor(previous, device=device)
    seed = torch.tensor(seeds, dtype=torch.int64, device=device)
    index = torch.tensor(indices, dtype=torch.int64, device=device)
    seen = seen_BV.clone() if seen_BV is not None else None
    tokens, confidence = [], []
    for slot in range(D):
        if (
            with_confidence
            and (c := heads.confidence(hidden_BDH[:, slot], token, slot, params.temperature > 0)) is not None
        ):
            confidence.append(c)
        logits = heads.draft_logits(trunk_BDV[:, slot], token)
        token = choose(process_logits(logits, params, seen), params, seed, index + slot)
        tokens.append(token)
        if seen is not None:
            seen[torch.arange(B, device=device), token] = True
    return Drafted(torch.stack(tokens, 1), torch.stack(confidence, 1) if confidence else None)
