"""What is asked of a model on trial: log-probabilities of continuations, and texts; by an engine, and by the original.

The original is the base alone in transformers: its own forward and `generate`, nothing of ours in between.
Not here: what is asked (`items.py`), what an answer is worth (`scoring.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from retrofit.errors import UsageError
from retrofit.runtime.engine import Engine
from retrofit.runtime.params import SamplingParams
from retrofit.tasks.tokens import Pair


class Likelihood(NamedTuple):
    """Of a continuation: its log-probability in nats, and whether greedy decoding would write it."""

    total: float
    greedy: bool


class Asked(NamedTuple):
    """A text to continue: token ids, how many tokens may follow, and texts that end it before themselves."""

    prompt: list[int]
    max_new_tokens: int
    stop: tuple[str, ...] = ()


class Answers(Protocol):
    """A model on trial."""

    tokenizer: PreTrainedTokenizerBase
    context: int
    """Tokens that a sequence may have when it is scored."""
    why_no_likelihood: str | None
    """Why log-probabilities of given text mean nothing here; None where they do."""

    def likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Of each continuation, given its context."""
        ...

    def texts(self, asked: Sequence[Asked]) -> list[str]:
        """What is written, greedily, to continue each prompt."""
        ...


class EngineAnswers:
    """An engine in one mode.  options: of `Engine.generate`, such as strategy, threshold or batch_size.

    Raises UsageError for an engine without a tokenizer.
    """

    def __init__(self, engine: Engine, mode: str, **options: Any) -> None:
        if engine.tokenizer is None:
            raise UsageError("quality tasks are texts and need a tokenizer; this engine has none")
        self.engine, self.mode, self.options, self.tokenizer = engine, mode, options, engine.tokenizer
        self.context = engine.limits.context - 1  # a prompt must leave room for a token
        self.why_no_likelihood = None if mode == "ar" else f"{mode} writes text; the likelihoods are those of ar"

    def likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        results = self.engine.generate(
            [context + continuation for context, continuation in pairs],
            SamplingParams(max_new_tokens=1, prompt_logprobs=1),
            mode="ar",
            **{**self.options, "original_settings": False},
        )
        told = [result.prompt_logprobs or [] for result in results]
        return [_likelihood(rows[len(pair[0]) :], pair[1]) for rows, pair in zip(told, pairs, strict=True)]

    def texts(self, asked: Sequence[Asked]) -> list[str]:
        written = zip(self.tokens(asked), asked, strict=True)
        return [readable(self.tokenizer, tokens, one.stop) for tokens, one in written]

    def tokens(self, asked: Sequence[Asked]) -> list[list[int]]:
        """What is written, token by token, up to where it stops."""
        params = [SamplingParams(max_new_tokens=one.max_new_tokens, stop=one.stop) for one in asked]
        results = self.engine.generate([one.prompt for one in asked], params, mode=self.mode, **self.options)
        return [result.tokens for result in results]


class OriginalAnswers:
    """The base in transformers, one sequence at a time.  Its generation_config holds, as it does for an engine."""

    why_no_likelihood: str | None = None

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: int) -> None:
        self.model, self.tokenizer, self.context = model, tokenizer, context

    def likelihoods(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        return [self._likelihood(context, continuation) for context, continuation in pairs]

    @torch.inference_mode()
    def _likelihood(self, context: list[int], continuation: list[int]) -> Likelihood:
        row = torch.tensor([(context + continuation)[:-1]], device=self.model.device)
        logits_CV = self.model(row).logits[0, len(context) - 1 :].float()
        target = torch.tensor(continuation, device=logits_CV.device)
        own = torch.log_softmax(logits_CV, dim=-1).gather(1, target[:, None])
        return Likelihood(float(own.sum()), bool((logits_CV.argmax(dim=-1) == target).all()))

    def texts(self, asked: Sequence[Asked]) -> list[str]:
        written = zip(self.tokens(asked), asked, strict=True)
        return [readable(self.tokenizer, tokens, one.stop) for tokens, one in written]

    @torch.inference_mode()
    def tokens(self, asked: Sequence[Asked]) -> list[list[int]]:
        """What is written, token by token, up to where it stops."""
        return [self._written(one) for one in asked]

    def _written(self, asked: Asked) -> list[int]:
        row, length = torch.tensor([asked.prompt], device=self.model.device), len(asked.prompt)

        def stopped(ids_1T: Tensor, scores: object, **_: object) -> Tensor:
            text = str(self.tokenizer.decode(ids_1T[0, length:], skip_special_tokens=True))
            return torch.tensor([any(word in text for word in asked.stop)], device=ids_1T.device)

        model: Any = self.model
        written: Tensor = model.generate(
            row,
            attention_mask=torch.ones_like(row),
            do_sample=False,
            max_new_tokens=asked.max_new_tokens,
            stopping_criteria=[stopped],
        )
        found: list[int] = written[0, length:].tolist()
        return found


def _likelihood(rows: Sequence[Any], continuation: Sequence[int]) -> Likelihood:
    """rows: of each token of the continuation, {token: log-probability} with that of the likeliest token."""
    own = [row[token] for row, token in zip(rows, continuation, strict=True)]
    greedy = all(len(row) == 1 for row in rows)  # the likeliest is the token itself
    return Likelihood(float(torch.tensor(own, dtype=torch.float32).sum()), greedy)


def readable(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """Tokens as text without special tokens, up to the first of the texts that end it."""
    return cut(str(tokenizer.decode(tokens, skip_special_tokens=True)), stop)


def cut(text: str, stop: Sequence[str]) -> str:
    """A text up to the first of some texts in it."""
    ends = [at for word in stop if (at := text.find(word)) >= 0]
    return text[: min(ends, default=len(text))]
