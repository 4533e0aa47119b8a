"""Draft tokens from what a draft forward says: the root, then K tokens left to right through the Markov head.

Greedy, or drawn: then what each was drawn from is kept, which a rejection sampler has to be told (Leviathan et al.
2023, arXiv 2211.17192).  Shapes: N requests, K draft rows each, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Generator, Tensor

from retrofit.adapters.heads import Heads


@dataclass(frozen=True)
class Sampling:
    """How the requests of a draft forward are sampled."""

    temperature_N: Tensor
    """0 is greedy."""
    narrowed: Callable[[Tensor], Tensor] = lambda logits_NV: logits_NV
    """Takes tempered logits and excludes what top-k and top-p exclude, by -inf."""
    generators: Mapping[int, Generator] = field(default_factory=dict)
    """Of the requests that have a seed of their own."""


def draft(root_NV: Tensor, trunk_NKV: Tensor, heads: Heads, sampling: Sampling | None) -> tuple[Tensor, Tensor | None]:
    """Tokens [N, K + 1], root first, and the distributions they were drawn from, fp32 [N, K + 1, V].

    root_NV, trunk_NKV: logits of the seeds' rows and of the draft rows.  sampling None: all greedy, no distributions.
    """
    tokens: list[Tensor] = []
    drawn_from: list[Tensor] = []
    for slot in range(trunk_NKV.shape[1] + 1):
        logits_NV = root_NV.float() if slot == 0 else heads.draft_logits(trunk_NKV[:, slot - 1], tokens[-1])
        if sampling is None:
            tokens.append(logits_NV.argmax(-1))
            continue
        token_N, q_NV = _drawn(logits_NV, sampling)
        tokens.append(token_N)
        drawn_from.append(q_NV)
    return torch.stack(tokens, 1), torch.stack(drawn_from, 1) if drawn_from else None


def _drawn(logits_NV: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """A token of each request, and what it was drawn from; that of a greedy request is its argmax.

    Drawn as argmax(q / e), e exponential, which is q by the race of exponentials.
    """
    greedy_N = sampling.temperature_N == 0
    temperature_N = sampling.temperature_N.masked_fill(greedy_N, 1)
    q_NV = torch.softmax(sampling.narrowed(logits_NV / temperature_N[:, None]), -1)
    race_NV = torch.empty_like(q_NV).exponential_()
    for request, generator in sampling.generators.items():
        race_NV[request].exponential_(generator=generator)
    token_N = (q_NV / race_NV).argmax(-1)
    return torch.where(greedy_N, logits_NV.argmax(-1), token_N), q_NV
