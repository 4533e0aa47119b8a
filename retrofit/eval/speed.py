"""Wall-clock time per token of several ways to decode, measured so that they can be compared.

All ways run in one process over the same prompts, in turn (A B C, B C A, ...), so that a slow moment of the
machine hits them alike; a ratio of two ways is the median of the ratios within a turn.  Seconds cover the
whole call, prefill included, and tokens all that was emitted: `generate` tells no more, and all are treated
alike.  Not here: tokens per forward (`acceptance.py`), which does not depend on the machine.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from retrofit.errors import UsageError
from retrofit.eval.acceptance import reference_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from retrofit.runtime.engine import Engine

REFERENCE = "transformers"
WAYS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "auto": {"mode": "self_spec", "strategy": "auto"},
    "fused": {"mode": "self_spec", "strategy": "fused"},
    "fused_last": {"mode": "self_spec", "strategy": "fused", "prepare": "last"},
    "two_forward": {"mode": "self_spec", "strategy": "two_forward"},
    "prompt_lookup": {"mode": "self_spec", "strategy": "prompt_lookup"},
    "hybrid": {"mode": "self_spec", "strategy": "hybrid"},
    "diffusion": {"mode": "diffusion"},
}
"""Ways of the engine by name; `transformers` is the original model's own `generate`."""


def seconds_per_token(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    ways: Sequence[str] = ("ar", "auto", REFERENCE),
    reference: PreTrainedModel | None = None,
    temperature: float = 0.0,
    max_new_tokens: int = 128,
    batch_size: int = 1,
    seed: int = 0,
    repeats: int = 5,
    per_turn: int | None = None,
    notify: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Time every way `repeats` times in turn after a warm-up batch each.  EOS is ignored: all emit as many.

    reference: the original model for `transformers`, apart from the engine's, whose projections are wrapped.
    per_turn: prompts of one turn, taken in rotation; None is all of them.
    notify: told the name of the way about to run.  Returns a JSON-able dict: seconds per token of every
    repeat and their median by way, and `ratio`, the median over turns of a way's time to that of the first.
    Raises UsageError for a way that does not exist, and as `Engine.generate` does.
    """
    _check_ways(ways, reference)
    size = per_turn or len(prompts)

    def run(way: str, some: Sequence[Sequence[int]]) -> float:
        if notify is not None:
            notify(way)
        begin = time.perf_counter()
        emitted = _emitted(way, some, engine, reference, temperature, max_new_tokens, batch_size, seed)
        synchronize(engine)
        return (time.perf_counter() - begin) / emitted

    for way in ways:
        run(way, prompts[:batch_size])
    turns = []
    for turn in range(repeats):
        some = [prompts[(turn * size + i) % len(prompts)] for i in range(size)]
        turns.append({way: run(way, some) for way in in_turn(ways, turn)})
    return {
        "prompts": len(prompts),
        "prompts_per_turn": size,
        "max_new_tokens": max_new_tokens,
        "batch_size": batch_size,
        "temperature": temperature,
        "repeats": repeats,
        "seconds_per_token": {way: [turn[way] for turn in turns] for way in ways},
        "median": {way: median(turn[way] for turn in turns) for way in ways},
        "ratio": {way: round(ratio_of(turns, way, ways[0]), 4) for way in ways},
    }


def _check_ways(ways: Sequence[str], reference: PreTrainedModel | None) -> None:
    for way in ways:
        if way not in WAYS and way != REFERENCE:
            raise UsageError(f"way {way!r} does not exist", f"ways are {', '.join([*WAYS, REFERENCE])}")
    if REFERENCE in ways and reference is None:
        raise UsageError(f"the way {REFERENCE!r} needs the original model", "pass reference=")


def _emitted(
    way: str,
    prompts: Sequence[Sequence[int]],
    engine: Engine,
    reference: PreTrainedModel | None,
    temperature: float,
    max_new_tokens: int,
    batch_size: int,
    seed: int,
) -> int:
    """Decode the prompts one way; returns the number of new tokens."""
    if way == REFERENCE:
        assert reference is not None
        outputs = reference_tokens(
            reference, prompts, max_new_tokens=max_new_tokens, temperature=temperature, batch_size=batch_size
        )  # fmt: skip
    else:
        if engine.prefixes is not None:
            engine.prefixes.clear()  # the prompts come again and again, and transformers reads them each time
        results = engine.generate(
            prompts, **WAYS[way], max_new_tokens=max_new_tokens, temperature=temperature,
            batch_size=batch_size, seed=seed, ignore_eos=True, original_settings=False,
        )  # fmt: skip
        outputs = [result.tokens for result in results]
    return sum(map(len, outputs))


def in_turn(ways: Sequence[str], turn: int) -> list[str]:
    """The ways in the order of a turn: every one takes every place.

    Whoever follows a way that used all cores starts on a throttled machine.
    """
    first = turn % len(ways)
    return [*ways[first:], *ways[:first]]


def ratio_of(turns: Sequence[dict[str, float]], way: str, other: str) -> float:
    """Median over turns of one way's time to another's; a drift of the machine cancels within a turn."""
    return median(turn[way] / turn[other] for turn in turns)


def turns_of(speed: dict[str, Any]) -> list[dict[str, float]]:
    """The turns behind a result of `seconds_per_token`."""
    times: dict[str, list[float]] = speed["seconds_per_token"]
    return [{way: values[i] for way, values in times.items()} for i in range(speed["repeats"])]


def synchronize(engine: Engine) -> None:
    """Wait for the device: a GPU's calls return before its work is done."""
    if engine.backend.device.type == "cuda":
        torch.cuda.synchronize(engine.backend.device)
