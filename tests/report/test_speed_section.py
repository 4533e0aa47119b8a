"""Speed on a clock that is known: what every way takes is what the report says."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from reporting import SMALL, Ticking

from retrofit.eval.latency import Timeline
from retrofit.report.sections import speed as section
from retrofit.report.sections.speed import speed
from retrofit.report.verdict import turn_noise, verdict

PREFILL = 1.0
SECONDS = {"ar": 0.5, "auto": 0.45, "fused": 0.4, "prompt_lookup": 0.5, "diffusion": 0.25}
"""Of a step, which gives every request a chunk."""
CHUNK = {"ar": 1, "auto": 1, "fused": 2, "prompt_lookup": 1, "diffusion": 3}


class KnownEngine:
    """Every request gets a first token after PREFILL, then chunks as its way gives them."""

    def __init__(self, clock: Any, seconds: dict[str, float]):
        self.clock, self.seconds, self.prefixes = clock, seconds, None
        self.backend = SimpleNamespace(device=SimpleNamespace(type="cpu"))
        self.layout = SimpleNamespace(anchored=True)
        self.limits = SimpleNamespace(context=128)

    def stream(self, prompts: Sequence[Any], mode: str, **options: Any) -> Iterator[Any]:
        way = options.get("strategy") or mode
        left, chunk = options["max_new_tokens"], 1
        self.clock.now += PREFILL
        while left:
            for index in range(len(prompts)):
                yield SimpleNamespace(index=index, tokens=[0] * chunk)
            left -= chunk
            chunk = min(CHUNK[way], left)
            self.clock.now += self.seconds[way]


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def measured(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, float], **changes: Any) -> dict[str, Any]:
    clock = Clock()

    def by_transformers(model: Any, prompts: Sequence[Any], **options: Any) -> list[Timeline]:
        sent = clock.now
        clock.now += 8.0
        return [Timeline(sent, 1, [(sent + 2.0, 1), (clock.now, options["max_new_tokens"] - 1)]) for _ in prompts]

    monkeypatch.setattr(section, "by_transformers", by_transformers)
    engine = KnownEngine(clock, seconds)
    suite = replace(SMALL, **{"speed_tokens": 7, "batches": (1, 4), "contexts": (), "repeats": 2, **changes})
    attends = SimpleNamespace(get_text_config=lambda: SimpleNamespace(layer_types=["full_attention"]))
    subject = SimpleNamespace(run=engine, dtype=None, base=lambda dtype: SimpleNamespace(config=attends))
    setting = SimpleNamespace(
        engine=engine, subject=subject, suite=suite, given=True, prompts=[0, 1], clock=clock, seed=0,
        modes=("ar", "self_spec", "diffusion"), drafter={"strategy": "fused"}, ids=lambda count, room: [[1, 2], [3]],
    )  # fmt: skip
    return speed(setting, {})


def test_rates_and_latencies_are_what_the_clock_says(monkeypatch):
    found = measured(monkeypatch, SECONDS)
    one, four = found["cells"]
    # ar: 7 tokens, the first after 1 s, six more every 0.5 s: 4 s.
    ar = one["ways"]["ar"]
    assert (ar["ttft_p50_ms"], ar["itl_p50_ms"], ar["itl_p99_ms"]) == (1000, 500, 500)
    assert ar["tokens_per_s_user"] == 2.0
    assert ar["tokens_per_s_total"] == pytest.approx(7 / 4, abs=1e-4)
    assert four["ways"]["ar"]["tokens_per_s_total"] == 7.0
    # fused: 1 and three chunks of two every 0.4 s: 2.2 s.
    fused = one["ways"]["fused"]
    assert fused["tokens_per_s_total"] == pytest.approx(7 / 2.2, abs=1e-4)
    assert fused["tokens_per_s_user"] == pytest.approx(6 / 1.2, abs=1e-4)
    assert one["ratio_to_ar"]["fused"] == round(2.2 / 4, 4)
    assert one["ratio_to_transformers"]["ar"] == 0.5
    assert one["ways"]["transformers"]["ttft_p50_ms"] == 2000
    assert (ar["requests"], four["ways"]["ar"]["requests"]) == (2, 8)  # over both turns


def test_the_users_own_prompts_are_taken_in_turn(monkeypatch):
    seen = []
    stream = KnownEngine.stream

    def noted(self: KnownEngine, prompts: Sequence[Any], mode: str, **options: Any) -> Iterator[Any]:
        seen.append((mode, [list(prompt) for prompt in prompts]))
        return stream(self, prompts, mode, **options)

    monkeypatch.setattr(KnownEngine, "stream", noted)
    measured(monkeypatch, SECONDS, batches=(1, 2), repeats=3, timed_at=(0.8,))
    ar = [prompts for mode, prompts in seen if mode == "ar"]
    assert ar[:4] == [[[1, 2]], [[1, 2]], [[3]], [[1, 2]]]  # first a run that is not timed
    assert ar[4:] == [[[1, 2], [3]]] * 4


def test_transformers_prompt_lookup_takes_one_prompt_at_a_time(monkeypatch):
    one, four = measured(monkeypatch, SECONDS)["cells"]
    assert set(one["ways"]) - set(four["ways"]) == {"transformers_prompt_lookup"}


def test_an_engine_slower_than_it_says_fails_by_how_much(monkeypatch):
    honest = verdict({"speed": measured(monkeypatch, SECONDS)}, {})
    assert [(gate["name"], gate["ok"]) for gate in honest["gates"]] == [("never_slower", True)]
    slow = verdict({"speed": measured(monkeypatch, {**SECONDS, "auto": 0.75}, repeats=9)}, {})
    (gate,) = slow["gates"]
    assert (gate["ok"], slow["ok"], gate["value"]) == (False, False, round(5.5 / 4, 4))
    assert gate["bound"] == round(1.02 + 3 / (9 * 7), 4)
    assert gate["says"].startswith("at batch 1 and 1 tokens of context auto takes 1.375 times as long as ar; 1.02 is")


def test_noise_is_what_the_turns_of_a_cell_differ_by():
    def cell(*ratios: float) -> dict[str, Any]:
        ways = {"ar": {"seconds_per_token": [1.0] * len(ratios)}, "auto": {"seconds_per_token": list(ratios)}}
        return {"ways": ways}

    # log 2 and log 1/2 about 0, log 4 and log 4 about log 4
    assert turn_noise([cell(2.0, 0.5), cell(4.0, 4.0)]) == pytest.approx(0.6931471805599453)
    assert turn_noise([cell(3.0)]) == 0.0


def test_a_noisy_run_does_not_let_a_slow_engine_pass():
    def found(*ratios: float) -> dict[str, Any]:
        ways = {
            "ar": {"seconds_per_token": [1.0] * 2},
            "auto": {"seconds_per_token": list(ratios), "tokens_per_s_user": 1.0},
        }
        ways["auto"] |= {"tokens_per_s_total": 1.0}
        ratio = {"auto": sum(ratios) / 2}
        cell = {"batch_size": 4, "context_tokens": 1, "temperature": 0.8, "ways": ways, "ratio_to_ar": ratio}
        cell |= {"ratio_to_transformers": ratio}
        (gate,) = verdict({"speed": {"cells": [cell], "repeats": 2, "new_tokens": 300}}, {})["gates"]
        return gate

    slow = found(1.2, 2.6)
    assert not slow["ok"] and slow["bound"] == round((1.02 + 3 / 600) * 1.25, 4)
    assert slow["says"].endswith("its turns differ by more than that: measure on a machine that does nothing else")
    assert found(0.6, 1.8)["ok"]


def test_a_ticking_clock_counts_reads():
    clock = Ticking()
    assert (clock(), clock()) == (1.0, 2.0)


def test_transformers_prompt_lookup_is_left_out_where_it_cannot_take_a_draft_back(monkeypatch):
    monkeypatch.setattr(section, "has_state", lambda model: True)
    cells = measured(monkeypatch, {"ar": 1.0, "auto": 1.0, "fused": 1.0, "prompt_lookup": 1.0, "diffusion": 1.0})[
        "cells"
    ]
    assert cells and not any(section.REFERENCE_LOOKUP in cell["ways"] for cell in cells)
