"""The decoder on its plain specification, and `auto` restless: fixtures of the device's steps."""

import random

import pytest
from fused_models import plain_decoder, plain_sampling

from retrofit.runtime.auto import cost, policy
from retrofit.runtime.plan import AR, Cycle, fused


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` measures nothing and changes its plan at every step, trees among them."""
    plain_decoder(monkeypatch)
    rng = random.Random(1)

    def choose(auto: policy.AutoPolicy, sampled: bool, batch: int, rows: int | None) -> Cycle:
        return rng.choice([AR, *rng.sample(auto.model(sampled).cycles(rows), 4), *[fused(3)] * 3])

    monkeypatch.setattr(policy.AutoPolicy, "choose", choose)
    monkeypatch.setattr(policy, "largest_tree", lambda *_: 4)
    monkeypatch.setattr(cost, "REPEATS", 0)


@pytest.fixture
def faster(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_sampling(monkeypatch)
