"""Speed: every way of decoding by batch size and length of context, transformers' own beside.

All ways of a cell run in one process over the same prompts, in turn, so that a slow moment of the machine hits them
alike; a ratio of two ways is the median of the ratios within a turn.  Seconds cover the whole call, prefill included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from statistics import median
from typing import Any

from retrofit.errors import ResourceError
from retrofit.eval.clocked import by_engine, by_transformers, forget_peak_memory, peak_memory, seconds_per_token
from retrofit.eval.latency import Timeline, speed_figures, total_rate
from retrofit.eval.speed import REFERENCE, WAYS, in_turn, ratio_of
from retrofit.report.setting import Data, Earlier, Setting, Skipped
from retrofit.runtime.backends.hf.refused import has_state

REFERENCE_LOOKUP = "transformers_prompt_lookup"
LOOKUP_TOKENS = 10
"""Drafts of transformers' prompt lookup, as its documentation has it."""
Texts = list[list[int]]
Way = Callable[[Texts], list[Timeline]]


def speed(setting: Setting, earlier: Earlier) -> Data:
    """Latencies and rates of every cell; `ratio_to_ar`, `ratio_to_transformers`: seconds per token over theirs."""
    cells: list[Data] = []
    skipped: list[Data] = []
    for context, batch, turns in _places(setting, skipped):
        for temperature in setting.suite.timed_at:
            named = {"batch_size": batch, "context_tokens": context, "temperature": temperature}
            try:
                cells.append({**named, **_cell(setting, turns, temperature)})
            except ResourceError as error:
                skipped.append({**named, "reason": str(error)})
    if not cells:
        raise Skipped("; ".join(dict.fromkeys(cell["reason"] for cell in skipped)) or "no batch size, no context")
    suite = setting.suite
    return {"new_tokens": suite.speed_tokens, "repeats": suite.repeats, "cells": cells, "skipped_cells": skipped}


def _places(setting: Setting, skipped: list[Data]) -> Iterator[tuple[int, int, list[Texts]]]:
    """(tokens before the output, batch size, prompts of each turn) of every cell, the user's own prompts first.

    Of those each turn takes the next ones, so that few turns still see many; other texts are the same in all turns.
    """
    new, repeats = setting.suite.speed_tokens, setting.suite.repeats
    if setting.given:
        ids = setting.ids(len(setting.prompts), new)
        for batch in setting.suite.batches:
            places = [range(turn * batch, (turn + 1) * batch) for turn in range(repeats)]
            yield int(median(map(len, ids))), batch, [[ids[n % len(ids)] for n in place] for place in places]
    for context in setting.suite.contexts:
        for batch in setting.suite.batches:
            try:
                yield context, batch, [setting.texts(context, batch, new)] * repeats
            except Skipped as reason:
                skipped.append({"batch_size": batch, "context_tokens": context, "reason": str(reason)})


def ways(setting: Setting, temperature: float) -> dict[str, Way]:
    """Every way by name, `ar` first: those of the modes asked for, and the original's own."""
    suite, engine = setting.suite, setting.engine
    names = ["ar"]
    if "self_spec" in setting.modes:
        names += ["auto", setting.drafter["strategy"], "prompt_lookup"]
    if "diffusion" in setting.modes:
        names.append("diffusion")
    common: dict[str, Any] = {
        "clock": setting.clock, "max_new_tokens": suite.speed_tokens, "temperature": temperature,
    }  # fmt: skip
    made: dict[str, Way] = {
        name: partial(by_engine, engine, way=WAYS[name], seed=setting.seed, **common) for name in names
    }
    base = setting.subject.base(setting.subject.dtype)
    made[REFERENCE] = partial(by_transformers, base, **common)
    if not has_state(base):  # transformers cannot take its own drafts back there
        made[REFERENCE_LOOKUP] = partial(by_transformers, base, lookup=LOOKUP_TOKENS, **common)
    return made


def _cell(setting: Setting, texts: Sequence[Texts], temperature: float) -> Data:
    """texts: of each turn."""
    made = ways(setting, temperature)
    if len(texts[0]) > 1:
        made.pop(REFERENCE_LOOKUP, None)  # transformers takes one prompt at a time there
    names, device = list(made), setting.engine.backend.device
    peaks: dict[str, int | None] = {}
    for name in names:
        forget_peak_memory(device)
        made[name](texts[0])
        peaks[name] = peak_memory(device)
    runs: dict[str, list[list[Timeline]]] = {name: [] for name in names}
    for turn, some in enumerate(texts):
        for name in in_turn(names, turn):
            runs[name].append(made[name](some))
    turns = [{name: seconds_per_token(runs[name][turn]) for name in names} for turn in range(len(texts))]
    return {
        "ways": {name: {**_way(runs[name]), "peak_memory_bytes": peaks[name]} for name in names},
        "ratio_to_ar": {name: round(ratio_of(turns, name, "ar"), 4) for name in names},
        "ratio_to_transformers": {name: round(ratio_of(turns, name, REFERENCE), 4) for name in names},
    }


def _way(runs: Sequence[Sequence[Timeline]]) -> Data:
    """Figures over all turns; of the rate of all requests together the median of the turns."""
    rates = [rate for run in runs if (rate := total_rate(run)) is not None]
    together = speed_figures([timeline for run in runs for timeline in run])
    return {
        **together,
        "tokens_per_s_total": round(median(rates), 4) if rates else None,
        "seconds_per_token": [round(seconds_per_token(run), 8) for run in runs],
    }
