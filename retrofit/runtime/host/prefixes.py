"""Requests that continue one prompt: the first prefills it, the others copy its K/V and choose from the same logits.

A copy is the prefill, bit for bit, whatever else ran beside it.  What was kept goes when the last of them has started.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from retrofit.runtime.backends.interface import Cache
from retrofit.runtime.request import Request


def shared_prompts(requests: Sequence[Request]) -> list[Request]:
    """Those whose prompt has been prefilled, or will be by a request before them."""
    copies, begun = [], set()
    for r in requests:
        if r.prefix is None or r.output_index > 0:
            continue
        if r.prefix.kept is not None or id(r.prefix) in begun:
            copies.append(r)
        begun.add(id(r.prefix))
    return copies


def keep_prompt(request: Request, cache: Cache, logits_V: Tensor) -> None:
    """After a prompt's prefill: what the others need of it."""
    prefix = request.prefix
    if prefix is None or request.output_index > 0:
        return
    prefix.waiting -= 1
    if prefix.waiting:
        prefix.kept, prefix.logits = cache.take_out(request.slot, 0, len(request.prompt)), logits_V.clone()
        prefix.logprobs = request.prompt_logprobs


def copy_prompt(request: Request, cache: Cache) -> Tensor:
    """Stand where the prefill of the prompt would have ended; returns the logits [V] after it."""
    prefix = request.prefix
    assert prefix is not None and prefix.logits is not None
    cache.put_in(request.slot, 0, [prefix.kept])
    request.committed = len(request.prompt)
    request.prompt_logprobs = prefix.logprobs
    logits = prefix.logits
    prefix.waiting -= 1
    if not prefix.waiting:
        prefix.kept = prefix.logits = None
    return logits
