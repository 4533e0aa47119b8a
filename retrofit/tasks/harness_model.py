"""An engine as a model of lm-evaluation-harness: `loglikelihood`, `loglikelihood_rolling` and `generate_until`.

Texts become tokens, and tokens texts, as the harness's own `hf` model has it, so that `ar` answers as that does.
This file imports lm_eval, an extra; it is imported by `harness.py`, and by who has the extra.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from retrofit.errors import UsageError
from retrofit.runtime.chat_template import applied
from retrofit.runtime.engine import Engine
from retrofit.runtime.params import SamplingParams
from retrofit.tasks.answering import EngineAnswers
from retrofit.tasks.tokens import prefix_of, windows

TAKEN = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
"""Options of a task's generation that are fields of `SamplingParams`."""


class EngineLM(TemplateLM):
    """An engine in one mode.  options: of `Engine.generate`, such as strategy, threshold or batch_size.

    max_length: tokens that a text may have before the last; None: as many as the engine scores at once, two fewer
    than the model's context.  seed: of the first request that is sampled; the others follow.
    Raises UsageError without a tokenizer or its BOS and EOS, and for a max_length that is longer than that.
    """

    def __init__(
        self, engine: Engine, mode: str = "ar", max_length: int | None = None, seed: int = 0, **options: Any
    ) -> None:
        super().__init__()
        self.answers = EngineAnswers(engine, mode, **options)
        self.engine, self.mode, self.seed, self.options = engine, mode, seed, options
        self.tokenizer = self.answers.tokenizer
        prefix = prefix_of(self.tokenizer)
        if prefix is None:
            raise UsageError("the harness begins texts with BOS or EOS; this model's tokenizer has neither")
        self.prefix = prefix
        most = self.answers.context - 1
        if max_length is not None and not 1 <= max_length <= most:
            raise UsageError(f"max_length is {max_length}; the engine scores texts of up to {most} tokens")
        self.max_length = max_length or most

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        return self.prefix

    @property
    def max_gen_toks(self) -> int:
        """Where a task does not say, as in the harness's `hf`."""
        return 256

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text that a chat becomes."""
        return str(
            applied(
                self.tokenizer,
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Token ids; a text that begins with BOS gets no second one."""
        if add_special_tokens is None and has_bos_prefix(string, self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special: dict[str, Any] = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, **special))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """Of each continuation, its context cut from the left where both are too long."""
        self._need_likelihoods()
        longest = max((len(continuation) for _, _, continuation in requests), default=0)
        if longest > self.max_length:
            raise UsageError(f"a continuation has {longest} tokens, more than max_length, {self.max_length}")
        room = self.max_length + 1
        pairs = [(context[-(room - len(continuation)) :], continuation) for _, context, continuation in requests]
        found = [(one.total, one.greedy) for one in self.answers.likelihoods(pairs)]
        for request, answer in zip(requests, found, strict=True):
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows of max_length tokens."""
        self._need_likelihoods()
        found = []
        for (text,) in (request.args for request in requests):
            pairs = windows(self.tok_encode(text), self.prefix_token_id, self.max_length + 1)
            found.append(sum(one.total for one in self.answers.likelihoods(list(pairs))))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), found[-1])
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """What is written after each context, up to the first text that ends it."""
        asked = [self._asked(number, *request.args) for number, request in enumerate(requests)]
        results = self.engine.generate(
            [prompt for prompt, _ in asked], [params for _, params in asked], mode=self.mode, **self.options
        )
        found = []
        for request, result, (_, params) in zip(requests, results, asked, strict=True):
            text = self.tokenizer.decode(result.tokens, skip_special_tokens=True)
            found.append(postprocess_generated_text(text, list(params.stop or ()), None))
            self.cache_hook.add_partial("generate_until", request.args, found[-1])
        return found

    def _asked(self, number: int, context: str, given: dict[str, Any]) -> tuple[list[int], SamplingParams]:
        """The prompt of a request, cut from the left to leave room for its output, and how to go on from there."""
        kwargs = normalize_gen_kwargs(given, self.max_gen_toks)
        eos = None if self.eot_token_id is None else self.tokenizer.decode(self.eot_token_id)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        written, sampled = kwargs.pop("max_gen_toks"), kwargs.pop("do_sample", None)
        room = self.engine.limits.context - written
        if room < 1:
            raise UsageError(f"a task asks for {written} tokens; the model's context is {self.engine.limits.context}")
        taken = {name: kwargs.pop(name) for name in TAKEN if name in kwargs}
        if kwargs:
            raise UsageError(f"a task asks for `{next(iter(kwargs))}` of generation, which an engine has not")
        if sampled is False:
            taken["temperature"] = 0.0
        params = SamplingParams(
            **taken, max_new_tokens=written, stop=[text for text in until if text], seed=self.seed + number
        )
        return self.tok_encode(context)[-room:], params

    def _need_likelihoods(self) -> None:
        if self.answers.why_no_likelihood is not None:
            raise UsageError(self.answers.why_no_likelihood)
