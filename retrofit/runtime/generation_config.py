"""A caller's GenerationConfig as sampling parameters: every field means what it means to `generate`, or is refused.

Fields left at None are the base's own where we follow those (`settings.py`).  Without do_sample the output is greedy.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from transformers import GenerationConfig

from retrofit.errors import UsageError
from retrofit.runtime.options import shown
from retrofit.runtime.params import SamplingParams
from retrofit.runtime.rules.processors import Rules
from retrofit.runtime.settings import Settings, read_settings

DEFAULT_TOP_K = 50
"""Of `generate`, where it samples and nobody says how many."""


def read_generation_config(
    config: GenerationConfig, own: Settings, eos: frozenset[int], vocab: int
) -> tuple[SamplingParams, Settings, frozenset[int]]:
    """Sampling parameters, and the base's settings and EOS with what the config puts in their place.

    own, eos: the base's.  Raises UsageError, naming the field and its value, for what cannot be followed.
    """
    given = {name: value for name, value in vars(config).items() if value is not None}
    sampled = bool(given.get("do_sample"))
    params = SamplingParams(
        temperature=given.get("temperature", 1.0) if sampled else 0.0,
        top_k=(given.get("top_k", DEFAULT_TOP_K) or None) if sampled else None,
        top_p=given.get("top_p") if sampled else None,
        min_p=given.get("min_p") if sampled else None,
        logit_bias=_single_tokens(given.get("sequence_bias")),
        n=given.get("num_return_sequences", 1),
        stop=given.get("stop_strings"),
    )
    if sampled and params.temperature == 0:
        raise UsageError("temperature is 0 with do_sample=True", "leave do_sample out for greedy decoding")
    if "eos_token_id" in given:
        eos = _ends(given["eos_token_id"])
    rest = copy.copy(config)
    rest.eos_token_id = sorted(eos)
    rest.min_p = rest.num_return_sequences = rest.sequence_bias = rest.stop_strings = None
    read = read_settings(rest, eos, vocab)
    if read.not_honoured:
        raise UsageError(
            f"this GenerationConfig has {', '.join(read.not_honoured)}, which retrofit does not follow",
            "leave it out; one text is decoded token by token, greedily or sampled",
        )
    rules = {f.name: getattr(read.rules, f.name) for f in fields(Rules) if f.name in given}
    limits = read if {"max_new_tokens", "max_length"} & given.keys() else own
    settings = replace(
        own,
        rules=replace(own.rules, **{**rules, "eos": read.rules.eos}),
        repetition_penalty=read.repetition_penalty if "repetition_penalty" in given else own.repetition_penalty,
        max_new_tokens=limits.max_new_tokens,
        max_length=limits.max_length,
    )
    return params, settings, eos


def _ends(given: Any) -> frozenset[int]:
    """`eos_token_id` as token ids.  Raises UsageError."""
    found = given.tolist() if hasattr(given, "tolist") else given
    listed = found if isinstance(found, list | tuple | set | frozenset) else [found]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in listed):
        raise UsageError(f"eos_token_id is {shown(given)}; it must be a token id or a list of them")
    return frozenset(listed)


def _single_tokens(bias: Any) -> dict[int, float] | None:
    """`sequence_bias` of sequences of one token.  Raises UsageError for longer ones."""
    if bias is None:
        return None
    pairs = bias.items() if isinstance(bias, Mapping) else bias
    found = {tuple(sequence): added for sequence, added in pairs}
    longer = next((sequence for sequence in found if len(sequence) != 1), None)
    if longer is not None:
        raise UsageError(
            f"this GenerationConfig has sequence_bias for {longer}, which retrofit does not follow",
            "give single tokens, as in logit_bias",
        )
    return {token: added for (token,), added in found.items()}
