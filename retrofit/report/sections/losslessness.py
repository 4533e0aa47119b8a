"""Losslessness: `self_spec` against `ar`, and `ar` against itself in another batch, which is the noise floor.

Greedy, every position has a class by how far its token falls short of the base's likeliest in units in the last place
of the type that runs: match, tie (<= 2), near (<= 8), bug.  Sampled at equal seed, the first difference of a text has
one: prefixes differ behind it, and so do the draws.  Proofs are the certificate's; this is what a user would see.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from retrofit.eval.differences import (
    CLASSES,
    class_differences,
    classify,
    first_difference,
    score_margin,
    token_at,
    ulp,
)
from retrofit.eval.exactness import BATCH, PLAIN, strategies
from retrofit.eval.replay import Sampling
from retrofit.report.setting import Data, Earlier, Setting
from retrofit.weight_files import dtype_name

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPERATURE = 0.8
LOGITS = 16.0
"""Size of the scores whose last place a sampled difference is measured in."""
WORST = 5
SHOWN = 12
"""Tokens of the text before a difference that are shown."""
Texts = list[list[int]]
Judge = Callable[[Texts, Texts], Data]


def losslessness(setting: Setting, earlier: Earlier) -> Data:
    """Texts and positions by class, greedy and sampled, each with its noise floor and its worst positions."""
    setting.need("self_spec")
    dtype = setting.subject.dtype
    found: Data = {
        "exact": setting.engine.backend.exact,
        "dtype": dtype_name(dtype),
        "new_tokens": setting.suite.lossless_tokens,
    }
    prompts = setting.ids(setting.suite.lossless_prompts, setting.suite.lossless_tokens)
    wider = torch.float64 if dtype == torch.float32 else torch.float32
    model = partial(setting.subject.base, wider)
    greedy: Judge = lambda want, got: class_differences(model, prompts, want, got, dtype)  # noqa: E731
    sampled: Judge = lambda want, got: _sampled(model, prompts, want, got, dtype, setting.seed)  # noqa: E731
    for name, judge, temperature in (("greedy", greedy, 0.0), ("sampled", sampled, TEMPERATURE)):
        found[name] = _compared(setting, prompts, temperature, judge)
    return found


def _compared(setting: Setting, prompts: Texts, temperature: float, judge: Judge) -> Data:
    """Every strategy against `ar` in a batch, and `ar` by itself against it."""
    engine = setting.engine

    def texts(mode: str, **options: Any) -> Texts:
        results = engine.generate(
            prompts, mode, max_new_tokens=setting.suite.lossless_tokens, temperature=temperature, seed=setting.seed,
            **options, **PLAIN,
        )  # fmt: skip
        return [result.tokens for result in results]

    want = texts("ar", batch_size=BATCH)
    floor = _summed([("ar", judge(want, alone := texts("ar", batch_size=1)))], [(want, alone)])
    runs: list[tuple[str, Data]] = []
    pairs = []
    for options in strategies(engine, "all"):
        got = texts("self_spec", **options)
        runs.append((f"{options['strategy']}, batch {options['batch_size']}", judge(want, got)))
        pairs.append((want, got))
    worst = sorted(
        ((way, first) for way, run in runs for first in run["first_differences"]),
        key=lambda found: -found[1].get("ulp", float("inf")),
    )
    return {
        **_summed(runs, pairs),
        "noise_floor": floor,
        "worst": [{"way": way, **_shown(setting, prompts, want, first)} for way, first in worst[:WORST]],
    }


def _summed(runs: Sequence[tuple[str, Data]], pairs: Sequence[tuple[Texts, Texts]]) -> Data:
    """Texts and how many are equal, positions by class, over all runs and of each."""
    by_way = {
        way: {"texts": len(want), "equal_texts": sum(map(list.__eq__, want, got)), **{c: run[c] for c in CLASSES}}
        for (way, run), (want, got) in zip(runs, pairs, strict=True)
    }
    totals: Counter[str] = Counter()
    for counts in by_way.values():
        totals.update(counts)
    return {**{name: totals[name] for name in ("texts", "equal_texts", *CLASSES)}, "by_way": by_way}


def _sampled(
    model: Callable[[], PreTrainedModel], prompts: Texts, want: Texts, got: Texts, dtype: torch.dtype, seed: int
) -> Data:
    """As `class_differences`, for texts drawn with the noise of `seed` plus the prompt's number."""
    counts = dict.fromkeys(CLASSES, 0)
    firsts = []
    for number, (prompt, text, other) in enumerate(zip(prompts, want, got, strict=True)):
        at = first_difference(text, other)
        counts["match"] += len(other) if at is None else min(at, len(other))
        if at is None:
            continue
        first: Data = {"prompt": number, "token": at, "expected": token_at(text, at), "got": token_at(other, at)}
        kind = "bug"  # one of them ended where the other went on
        if first["expected"] is not None and first["got"] is not None:
            pair = [text[at], other[at]]
            margin = score_margin(model(), prompt, text[:at], pair, Sampling(TEMPERATURE), seed + number)
            first["ulp"] = round(margin / ulp(LOGITS, dtype), 3)
            kind = classify(first["ulp"])
        counts[kind] += 1
        firsts.append({**first, "class": kind})
    return {**counts, "first_differences": firsts}


def _shown(setting: Setting, prompts: Texts, want: Texts, first: Data) -> Data:
    """A first difference with the text around it."""
    number, at = first["prompt"], first["token"]
    before = [*prompts[number], *want[number][:at]][-SHOWN:]

    def text(tokens: Sequence[int | None]) -> str | None:
        known = [token for token in tokens if token is not None]
        tokenizer = setting.engine.tokenizer
        return None if tokenizer is None or not known else str(tokenizer.decode(known))

    return {
        "prompt": setting.prompts[number].id,
        "token": at,
        "class": first.get("class", "bug"),
        "ulp": first.get("ulp"),
        "before": text(before),
        "expected": text([first["expected"]]),
        "got": text([first["got"]]),
    }
