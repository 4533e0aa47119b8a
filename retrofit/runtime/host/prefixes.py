"""Prompts that are not computed twice.

    outputs of one prompt       the first runs it; the others copy its K/V and choose from the same logits.  A copy is
                                the prefill, bit for bit, at any level of exactness; it goes when the last has started
    texts that begin alike      what the engine keeps of a text (`prefixes/pieces.py`), prompt and output, later prompts
                                that begin so copy; they run from there on.  Of prompts that come together the first
                                runs what they share, and then the others run together

Not here: where the latter is exact (`prefixes/reuse.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from retrofit.adapters.rows import SequenceRows
from retrofit.runtime.backends.interface import Cache
from retrofit.runtime.prefixes.pieces import Kept
from retrofit.runtime.request import Request
from retrofit.runtime.run import Run


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
    cache.put_in(request.slot, 0, [prefix.kept], len(request.prompt))
    request.committed = request.stats.reused = len(request.prompt)
    request.prompt_logprobs = prefix.logprobs
    logits = prefix.logits
    prefix.waiting -= 1
    if not prefix.waiting:
        prefix.kept = prefix.logits = None
    return logits


def kept_of(run: Run, request: Request) -> list[Kept]:
    """The pieces that are kept of a prompt which has not begun; at least its last token is left to run, for the logits.

    None where every token of the prompt is to be told: those want logits of their own.
    """
    if run.pieces is None or not _may_copy(request):
        return []
    return run.pieces.find(request.prompt[:-1], request.long_rope)


def waits_for(run: Run, request: Request, kept: int, ran: Sequence[Request], rows: Sequence[SequenceRows]) -> bool:
    """Whether one of `ran` computes what comes next in a prompt that has not begun, which can copy it afterwards.

    kept: positions of the prompt that are kept already.  rows: what runs of each of `ran`.
    """
    if run.pieces is None or not _may_copy(request):
        return False
    first, stop = kept, kept + run.pieces.size
    return stop < len(request.prompt) and any(
        part.start < stop
        and other.given is None
        and other.tokens[first:stop] == request.prompt[first:stop]
        and other.tokens[:first] == request.prompt[:first]
        for other, part in zip(ran, rows, strict=True)
    )


def begin_with(run: Run, request: Request, found: Sequence[Kept]) -> None:
    """Copy what is kept of a prompt into its slot."""
    if found:
        assert run.pieces is not None
        run.cache.put_in(request.slot, 0, found)
        request.committed = request.kept = request.stats.reused = len(found) * run.pieces.size


def _may_copy(request: Request) -> bool:
    return request.committed == request.output_index == 0 and request.prompt_top is None and request.given is None


def keep_text(run: Run, requests: Sequence[Request]) -> None:
    """Keep the pieces that have become whole: of prompts, and of what was emitted and is committed.

    Those beyond a longrope boundary of a text that began below it are never found: a prompt of that length has the long
    factors from its beginning on, and looks among those.
    """
    if run.pieces is None:
        return
    for r in requests:
        if r.given is not None:
            continue  # equal token ids may stand for another image
        end = min(r.committed, len(r.tokens))
        if end - r.kept >= run.pieces.size:
            end -= end % run.pieces.size
            run.pieces.keep(r.tokens[:end], partial(run.cache.take_out, r.slot), r.long_rope, since=r.kept)
            r.kept = end
