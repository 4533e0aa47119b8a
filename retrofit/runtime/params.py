"""`SamplingParams`: how the tokens of an output are chosen, where it ends, and what is said about it.

One object for a whole call, or one per prompt; every field is a keyword of `Engine.generate` too.  Names, meanings and
the order in which scores are processed are those of transformers' `generate`; what it has not (presence and frequency
penalty, `logit_bias`, `n`, `stop_token_ids`, `ignore_eos`, `logprobs`) is as in vLLM:

    logit_bias, repetition, frequency, presence | what is banned or forced | temperature, top_k, top_p, min_p

This file imports nothing heavy.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from retrofit.errors import UsageError
from retrofit.runtime.chat_template import check_arguments
from retrofit.runtime.options import LARGEST_SEED, as_int, flag, number, shown, whole

COLDEST = 1e-6
"""Least temperature but 0: below it scores leave the range of fp32."""
MOST_OUTPUTS = 16384
"""Outputs of one prompt, as in vLLM."""
STRONGEST = 2.0
"""Presence and frequency penalties reach from minus this to this, as everywhere."""


@dataclass(frozen=True)
class SamplingParams:
    """The options of one output.  Raises `UsageError`, naming the option, for a wrong type or range."""

    temperature: float = 0.0
    """0 = greedy: the most likely token after the penalties; top_k, top_p and min_p then have no effect."""
    top_k: int | None = None
    """Keep the k most likely tokens (and those tied with the last of them); None = all."""
    top_p: float | None = None
    """Keep the most likely tokens whose total probability reaches top_p; None or 1 = all."""
    min_p: float | None = None
    """Keep tokens at least min_p times as likely as the likeliest; None or 0 = all."""
    repetition_penalty: float | None = None
    """Divides the scores of tokens in prompt or output (multiplies negative ones); None = the base's own, 1 = off."""
    presence_penalty: float = 0.0
    """Taken off the score of every token that the output holds, -2 to 2."""
    frequency_penalty: float = 0.0
    """Taken off the score of a token once for each time that the output holds it, -2 to 2."""
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    """Added to the scores of these tokens, before everything else."""
    seed: int = 0
    """Keys the noise.  One object for a whole call: result k, counted over prompts and copies, has seed + k.  An object
    of its own for each prompt: its copy j has seed + j."""
    n: int = 1
    """Outputs of the prompt, which is prefilled once; up to 16384."""
    max_new_tokens: int | None = None
    """None = the base's own, else 128."""
    min_new_tokens: int | None = None
    """Before so many, neither EOS nor one of stop_token_ids may come; None = the base's own."""
    stop: Sequence[str] | None = ()
    """Texts that end the output before themselves; they may hold special tokens.  One string is one text."""
    stop_token_ids: Sequence[int] | None = ()
    """Tokens that end the output; its text ends before them."""
    ignore_eos: bool = False
    logprobs: int | None = None
    """With each emitted token its log-probability and those of so many likeliest, by the model's own logits."""
    prompt_logprobs: int | None = None
    """The same of the prompt's tokens but for the first."""
    template: Mapping[str, Any] | None = field(default=None, hash=False)
    """Arguments of the chat template for a prompt of messages, such as `{"enable_thinking": False}`."""

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "temperature": _temperature(self.temperature),
            "top_k": _whole_or_none("top_k", self.top_k, 1),
            "top_p": _within("top_p", self.top_p, lambda p: 0 < p <= 1, "a number > 0 and <= 1, or none"),
            "min_p": _within("min_p", self.min_p, lambda p: 0 <= p <= 1, "a number from 0 to 1, or none"),
            "repetition_penalty": _within(
                "repetition_penalty", self.repetition_penalty, lambda p: 0 < p < math.inf,
                "a finite number > 0, or none for no penalty",
            ),
            "presence_penalty": _penalty("presence_penalty", self.presence_penalty),
            "frequency_penalty": _penalty("frequency_penalty", self.frequency_penalty),
            "logit_bias": _bias(self.logit_bias),
            "n": whole("n", self.n, 1, MOST_OUTPUTS),
            "max_new_tokens": _whole_or_none("max_new_tokens", self.max_new_tokens, 1),
            "min_new_tokens": _whole_or_none("min_new_tokens", self.min_new_tokens, 0),
            "stop": _stops(self.stop),
            "stop_token_ids": _stop_tokens(self.stop_token_ids),
            "ignore_eos": flag("ignore_eos", self.ignore_eos),
            "logprobs": _whole_or_none("logprobs", self.logprobs, 0),
            "prompt_logprobs": _whole_or_none("prompt_logprobs", self.prompt_logprobs, 0),
            "template": _template(self.template),
        }  # fmt: skip
        checked["seed"] = whole("seed", self.seed, 0, LARGEST_SEED - (checked["n"] - 1))
        least, most = checked["min_new_tokens"], checked["max_new_tokens"]
        if least is not None and most is not None and least > most:
            raise UsageError(f"min_new_tokens is {least}, more than max_new_tokens, {most}")
        for name, value in checked.items():
            object.__setattr__(self, name, value)


class Keywords(TypedDict, total=False):
    """The fields of `SamplingParams` as keywords of `generate`, where seed and max_new_tokens may be one per prompt."""

    temperature: float
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float] | None
    seed: int | Sequence[int]
    n: int
    max_new_tokens: int | Sequence[int] | None
    min_new_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: int | Sequence[int] | None
    ignore_eos: bool
    logprobs: int | None
    prompt_logprobs: int | None
    template: Mapping[str, Any] | None


def _temperature(value: Any) -> float:
    heat = number("temperature", value)
    if not (heat == 0 or COLDEST <= heat < math.inf):
        raise UsageError(f"temperature is {shown(value)}; allowed: 0 (greedy), or a finite number from {COLDEST:g}")
    return heat


def _within(name: str, value: Any, allowed: Any, span: str) -> float | None:
    if value is None:
        return None
    found = number(name, value)
    if not allowed(found):
        raise UsageError(f"{name} is {shown(value)}; allowed: {span}")
    return found


def _penalty(name: str, value: Any) -> float:
    found = number(name, value)
    if not -STRONGEST <= found <= STRONGEST:
        raise UsageError(f"{name} is {shown(value)}; allowed: a number from {-STRONGEST:g} to {STRONGEST:g}")
    return found


def _whole_or_none(name: str, value: Any, low: int) -> int | None:
    return None if value is None else whole(name, value, low)


def _template(value: Any) -> dict[str, Any] | None:
    if value is None:
        return None
    check_arguments(value, "template")
    return dict(value)


def _bias(value: Any) -> dict[int, float] | None:
    """Token ids and what is added to their scores, by rising id; None where there are none."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise UsageError(f"logit_bias is {shown(value)}; it must be a mapping of token ids to numbers", "{50256: -2.5}")
    found = {}
    for token, added in value.items():
        bias = number("a logit_bias", added)
        if not math.isfinite(bias):
            raise UsageError(
                f"a logit_bias is {shown(added)}; it must be finite", "-100 bans a token as good as wholly"
            )
        found[whole("a token id of logit_bias", token, 0)] = bias
    return dict(sorted(found.items())) or None


def _stops(stop: Any) -> tuple[str, ...]:
    if stop is None:
        return ()
    stops = (stop,) if isinstance(stop, str) else stop
    if not isinstance(stops, list | tuple | set | frozenset) or not all(isinstance(s, str) for s in stops):
        raise UsageError(f"stop is {shown(stop)}; it must be a string or a list of strings")
    if not all(stops):
        raise UsageError("a stop string is empty")
    return tuple(stops)


def _stop_tokens(tokens: Any) -> tuple[int, ...]:
    if tokens is None:
        return ()
    given = [tokens] if as_int(tokens) is not None else tokens
    given = given.tolist() if hasattr(given, "tolist") else given
    if not isinstance(given, list | tuple | set | frozenset):
        raise UsageError(f"stop_token_ids is {shown(tokens)}; it must be a token id or a list of them")
    return tuple(whole("a stop token id", token, 0) for token in given)
