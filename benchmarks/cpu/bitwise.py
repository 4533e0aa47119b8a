"""Is every text own `ar`'s?  Every strategy, batch, temperature and length of prompt, with prefixes kept and without.

Of the real model and of tiny ones of several families, in bfloat16 and fp32, at the level that `auto` picks.  Own `ar`
is one request at a time in an engine that keeps nothing.  An adapter that has learned nothing drafts nothing right, so
drafts are the truth with planted mistakes, and accepted prefixes of all lengths occur.  In fp32 own `ar` is held
against the model's own `generate` too.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from transformers import PreTrainedModel

from benchmarks.common import Bar, say
from benchmarks.cpu.subjects import Task
from benchmarks.exact import FAMILIES, WIDE, random_family
from benchmarks.sections import from_tests
from retrofit.adapters.layout import DraftLayout
from retrofit.eval.acceptance import reference_tokens
from retrofit.machine import hardware
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes

LENGTHS = (3, 40, 1000, 1030, 12, 90, 5, 61)
REAL_LENGTHS = (3, 40, 1000, 1030, 5000, 12, 90, 5)
"""Prompt tokens of the tiny models, and of the real one."""
WAYS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "prompt_lookup": {"strategy": "prompt_lookup"},
    "two_forward": {"strategy": "two_forward"},
    "fused chain": {"strategy": "fused", "tree": 0},
    "tree 12": {"strategy": "fused", "tree": 12},
    "tree 18": {"strategy": "fused", "tree": 18},
    "tree 48": {"strategy": "fused", "tree": 48},
    "hybrid": {"strategy": "hybrid"},
    "hybrid in turn": {"strategy": "hybrid", "prepare": "none"},
    "auto": {"strategy": "auto"},
}
BATCHES = (1, 3, 8)
TEMPERATURES = (0.0, 0.8)
SOME = ((8, 0.0), (3, 0.8), (8, 0.8), (1, 0.0))
"""Batches and temperatures of a run that does not try all pairs: strategies begin with another one each."""
OPTIONS: dict[str, Any] = {"seed": 7, "ignore_eos": True}
CACHES = (0, "auto")


@dataclass(frozen=True)
class Subject:
    """load: an engine that keeps prefixes within so many bytes; original: the untouched model."""

    name: str
    dtype: str
    vocab: int
    lengths: Sequence[int]
    tokens: int
    load: Callable[..., AbstractContextManager[Engine]]
    original: Callable[[], PreTrainedModel]


def bitwise(task: Task) -> Iterator[tuple[list[Bar], dict[str, Any]]]:
    """Model by model."""
    for subject in subjects(task):
        bar, found = compared(subject, task.full)
        say(f"{bar.what}: {bar.figure}")
        bars = [bar]
        if subject.dtype == "float32":
            equal, total = found["generate"]
            what = f"{subject.name}, float32: ar = generate, greedy"
            bars.append(Bar(what, "all identical", f"{equal}/{total}", equal == total))
        yield bars, {f"{subject.name}, {subject.dtype}": {**found, "hardware": hardware()}}


def tried(full: bool, kept: bool) -> Iterator[tuple[str, int, float]]:
    """(strategy, batch, temperature): every one; or of each strategy one pair without kept prefixes, two with them."""
    for number, name in enumerate(WAYS):
        some = [SOME[(number + more) % len(SOME)] for more in range(1 + kept)]
        for batch, temperature in product(BATCHES, TEMPERATURES) if full else some:
            if name != "ar" or batch > 1 or kept:
                yield name, batch, temperature


def subjects(task: Task) -> Iterator[Subject]:
    dtypes = task.dtypes
    for dtype in dtypes:
        lengths = REAL_LENGTHS[:4] if task.quick else REAL_LENGTHS
        if not task.only or task.model.name in task.only:
            load, original = partial(lent, task, dtype), partial(task.original, dtype)
            yield Subject(task.model.name, dtype, task.vocab, lengths, 8 if task.quick else 16, load, original)
    families = task.only or (FAMILIES[:2] if task.quick else FAMILIES)
    for family, dtype in product([name for name in families if name in FAMILIES], dtypes):
        kind = getattr(torch, dtype)
        model = random_family(family, kind).load.args[0]
        lengths = LENGTHS[:4] if task.quick else LENGTHS
        tokens = 12 if task.quick else 16
        yield Subject(
            family, dtype, WIDE["vocab_size"], lengths, tokens, partial(wrapped, model), partial(copy.deepcopy, model)
        )


def lent(task: Task, dtype: str, **options: Any) -> AbstractContextManager[Engine]:
    """An engine that stays open."""
    return nullcontext(task.engine(dtype, **options))


def wrapped(model: PreTrainedModel, **options: Any) -> Engine:
    """A live model's engine, with packed products where there are such, and an adapter that matters to draft rows."""
    known = inspect.signature(Engine.from_model).parameters
    given = {name: value for name, value in {"packed": True, **options}.items() if name in known}
    engine = Engine.from_model(model, layout=DraftLayout(block=4), **given)
    return from_tests("decoding").randomise(engine)  # type: ignore[no-any-return]


def compared(subject: Subject, full: bool) -> tuple[Bar, dict[str, Any]]:
    prompts = from_tests("decoding").random_prompts(subject.lengths, vocab=subject.vocab)
    texts: dict[str, list[int]] = {}
    with subject.load(prefix_cache=0) as engine:
        level, packed = engine.backend.exact, bool(getattr(engine.backend, "packed", False))
        truths = {}
        for temperature in TEMPERATURES:
            truths[temperature] = decoded(engine, subject, prompts, 1, temperature, mode="ar")
    for cache in CACHES if "prefix_cache" in inspect.signature(Engine.load).parameters else CACHES[:1]:
        with subject.load(prefix_cache=cache) as engine:
            for name, batch, temperature in tried(full, bool(cache)):
                truth = truths[temperature]
                with planted(subject, truth):
                    got = decoded(engine, subject, prompts, batch, temperature, **WAYS[name])
                equal = [a == b for a, b in zip(got, truth, strict=True)]
                what = (
                    f"{name}, batch {batch}, T = {temperature:g}, prefixes {'kept' if engine.prefixes else 'not kept'}"
                )
                texts[what] = [sum(equal), len(equal)]
                if not all(equal):
                    differ = [n for n, same in zip(subject.lengths, equal, strict=True) if not same]
                    say(
                        f"  {subject.name}, {subject.dtype}, {what}: {sum(equal)}/{len(equal)}; lengths {differ} differ"
                    )
    figures: dict[str, Any] = {"level": level, "packed": packed, "texts": texts}
    if subject.dtype == "float32":
        own = reference_tokens(subject.original(), prompts, max_new_tokens=subject.tokens)
        figures["generate"] = [sum(a == b for a, b in zip(own, truths[0.0], strict=True)), len(own)]
    equal_texts, total = (sum(column) for column in zip(*texts.values(), strict=True))
    bar = Bar(
        f"{subject.name}, {subject.dtype}: every text = own ar", "all identical",
        f"{equal_texts}/{total} at {level}", equal_texts == total,
    )  # fmt: skip
    return bar, figures


def decoded(
    engine: Engine, subject: Subject, prompts: list[list[int]], batch: int, temperature: float, **way: Any
) -> list[list[int]]:
    results = engine.generate(
        prompts, batch_size=batch, temperature=temperature, max_new_tokens=subject.tokens, **way, **OPTIONS
    )
    return [result.tokens for result in results]


def planted(subject: Subject, truth: list[list[int]]) -> Any:
    """Drafts that are the truth, some of them wrong."""
    seeds = {0: truth[0], **{OPTIONS["seed"] + i: text for i, text in enumerate(truth)}}  # 0: `auto` times its plans
    return patch.object(modes, "draft_tokens", from_tests("decoding").Oracle(seeds, vocab=subject.vocab))
