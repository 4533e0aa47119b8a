"""Acceptance: what the drafts are worth, whatever the machine: by temperature, slot, category, batch, context.

Prompt lookup stands beside it, which needs no training and wins on text that loops.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from operator import mul
from typing import Any

from retrofit.eval.acceptance import looping_share
from retrofit.eval.trace import Trace, bench_serve, figures
from retrofit.report.prompts import categories
from retrofit.report.setting import Data, Earlier, Setting, Skipped
from retrofit.runtime.results import Result

BATCH = 8
FEW = 4
"""Requests that are the same at every batch size, and prompts of a context's length."""
CLAIMS = {"greedy": 0.0, "sampled": 1.0}
"""What an artifact says of its drafts, and the temperature at which that is held against decoding."""


def acceptance(setting: Setting, earlier: Earlier) -> Data:
    """Figures of every run, each with the trace they are computed from."""
    setting.need("self_spec")
    suite, drafter = setting.suite, setting.drafter
    prompts = setting.ids(suite.prompts, suite.tokens)
    by_temperature = []
    by_category: list[Data] = []
    for temperature in suite.temperatures:
        results = _decode(setting, prompts, temperature, BATCH, drafter)
        lookup = _decode(setting, prompts, temperature, BATCH, {"strategy": "prompt_lookup"})
        both = {"drafter": measured(results), "prompt_lookup": measured(lookup)}
        by_temperature.append({"temperature": temperature, **both})
        by_category = by_category or _by_category(setting, temperature, results)
    sampled = suite.temperatures[0]
    skipped: list[Data] = []
    return {
        "drafter": drafter,
        "new_tokens": suite.tokens,
        "by_temperature": by_temperature,
        "by_category": by_category,
        "by_batch": [_in_batch(setting, prompts, sampled, batch) for batch in suite.batches],
        "by_context": _by_context(setting, sampled, skipped),
        "skipped_contexts": skipped,
        "claimed": _claimed(setting, prompts),
    }


def measured(results: Sequence[Result]) -> Data:
    """Every measure of finished requests, by our names and by those of `vllm bench serve`, and what they come from."""
    trace = Trace.of(results)
    found = figures(trace)
    del found["accepted_histogram"]  # of the trace, which holds more
    looping = looping_share([result.tokens for result in results])
    return {**found, "looping_share": looping, "bench_serve": bench_serve(trace), "trace": trace.to_dict()}


def _decode(
    setting: Setting, prompts: Sequence[Sequence[int]], temperature: float, batch: int, way: Mapping[str, Any]
) -> list[Result]:
    return setting.engine.generate(
        prompts, "self_spec", **way, max_new_tokens=setting.suite.tokens, temperature=temperature, batch_size=batch,
        seed=setting.seed, ignore_eos=True, original_settings=False,
    )  # fmt: skip


def _by_category(setting: Setting, temperature: float, results: Sequence[Result]) -> list[Data]:
    asked = setting.prompts[: len(results)]
    return [
        {"category": name, "temperature": temperature, **measured([results[number] for number in numbers])}
        for name, numbers in categories(asked).items()
    ]


def _in_batch(setting: Setting, prompts: Sequence[Sequence[int]], temperature: float, batch: int) -> Data:
    """Of the same few requests at any batch size; the others keep them company."""
    some = [prompts[number % len(prompts)] for number in range(max(batch, FEW))]
    results = _decode(setting, some, temperature, batch, setting.drafter)
    return {"batch_size": batch, "temperature": temperature, **measured(results[:FEW])}


def _by_context(setting: Setting, temperature: float, skipped: list[Data]) -> list[Data]:
    found = []
    for context in setting.suite.contexts:
        try:
            texts = setting.texts(context, FEW, setting.suite.tokens)
        except Skipped as reason:
            skipped.append({"context_tokens": context, "reason": str(reason)})
            continue
        results = _decode(setting, texts, temperature, FEW, setting.drafter)
        found.append({"context_tokens": context, "temperature": temperature, **measured(results)})
    return found


def _claimed(setting: Setting, prompts: Sequence[Sequence[int]]) -> Data:
    """What the artifact says a chain of drafts has accepted, held against a chain that is decoded."""
    conditional = setting.engine.config.get("acceptance", {}).get("conditional", {})
    chain = {**setting.drafter, **({"tree": 0} if setting.drafter["strategy"] == "fused" else {})}
    found = {}
    for name, temperature in CLAIMS.items():
        if not conditional.get(name):
            continue
        figured = figures(Trace.of(_decode(setting, prompts, temperature, BATCH, chain)))
        claimed = least_accepted(conditional[name], coupled=name == "sampled")
        accepted = sum(figured["accept_joint"])
        found[name] = {
            "temperature": temperature,
            "claimed_by_slot": conditional[name],
            "measured_by_slot": figured["accept_cond"],
            "claimed_drafts_per_cycle": round(claimed, 4),
            "measured_drafts_per_cycle": round(accepted, 4),
            "kept_share": round(accepted / claimed, 4) if claimed else None,
        }
    return found


def least_accepted(conditional: Sequence[float], coupled: bool) -> float:
    """Drafts that a cycle accepts if slots are accepted with these chances, each given all before it.

    coupled: the chances are 1 - TV of drawing from both distributions; with equal noise a draft is accepted with
    (1 - TV) / (1 + TV) at least.
    """
    chances = [chance / (2 - chance) for chance in conditional] if coupled else conditional
    return sum(accumulate(chances, mul))
