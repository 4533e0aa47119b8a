"""Log-probabilities of the tokens of a text, by the model's own logits, as vLLM has them: before any processing.

Not here: which tokens are chosen (`modes.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from retrofit.adapters.rows import SequenceRows
from retrofit.runtime.request import Request
from retrofit.runtime.results import Logprobs

ROWS = 128
"""Rows of a prompt whose logits are there at once."""


def logprobs_of(logits_RV: Tensor, tokens: Sequence[int], top: int) -> list[Logprobs]:
    """Of row r: token tokens[r] -> its log-probability, then those of the `top` likeliest, best first."""
    scores = torch.log_softmax(logits_RV.float(), dim=-1)
    own = scores.gather(1, torch.tensor(tokens, device=scores.device)[:, None]).squeeze(1).tolist()
    best = scores.topk(min(top, scores.shape[1]), dim=-1)
    likeliest = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [
        {token: value} | dict(zip(ids, values, strict=True))
        for token, value, (ids, values) in zip(tokens, own, likeliest, strict=True)
    ]


def tell(requests: Sequence[Request], rows: Sequence[Sequence[int]], logits_RV: Tensor) -> None:
    """Note the log-probabilities of the newest tokens of each request, which are the targets of these rows."""
    for request, some in zip(requests, rows, strict=True):
        if request.top is not None and some:
            request.logprobs += logprobs_of(logits_RV[list(some)], request.tokens[-len(some) :], request.top)


def tell_prompts(
    project: Callable[[Tensor], Tensor], requests: Sequence[Request], rows: Sequence[SequenceRows], hidden_BH: Tensor
) -> None:
    """Note the log-probabilities of the prompt tokens that follow these pieces of prompts; the first one has none."""
    start = 0
    for request, piece in zip(requests, rows, strict=True):
        first, start = start, start + len(piece.tokens)
        if request.prompt_top is None or request.output_index > 0:
            continue
        if piece.start == 0:
            request.prompt_logprobs = [None]
        following = request.prompt[piece.start + 1 : piece.start + len(piece.tokens) + 1]
        for n in range(0, len(following), ROWS):
            some = following[n : n + ROWS]
            logits = project(hidden_BH[first + n : first + n + len(some)])
            request.prompt_logprobs += logprobs_of(logits, some, request.prompt_top)
