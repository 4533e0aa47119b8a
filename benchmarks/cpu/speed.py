"""`ar` against the untouched model's `generate`: milliseconds a token by length of context, tokens a second by batch.

Three ways side by side, in turns: an engine as it was, as it is, and transformers.  A prompt is read once; what is
timed are the tokens after it, some a turn.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.common import Bar, say
from benchmarks.cpu.figures import Turn, interleaved, medians, seconds
from benchmarks.cpu.subjects import Task, random_tokens
from retrofit.eval.acceptance import reference_tokens
from retrofit.eval.speed import ratio_of
from retrofit.runtime.backends.hf.recorded.steps import AFTER, PROOFS
from retrofit.runtime.engine import Engine

CONTEXTS = (200, 2048, 7800)
BARS = {"bfloat16": (1.5, 2.0, 2.8), "float32": (1.8, 1.7, 1.5)}
"""How many times as fast as transformers, at each context."""
TOKENS = 8
"""Of a turn."""
TURNS = 5
WARM = 2 + AFTER + PROOFS
"""Tokens before the first turn: from then on steps are taken as decoding takes them for long."""
REQUESTS = 32
LONG = 2000
REQUEST_TOKENS = 32
BATCH_BAR = 1.5
REFERENCE = "transformers"
PLAIN: dict[str, Any] = {"ignore_eos": True, "original_settings": False}


def contexts(task: Task) -> tuple[list[Bar], dict[str, Any]]:
    bars, figures = [], {}
    for dtype in task.dtypes:
        engines, original = task.engines(dtype), task.original(dtype)
        for context, bar in list(zip(CONTEXTS, BARS[dtype], strict=True))[: 2 if task.quick else None]:
            say(f"{dtype}, {context} tokens of context")
            prompt = random_tokens(context, task.vocab)
            turns = 3 if task.quick else TURNS
            ways = {name: steps_of(engine, prompt, turns) for name, engine in engines.items()}
            found = interleaved({**ways, REFERENCE: steps_of_original(original, prompt)}, turns)
            bars.append(bar_of(f"ar at {context} tokens, {dtype}", bar, found, "ms a token"))
            figures[f"{dtype}, {context}"] = {"ms_per_token": found, "median": medians(found)}
    return bars, figures


def bar_of(what: str, bar: float, found: list[Turn], unit: str) -> Bar:
    """The ratio of a time of transformers to one of ours, and all three times."""
    times, faster = medians(found), ratio_of(found, REFERENCE, "now")
    said = ", ".join(f"{name} {times[name]:.1f}" for name in ("before", "now", REFERENCE))
    return Bar(f"{what}: transformers / now", f">= {bar:g}", f"{faster:.2f} ({unit}: {said})", faster >= bar)


def steps_of(engine: Engine, prompt: list[int], turns: int) -> Callable[[], float]:
    """Takes a turn of `ar` behind this prompt; returns milliseconds a token."""
    stream = engine.stream(
        [prompt], "ar", max_new_tokens=WARM + (turns + 1) * TOKENS, with_text=False, **PLAIN
    )  # fmt: skip
    for _ in range(WARM):
        next(stream)

    def turn() -> float:
        return 1000 * seconds(lambda: [next(stream) for _ in range(TOKENS)]) / TOKENS

    return turn


@torch.inference_mode()
def steps_of_original(model: PreTrainedModel, prompt: list[int]) -> Callable[[], float]:
    """The same of transformers' `generate`, which goes on from its own cache."""
    neutral = GenerationConfig(do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True)
    model.generation_config = neutral
    ids = torch.tensor([prompt])
    state = {"ids": ids, "past": model(ids[:, :-1], logits_to_keep=1, use_cache=True).past_key_values}

    def go_on(count: int) -> None:
        out = model.generate(
            state["ids"], generation_config=neutral, attention_mask=torch.ones_like(state["ids"]),
            past_key_values=state["past"], max_new_tokens=count,
        )  # fmt: skip
        state.update(ids=out.sequences, past=out.past_key_values)

    go_on(2)
    return lambda: 1000 * seconds(lambda: go_on(TOKENS)) / TOKENS


def batch(task: Task) -> tuple[list[Bar], dict[str, Any]]:
    """Many requests at once, prompts included: of unequal length, and the same with a long one among them."""
    bars, figures = [], {}
    short = [20 + 37 * i % 101 for i in range(REQUESTS)]
    mixes = {"": short, f", one of {LONG} tokens": [LONG, *short[1:]]}
    for dtype in task.dtypes:
        for mixed, lengths in list(mixes.items())[: 1 if task.quick else None]:
            say(f"{dtype}, {REQUESTS} requests{mixed}")
            found = decoded_together(task, dtype, lengths, REQUEST_TOKENS // 2 if task.quick else REQUEST_TOKENS)
            bars.append(bar_of(f"ar, {REQUESTS} requests{mixed}, {dtype}", BATCH_BAR, found, "ms a token"))
            rates = {name: round(1000 / ms, 1) for name, ms in medians(found).items()}
            figures[f"{dtype}{mixed}"] = {"ms_per_token": found, "tokens_per_second": rates}
    return bars, figures


def decoded_together(task: Task, dtype: str, lengths: list[int], tokens: int) -> list[Turn]:
    """Milliseconds a token of requests whose prompts are so long, by way; so many new tokens each."""
    prompts = [random_tokens(n, task.vocab, seed=i) for i, n in enumerate(lengths)]
    engines, original = task.engines(dtype), task.original(dtype)

    def per_token(call: Callable[[], Any]) -> float:
        return 1000 * seconds(call) / (len(prompts) * tokens)

    def ours(engine: Engine) -> float:
        return per_token(lambda: engine.generate(prompts, "ar", max_new_tokens=tokens, batch_size=REQUESTS, **PLAIN))

    def theirs() -> float:
        return per_token(lambda: reference_tokens(original, prompts, max_new_tokens=tokens, batch_size=REQUESTS))

    ways: dict[str, Callable[[], float]] = {name: partial(ours, engine) for name, engine in engines.items()}
    return interleaved({**ways, REFERENCE: theirs}, 2 if task.quick else 3)
