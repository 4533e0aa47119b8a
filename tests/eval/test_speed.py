"""Seconds per token on a clock that is known: what is divided by what, in which order, over which prompts."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from retrofit.eval import speed
from retrofit.eval.speed import WAYS, ratio_of, seconds_per_token, turns_of

PROMPTS = [[1], [2], [3]]
SECONDS = {"ar": [6.0, 12.0, 7.0], "fused_last": [3.0, 6.0, 7.0]}
"""Of each way, what its turns take."""


class KnownEngine:
    """Emits two tokens of the first prompt, three of the second, four of the third; remembers how it was asked."""

    def __init__(self) -> None:
        self.now = 0.0
        self.prefixes = None
        self.calls: list[tuple[str, Sequence[Sequence[int]]]] = []
        self.options: list[dict[str, Any]] = []
        self.backend = SimpleNamespace(device=SimpleNamespace(type="cpu"))

    def generate(self, prompts: Sequence[Sequence[int]], mode: str, **options: Any) -> list[Any]:
        plan = {"mode": mode, **{k: options.pop(k) for k in ("strategy", "prepare") if k in options}}
        (way,) = (name for name, its in WAYS.items() if its == plan)
        done = sum(name == way for name, _ in self.calls)
        self.now += 100.0 if done == 0 else SECONDS[way][done - 1]  # the first is the warm-up
        self.calls.append((way, prompts))
        self.options.append(options)
        return [SimpleNamespace(tokens=[0] * (1 + prompt[0])) for prompt in prompts]


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> KnownEngine:
    made = KnownEngine()
    monkeypatch.setattr(speed, "time", SimpleNamespace(perf_counter=lambda: made.now))
    return made


def test_seconds_per_token_by_hand(engine: KnownEngine) -> None:
    got = seconds_per_token(
        engine, PROMPTS, ways=("ar", "fused_last"), repeats=3, per_turn=2, max_new_tokens=4, seed=7, temperature=0.5
    )  # type: ignore[arg-type]
    # turns of prompts 1 2, 3 1, 2 3: 5, 6 and 7 tokens
    ar, last = [6 / 5, 12 / 6, 7 / 7], [3 / 5, 6 / 6, 7 / 7]
    assert got["seconds_per_token"] == {"ar": ar, "fused_last": last}
    assert got["median"] == {"ar": 6 / 5, "fused_last": 1.0}
    # 1/2, 1/2 and 1 within the turns
    assert got["ratio"] == {"ar": 1.0, "fused_last": 0.5}
    assert turns_of(got) == [{"ar": a, "fused_last": b} for a, b in zip(ar, last, strict=True)]
    assert (got["prompts"], got["prompts_per_turn"], got["repeats"], got["temperature"]) == (3, 2, 3, 0.5)


def test_a_ratio_is_the_median_of_the_ratios_within_turns() -> None:
    turns = [{"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 2.0}, {"a": 9.0, "b": 3.0}]
    assert ratio_of(turns, "a", "b") == 1.0  # of 1/4, 1, 3; the medians are 2 and 3
    assert ratio_of(turns, "b", "a") == 1.0
    assert ratio_of(turns[:1], "a", "b") == 0.25


def test_every_way_takes_every_place_over_the_same_prompts(engine: KnownEngine) -> None:
    seconds_per_token(engine, PROMPTS, ways=("ar", "fused_last"), repeats=2, per_turn=2, batch_size=1, seed=7)  # type: ignore[arg-type]
    assert engine.calls == [
        ("ar", [[1]]), ("fused_last", [[1]]),  # warm-up: a batch
        ("ar", [[1], [2]]), ("fused_last", [[1], [2]]),
        ("fused_last", [[3], [1]]), ("ar", [[3], [1]]),
    ]  # fmt: skip
    asked = {"max_new_tokens": 128, "temperature": 0.0, "batch_size": 1, "seed": 7, "ignore_eos": True,
             "original_settings": False}  # fmt: skip
    assert engine.options == [asked] * 6
