"""The options of `Engine.generate`, checked: what is of the wrong type or out of its range is one clear error.

Numbers may be numpy's; True and False are none.  Not here: prompts (`prompts.py`), what the options do.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import Any

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UsageError
from retrofit.runtime.rules.sampling import SamplingParams

MODES = ("ar", "diffusion", "self_spec")
STRATEGIES = ("auto", "fused", "two_forward", "prompt_lookup")
MOST_NODES = 1024
LARGEST_SEED = 2**63 - 1
COLDEST = 1e-6
"""Least temperature but 0: below it scores leave the range of fp32."""


def whole(name: str, value: Any, low: int, high: int | None = None) -> int:
    """A whole number of `low` to `high`.  Raises UsageError, naming the option and what it may be."""
    number = as_int(value)
    if number is None or number < low or (high is not None and number > high):
        span = f"from {low}" if high is None else f"from {low} to {high}"
        raise UsageError(f"{name} is {shown(value)}; it must be a whole number {span}")
    return number


def as_int(value: Any) -> int | None:
    """The whole number that a value is, numpy's and a tensor's of one included; None for everything else."""
    if isinstance(value, bool) or type(value).__name__ in ("bool", "bool_"):
        return None
    try:
        return operator.index(value)
    except (TypeError, RuntimeError):
        return None


def number(name: str, value: Any) -> float:
    """A number, perhaps not a finite one.  Raises UsageError."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise UsageError(f"{name} is {shown(value)}; it must be a number")
    try:
        return float(value)
    except OverflowError:
        return math.inf  # outside every range


def flag(name: str, value: Any) -> bool:
    """Raises UsageError for anything but True and False."""
    if not isinstance(value, bool):
        raise UsageError(f"{name} is {shown(value)}; it must be True or False")
    return value


def shown(value: Any) -> str:
    """A value as an error message shows it: on one line, not endless."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a number of {value.bit_length()} bits" if isinstance(value, int) else type(value).__name__
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def each(name: str, value: Any, count: int) -> list[Any]:
    """One value for all of so many prompts, or one each.  Raises UsageError."""
    if isinstance(value, str | bytes | dict) or not (isinstance(value, Sequence) or hasattr(value, "tolist")):
        return [value] * count
    values = value.tolist() if hasattr(value, "tolist") else list(value)
    if not isinstance(values, list):  # numpy's and torch's single numbers
        return [value] * count
    if len(values) != count:
        raise UsageError(f"{len(values)} {name} for {count} prompts; give one for all or one each")
    return values


def seeds_of(seed: Any, count: int) -> list[int]:
    """One seed per prompt; of a single one prompt i gets seed + i.  Raises UsageError."""
    single = as_int(seed)
    if single is not None:
        whole("seed", single, 0, LARGEST_SEED - max(0, count - 1))
        return [single + i for i in range(count)]
    return [whole("seed", value, 0, LARGEST_SEED) for value in each("seeds", seed, count)]


def stops_of(stop: Any) -> tuple[str, ...]:
    """Stop strings as a tuple.  Raises UsageError."""
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple | set | frozenset) or not all(isinstance(s, str) for s in stops):
        raise UsageError(f"stop is {shown(stop)}; it must be a string or a list of strings")
    if not all(stops):
        raise UsageError("a stop string is empty")
    return tuple(stops)


def stop_tokens_of(tokens: Any, vocab: int) -> frozenset[int]:
    """Stop tokens as a set.  Raises UsageError."""
    if tokens is None:
        return frozenset()
    given = [tokens] if as_int(tokens) is not None else tokens
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, list | tuple | set | frozenset):
        raise UsageError(f"stop_token_ids is {shown(tokens)}; it must be a token id or a list of them")
    return frozenset(whole("a stop token id", token, 0, vocab - 1) for token in given)


def sampling(temperature: Any, top_k: Any, top_p: Any, repetition_penalty: Any) -> SamplingParams:
    """The sampling options.  Raises UsageError for a wrong type or range."""
    heat = number("temperature", temperature)
    if not (heat == 0 or COLDEST <= heat < math.inf):
        raise UsageError(
            f"temperature is {shown(temperature)}; allowed: 0 (greedy), or a finite number from {COLDEST:g}"
        )
    return SamplingParams(
        heat,
        None if top_k is None else whole("top_k", top_k, 1),
        None if top_p is None else number("top_p", top_p),
        None if repetition_penalty is None else number("repetition_penalty", repetition_penalty),
    )


def check_options(
    mode: Any, strategy: Any, prepare: Any, tree: Any, layout: DraftLayout, batch_size: Any, threshold: Any
) -> tuple[str | int, int | None, int, float]:
    """prepare, tree, batch_size and threshold as plain numbers.

    Raises UsageError naming the option and what it may be.
    """
    for name, value, known in (("mode", mode, MODES), ("strategy", strategy, STRATEGIES)):
        if not isinstance(value, str) or value not in known:
            raise UsageError(f"{name} {shown(value)} does not exist", f"it is one of {', '.join(known)}")
    if not (isinstance(prepare, str) and prepare in ("all", "last")):
        lengths = as_int(prepare)
        if lengths is None or lengths < 1:
            raise UsageError(f"prepare is {shown(prepare)}; it may be all, last, or a number of accept lengths >= 1")
        prepare = lengths
    if strategy == "fused" and not layout.anchored:
        raise UsageError("strategy fused needs an artifact with draft.seed_row base", "use two_forward or auto")
    nodes = None if tree is None else whole("tree", tree, 0, MOST_NODES)
    requests = whole("batch_size", batch_size, 1)
    sure = number("threshold", threshold)
    if not 0 <= sure <= 1:
        raise UsageError(f"threshold is {shown(threshold)}; it is a probability, 0 to 1")
    return prepare, nodes, requests, sure
