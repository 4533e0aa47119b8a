"""The chi-square check of `ar`: its exact probabilities against plain Python, its statistic and p-value by hand."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from retrofit.eval.distribution import (
    CASES,
    LEAST_EXPECTED,
    TOKENS,
    VOCABULARY,
    Sampling,
    chi_square,
    continuations,
    distribution,
    tiny_model,
)
from retrofit.runtime.host import modes
from retrofit.runtime.request import Request


def softmax(scores: list[float]) -> list[float]:
    weights = [math.exp(s - max(scores)) for s in scores]
    return [w / sum(weights) for w in weights]


def next_token(logits: list[float], path: tuple[int, ...], sampling: Sampling) -> list[float]:
    """Probability of each next token: repetition penalty, temperature, top-k, top-p, one after the other."""
    scores = list(logits)
    for token in set(path) if sampling.repetition_penalty else ():
        penalty = sampling.repetition_penalty
        scores[token] = scores[token] * penalty if scores[token] < 0 else scores[token] / penalty
    scores = [s / sampling.temperature for s in scores]
    ordered = sorted(range(len(scores)), key=lambda t: -scores[t])
    kept = ordered[: sampling.top_k] if sampling.top_k else ordered
    if sampling.top_p:
        chances = dict(zip(kept, softmax([scores[t] for t in kept]), strict=True))
        before = list(itertools.accumulate((chances[t] for t in kept), initial=0.0))
        kept = [t for t, mass in zip(kept, before, strict=False) if mass < sampling.top_p]
    chances = softmax([scores[t] for t in kept])
    return [chances[kept.index(t)] if t in kept else 0.0 for t in range(len(scores))]


@pytest.mark.parametrize(("prompt", "sampling"), CASES, ids=str)
def test_probabilities_of_all_continuations(prompt: tuple[int, ...], sampling: Sampling) -> None:
    model = tiny_model().double()
    found = continuations(model, prompt, sampling)
    assert sum(found.values()) == pytest.approx(1)
    assert len(found) == VOCABULARY**TOKENS
    for text in itertools.product(range(VOCABULARY), repeat=TOKENS):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text]]), use_cache=False).logits[0].tolist()
        chance = 1.0
        for n, token in enumerate(text):
            path = (*prompt, *text[:n])
            chance *= next_token(logits[len(path) - 1], path, sampling)[token]
        assert found[text] == pytest.approx(chance, abs=1e-9), text


# What the check must catch


@pytest.mark.parametrize(("prompt", "sampling"), CASES, ids=str)
def test_a_case_has_much_that_can_come(prompt: tuple[int, ...], sampling: Sampling) -> None:
    """A distribution of one continuation would agree with anything."""
    found = continuations(tiny_model().double(), prompt, sampling)
    assert sum(1000 * chance >= LEAST_EXPECTED for chance in found.values()) > 5


def test_the_engine_passes() -> None:
    assert distribution(400).ok


@pytest.mark.parametrize("fault", ["output unseen", "no top-k", "no top-p", "no temperature"])
def test_planted_fault(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    emit, process = Request.emit, modes.process_logits

    def without_seeing(self: Request, tokens: Sequence[int], **options: bool) -> int:
        kept, self.seen = self.seen, None
        taken = emit(self, tokens, **options)
        self.seen = kept
        return taken

    left_out = {"no top-k": {"top_k": None}, "no top-p": {"top_p": None}, "no temperature": {"temperature": 1.0}}
    if fault == "output unseen":
        monkeypatch.setattr(Request, "emit", without_seeing)
    else:
        monkeypatch.setattr(
            modes,
            "process_logits",
            lambda logits, params, *rest: process(logits, replace(params, **left_out[fault]), *rest),
        )
    assert not distribution(400).ok


# Its parts, by hand


def counted(*seen: int) -> Counter[tuple[int, ...]]:
    return Counter({(i,): n for i, n in enumerate(seen)})


def chances(*of: float) -> dict[tuple[int, ...], float]:
    return {(i,): p for i, p in enumerate(of)}


def test_the_p_value_by_hand() -> None:
    """Of two degrees of freedom it is exp(-x / 2), of one erfc(sqrt(x / 2)), of four (1 + x / 2) exp(-x / 2)."""
    statistic, freedom, p = chi_square(counted(50, 30, 20), chances(0.4, 0.4, 0.2), 100)
    assert (statistic, freedom) == (pytest.approx(100 / 40 + 100 / 40), 2)
    assert p == pytest.approx(math.exp(-2.5))
    statistic, freedom, p = chi_square(counted(60, 40), chances(0.5, 0.5), 100)
    assert (statistic, freedom, p) == (pytest.approx(4), 1, pytest.approx(math.erfc(math.sqrt(2))))
    statistic, freedom, p = chi_square(counted(30, 20, 20, 20, 10), chances(*[0.2] * 5), 100)
    assert (statistic, freedom, p) == (pytest.approx(10), 4, pytest.approx(6 * math.exp(-5)))


def test_cells_that_are_rarely_expected_are_pooled() -> None:
    # 2 + 2 expected are fewer than 5, so they join the smallest cell, 6; seen there: 7 + 3 + 4
    statistic, freedom, _ = chi_square(counted(86, 7, 3, 4), chances(0.9, 0.06, 0.02, 0.02), 100)
    assert (statistic, freedom) == (pytest.approx(16 / 90 + 16 / 10), 1)
    # 5 x 4 expected are enough for a cell of their own; seen there: 30
    statistic, freedom, _ = chi_square(counted(70, 10, 10, 4, 6, 0), chances(0.8, *[0.04] * 5), 100)
    assert (statistic, freedom) == (pytest.approx(100 / 80 + 100 / 20), 1)
    # nothing is expected 5 times: one cell of all, which can say nothing
    assert chi_square(counted(2, 1), chances(0.5, 0.5), 3)[:2] == (0, 1)
    assert chi_square(counted(3, 0), chances(1.0, 0.0), 3)[2] > 0.9
