"""Prompts and their options in, requests out: what `generate` was asked for, one request for each output.

Not here: what an option may be (`params.py`), how prompts are encoded (`prompts.py`), decoding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeAlias

from transformers import GenerationConfig, PreTrainedTokenizerBase

from retrofit.errors import UsageError
from retrofit.runtime.backends.interface import Backend
from retrofit.runtime.generation_config import read_generation_config
from retrofit.runtime.options import LARGEST_SEED, as_int, as_list, each, shown, whole
from retrofit.runtime.params import SamplingParams
from retrofit.runtime.prompts import MediaPrompt, encode
from retrofit.runtime.request import Prefix, Request
from retrofit.runtime.rules.processors import Rules
from retrofit.runtime.rules.sampling import Processing
from retrofit.runtime.settings import Settings
from retrofit.runtime.text import Detokenizer, Text

Params: TypeAlias = SamplingParams | GenerationConfig
ENCODING = threading.Lock()
"""Tokenizers keep truncation and padding in themselves, and refuse to be set while another thread encodes."""


@dataclass(frozen=True)
class Asked:
    """What is asked of one prompt."""

    params: SamplingParams
    settings: Settings
    eos: frozenset[int]
    seeds: list[int] = field(default_factory=list)
    """Of each output."""


def asked_of(
    params: Params | Sequence[Params] | None,
    keywords: Mapping[str, Any],
    count: int,
    backend: Backend,
    original: bool,
    mode: str,
) -> list[Asked]:
    """What is asked of each of so many prompts.  keywords stand over `params`; original: follow the base's settings.

    Raises UsageError for what an option cannot be or means nothing in this mode, however few prompts there are, and
    TypeError for a keyword that does not exist.
    """
    single = params is None or isinstance(params, SamplingParams | GenerationConfig)
    rest = {name: value for name, value in keywords.items() if name not in ("seed", "max_new_tokens")}
    limits = each("max_new_tokens", keywords.get("max_new_tokens"), count)
    own = backend.settings if original else Settings()

    def read(given: Any, limit: Any) -> Asked:
        asked = _read(given, own, backend)
        limited = {} if limit is None else {"max_new_tokens": limit}
        asked = replace(asked, params=replace(asked.params, **rest, **limited))
        _check_tokens(asked.params, backend.head.vocab)
        if mode == "diffusion" and asked.params.logprobs is not None:
            raise UsageError("logprobs mean nothing in mode diffusion: its tokens are the drafter's choice")
        return asked

    if not count:  # wrong options are wrong, however few prompts there are
        alone = [None if as_list(value) is not None else value for value in (params, keywords.get("max_new_tokens"))]
        read(*alone)
    given = [params] * count if single else each("params", params, count)
    found = [read(one, limit) for one, limit in zip(given, limits, strict=True)]
    own_seed = found[0].params.seed if single and found else [asked.params.seed for asked in found]
    seeds = _seeds(found, keywords.get("seed", own_seed))
    return [replace(asked, seeds=some) for asked, some in zip(found, seeds, strict=True)]


def _read(given: Any, own: Settings, backend: Backend) -> Asked:
    if given is None:
        return Asked(SamplingParams(), own, backend.eos)
    if isinstance(given, SamplingParams):
        return Asked(given, own, backend.eos)
    if isinstance(given, GenerationConfig):
        return Asked(*read_generation_config(given, own, backend.eos, backend.head.vocab))
    raise UsageError(
        f"params is {shown(given)}; it must be a SamplingParams or a GenerationConfig",
        "give one for all prompts, or a list of one each",
    )


def _seeds(found: Sequence[Asked], given: Any) -> list[list[int]]:
    """The seeds of each prompt's outputs.

    Of one seed for all, result k, counted over prompts and their outputs, gets seed + k; of one for each prompt its
    output j gets seed + j.
    """
    counts = [asked.params.n for asked in found]
    one = as_int(given)
    if one is not None:
        whole("seed", one, 0, LARGEST_SEED - max(0, sum(counts) - 1))
        firsts: Iterable[int] = (one + before for before in accumulate(counts, initial=0))
    else:
        if as_list(given) is None:
            whole("seed", given, 0, LARGEST_SEED)  # it is none
        firsts = [
            whole("seed", value, 0, LARGEST_SEED - (n - 1))
            for value, n in zip(each("seeds", given, len(found)), counts, strict=True)
        ]
    return [[first + j for j in range(n)] for first, n in zip(firsts, counts, strict=False)]


def _check_tokens(params: SamplingParams, vocab: int) -> None:
    for token in params.stop_token_ids or ():
        whole("a stop token id", token, 0, vocab - 1)
    for token in params.logit_bias or ():
        whole("a token id of logit_bias", token, 0, vocab - 1)


def requests_for(
    prompts: Sequence[Any],
    asked: Sequence[Asked],
    backend: Backend,
    context: int,
    tokenizer: PreTrainedTokenizerBase | None,
    streamed: bool,
) -> list[Request]:
    """The requests, in the order of prompts and outputs.  streamed: their text is taken while it grows.

    Raises UsageError for a prompt or an option that cannot be.
    """
    detokenizer = None if tokenizer is None else Detokenizer(tokenizer)
    groups: dict[tuple[Processing, Rules], int] = {}
    requests: list[Request] = []
    for number, (prompt, what) in enumerate(zip(prompts, asked, strict=True)):
        params, settings = what.params, what.settings
        if params.stop and tokenizer is None:
            raise UsageError("stop strings need a tokenizer; this engine has none", "give stop_token_ids")
        given = None
        if isinstance(prompt, MediaPrompt):
            tokens, given = prompt.read(backend, f"prompt {number}")
        else:
            with ENCODING:
                tokens = encode(prompt, f"prompt {number}", tokenizer, backend.input_vocab, params.template)
        limit = _limit(f"prompt {number}", len(tokens), params, settings, context)
        processing, rules = processing_of(params, settings), rules_of(what, backend.head.vocab)
        group = groups.setdefault((processing, rules), len(groups))
        prefix = Prefix(params.n) if params.n > 1 else None
        for sample, seed in enumerate(what.seeds):
            text = None
            if detokenizer is not None and (streamed or params.stop):
                text = Text(detokenizer, tuple(params.stop or ()), streamed)
            requests.append(
                Request(
                    len(requests), list(tokens), seed, min(limit, context - len(tokens)),
                    frozenset() if params.ignore_eos else what.eos, text, frozenset(params.stop_token_ids or ()),
                    limit, number, sample, prefix, processing, rules if rules.active else None, group,
                    params.logprobs, params.prompt_logprobs, given,
                )
            )  # fmt: skip
    return requests


def _limit(name: str, length: int, params: SamplingParams, settings: Settings, context: int) -> int:
    """How many tokens may follow a prompt of so many, before any cut to the context."""
    if context - length < 1:
        raise UsageError(
            f"{name} has {length} tokens; the model's context is {context} and must hold at least one more",
            "shorten the prompt",
        )
    limit = settings.new_tokens(length) if params.max_new_tokens is None else params.max_new_tokens
    if limit < 1:
        raise UsageError(
            f"{name} has {length} tokens; the model's own generation settings allow {settings.limit}",
            "give max_new_tokens",
        )
    return limit


def processing_of(params: SamplingParams, settings: Settings) -> Processing:
    """What is done to the scores of a request."""
    return Processing(
        params.temperature,
        params.top_k,
        params.top_p,
        settings.penalty(params.repetition_penalty),
        params.min_p,
        params.presence_penalty,
        params.frequency_penalty,
        tuple((params.logit_bias or {}).items()),
    )


def rules_of(asked: Asked, vocab: int) -> Rules:
    """What is forbidden and forced in a text.

    A minimum of the caller's keeps off EOS and stop tokens, one of the base's own EOS alone.
    """
    params, rules = asked.params, asked.settings.rules
    if params.min_new_tokens is not None:
        eos = tuple(sorted(token for token in asked.eos if 0 <= token < vocab))  # a base may name one that it has not
        stops = tuple(sorted({*(params.stop_token_ids or ())}))
        rules = replace(rules, eos=eos, stop_tokens=stops, min_new_tokens=params.min_new_tokens)
    return replace(rules, eos=()) if params.ignore_eos else rules


def typical(requests: Sequence[Request]) -> Processing:
    """The processing of all requests; where they differ, that of one that samples, if any does."""
    found = [request.processing or Processing() for request in requests] or [Processing()]
    return next((one for one in found if one.temperature > 0), found[0])


def needs(requests: Sequence[Request]) -> dict[str, Any]:
    """What a run has to do for these requests, as fields of `Run`."""
    processings = {request.processing or Processing() for request in requests}
    return {
        "mixed": len({request.group for request in requests}) > 1,
        "ruled": any(request.rules is not None for request in requests),
        "seen": any(one.needs_seen for one in processings),
        "counts": any(one.needs_counts for one in processings),
        "told": any(request.top is not None for request in requests),
    }
