"""One batch of prompts decoded one way, with the time at which each chunk of tokens came.

Not here: what is made of the times (`latency.py`), which ways are held against each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch

from retrofit.eval.acceptance import Tokens, reference_tokens
from retrofit.eval.latency import Timeline
from retrofit.eval.speed import synchronize
from retrofit.machine import forget_peak, peak_resident

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from retrofit.runtime.engine import Engine

Clock = Callable[[], float]
"""Seconds from any beginning."""


def by_engine(
    engine: Engine,
    prompts: Tokens,
    way: Mapping[str, Any],
    *,
    clock: Clock,
    max_new_tokens: int,
    temperature: float,
    seed: int = 0,
) -> list[Timeline]:
    """All prompts sent at once and run together.  way: mode and strategy, as `Engine.stream` takes them.

    Kept prefixes are cleared first, for the prompts come again and again.  Raises UsageError as `Engine.stream` does.
    """
    if engine.prefixes is not None:
        engine.prefixes.clear()
    sent = clock()
    timelines = [Timeline(sent, len(prompt)) for prompt in prompts]
    for event in engine.stream(
        prompts, **way, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, batch_size=len(prompts),
        ignore_eos=True, original_settings=False, with_text=False,
    ):  # fmt: skip
        if event.tokens:
            timelines[event.index].chunks.append((clock(), len(event.tokens)))
    synchronize(engine)
    return timelines


def by_transformers(
    model: PreTrainedModel,
    prompts: Tokens,
    *,
    clock: Clock,
    max_new_tokens: int,
    temperature: float,
    lookup: int | None = None,
) -> list[Timeline]:
    """The same by the original's own `generate`.  lookup: as `reference_tokens` takes it, of one prompt."""
    sent, told = clock(), 0
    timelines = [Timeline(sent, len(prompt)) for prompt in prompts]

    def note(count: int) -> None:
        nonlocal told
        new, told = count - told, count
        now = clock()
        for timeline in timelines if new > 0 else ():
            timeline.chunks.append((now, new))

    reference_tokens(
        model, prompts, max_new_tokens=max_new_tokens, temperature=temperature, batch_size=len(prompts),
        lookup=lookup, notify=note,
    )  # fmt: skip
    return timelines


def seconds_per_token(timelines: Sequence[Timeline]) -> float:
    """From sending to the last token of all, over all tokens."""
    end, sent = max(timeline.end for timeline in timelines), min(timeline.sent for timeline in timelines)
    return (end - sent) / sum(timeline.tokens for timeline in timelines)


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        forget_peak()


def peak_memory(device: torch.device) -> int | None:
    """The most bytes held: of the GPU by torch, else by this process; None where nobody can tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return peak_resident()
    except OSError:
        return None
