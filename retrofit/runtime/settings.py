"""A base's own generation settings: what of its generation_config is honoured, and what is not, by name.

Honoured as `generate` does: what forbids, forces or penalises tokens, and how long a text may get.  The caller's, as
arguments of `generate` are: greedy or sampled, temperature, top-k, top-p.  Everything else that would change the
output is named in `not_honoured`.  Not here: what the rules do to scores (`processors.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PretrainedConfig

from retrofit.errors import UnsupportedModelError
from retrofit.runtime.rules.processors import Rules

DEFAULT_NEW_TOKENS = 128
"""New tokens where neither the caller nor the base says how many."""

CALLERS = frozenset(("do_sample", "temperature", "top_k", "top_p"))
HONOURED = frozenset(
    (
        *("eos_token_id", "repetition_penalty", "max_length", "max_new_tokens"),
        *("no_repeat_ngram_size", "bad_words_ids", "min_length", "min_new_tokens"),
        *("forced_bos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens"),
    )
)
INERT = frozenset(
    (
        *("bos_token_id", "pad_token_id", "decoder_start_token_id", "transformers_version", "length_penalty"),
        *("early_stopping", "use_cache", "cache_implementation", "cache_config", "max_cache_len", "low_memory"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate"),
        *("compile_config", "disable_compile", "continuous_batching_config", "prefill_chunk_size", "is_assistant"),
        *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
        *("prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "speculation_type", "use_mtp"),
    )
)
"""Without effect on the tokens of one text that is decoded token by token."""
SAMPLERS: Mapping[str, float | None] = {
    "min_p": None, "top_h": None, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip
"""They shape sampled text only; the value that does nothing."""
NEUTRAL: Mapping[str, float] = {
    **{"num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1, "guidance_scale": 1, "penalty_alpha": 0},
    **{"encoder_repetition_penalty": 1, "encoder_no_repeat_ngram_size": 0, "diversity_penalty": 0},
}
"""The value with which a setting that is not honoured does nothing; of the others None and False."""


@dataclass(frozen=True)
class Settings:
    """What `generate` would take from the base where the caller says nothing.  The default is neutral."""

    rules: Rules = field(default_factory=Rules)
    repetition_penalty: float | None = None
    max_new_tokens: int | None = None
    max_length: int | None = None
    """Of prompt and output together; counts where `max_new_tokens` is not given."""
    not_honoured: tuple[str, ...] = ()
    """Settings that would change the output of `generate` and do not change ours, with their values."""

    def new_tokens(self, prompt: int) -> int:
        """How many tokens may follow a prompt of so many; below 1 where it is as long as `max_length` already."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        return DEFAULT_NEW_TOKENS if self.max_length is None else self.max_length - prompt

    @property
    def limit(self) -> str:
        """The length that the base's settings allow, for people."""
        if self.max_new_tokens is not None:
            return f"{self.max_new_tokens} new ones (max_new_tokens)"
        return f"{self.max_length} with the output (max_length)"

    def penalty(self, asked: float | None) -> float | None:
        """The repetition penalty: the caller's where there is one."""
        return self.repetition_penalty if asked is None else asked


def folder_settings(folder: Path, config: PretrainedConfig, eos: frozenset[int]) -> Settings:
    """Settings of a model folder.  config: its text configuration; eos: what ends a text."""
    return read_settings(stored(folder, config), eos, config.vocab_size)


def stored(folder: Path, config: PretrainedConfig) -> GenerationConfig:
    """The generation_config of a model folder, as transformers loads it: made of its configuration where it has none.

    Raises UnsupportedModelError for values that transformers refuses.
    """
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # not there, or no JSON
        return GenerationConfig.from_model_config(config)
    except (TypeError, ValueError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)
        raise UnsupportedModelError(f"{folder / 'generation_config.json'}: {first}") from error


def read_settings(config: Any, eos: frozenset[int], vocab: int) -> Settings:
    """Settings from a generation_config (None: neutral).

    eos: what ends a text of this base; vocab: tokens of the model.  Values that make no sense are not honoured.
    """
    if config is None:
        return Settings(rules=Rules(eos=tuple(sorted(eos))))
    given = {k: v for k, v in vars(config).items() if not k.startswith("_") and v is not None and v is not False}
    wrong: list[str] = []

    def read(name: str, parse: Any, missing: Any) -> Any:
        if name not in given:
            return missing
        try:
            return parse(given[name])
        except (TypeError, ValueError):
            wrong.append(_named(name, given[name]))
            return missing

    def tokens(value: Any) -> tuple[int, ...]:
        found = tuple(_whole(t) for t in ([value] if isinstance(value, int) else value))
        if not all(0 <= t < vocab for t in found):
            raise ValueError("a token beyond the vocabulary")
        return found

    def suppressed(value: Any) -> tuple[int, ...]:
        return tuple(t for t in map(_whole, value) if t < vocab)

    rules = Rules(
        eos=tuple(sorted(t for t in eos if 0 <= t < vocab)),
        no_repeat_ngram_size=read("no_repeat_ngram_size", _whole, 0),
        bad_words_ids=read("bad_words_ids", lambda words: tuple(_word(tokens(w)) for w in words), ()),
        min_length=read("min_length", _whole, 0),
        min_new_tokens=read("min_new_tokens", _whole, None),
        forced_bos_token_id=read("forced_bos_token_id", lambda t: tokens(_whole(t))[0], None),
        forced_eos_token_id=read("forced_eos_token_id", tokens, ()),
        suppress_tokens=read("suppress_tokens", suppressed, ()),
        begin_suppress_tokens=read("begin_suppress_tokens", suppressed, ()),
    )
    return Settings(
        rules=rules,
        repetition_penalty=read("repetition_penalty", _positive, None),
        max_new_tokens=read("max_new_tokens", _whole, None),
        max_length=read("max_length", _whole, None),
        not_honoured=(*wrong, *_not_honoured(given), *_other_eos(config, eos)),
    )


def _not_honoured(given: Mapping[str, Any]) -> list[str]:
    named = []
    for name, value in given.items():
        if name in HONOURED | CALLERS | INERT or (name in NEUTRAL and value == NEUTRAL[name]):
            continue
        if name in SAMPLERS and (not given.get("do_sample") or value == SAMPLERS[name]):
            continue
        named.append(_named(name, value))
    return named


def _other_eos(config: Any, eos: frozenset[int]) -> list[str]:
    """`generate` never ends a text where a generation_config of its own names no EOS; the model's ends ours."""
    if getattr(config, "eos_token_id", None) is None and eos and not getattr(config, "_from_model_config", False):
        return [f"eos_token_id=None (the model's own ends a text: {', '.join(map(str, sorted(eos)))})"]
    return []


def _named(name: str, value: Any) -> str:
    text = repr(value)
    return f"{name}={text if len(text) <= 60 else text[:57] + '...'}"


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError("not a whole number")
    return value


def _positive(value: Any) -> float:
    if isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError("not a finite number above 0")
    return float(value)


def _word(tokens: tuple[int, ...]) -> tuple[int, ...]:
    if not tokens:
        raise ValueError("a word of no tokens")
    return tokens
