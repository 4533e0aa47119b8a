"""`auto` and cut plans on the device: whatever fits the bucket is chosen, timed and recorded, and nothing else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fused_models import fused, pair, plain_decoder, plain_sampling, small

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UsageError
from retrofit.runtime.auto import cost
from retrofit.runtime.auto.cost import CostModel
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.device import loop as device_loop
from retrofit.runtime.device.lowering import lowered
from retrofit.runtime.engine import Engine
from retrofit.runtime.plan import cut_cycle, fixed_cycle, num_rows, two_forward
from retrofit.runtime.rules.tree import grow

BLOCK = 8
CHANCES = {"ranks": {"greedy": [[0.6, 0.2, 0.1]] * BLOCK}, "conditional": {"greedy": [0.8] * BLOCK}}
PROMPTS = [[n + 1, 2, 3] for n in range(16)]


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    plain_decoder(monkeypatch)
    plain_sampling(monkeypatch)


def engines(exact: str = "bucket", rows: int = 128) -> tuple[Engine, Engine]:
    """(fused, hf) with measured chances of candidates, as a converted model has them."""
    device, hf = pair(small("llama", num_hidden_layers=1), DraftLayout(block=BLOCK), exact, rows)
    return Engine(device.backend, device.layout, None, CHANCES), hf


def decode(engine: Engine, prompts: list[list[int]], mode: str = "self_spec", **options: Any) -> list[list[int]]:
    results = engine.generate(prompts, mode, max_new_tokens=6, ignore_eos=True, **options)
    return [result.tokens for result in results]


@pytest.mark.usefixtures("plain")
def test_auto_times_trees_and_large_batches_and_speculates_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own measurements, at block 8 in the default bucket: 16 requests leave no room to draft, one does."""
    monkeypatch.setattr(cost, "REPEATS", 1)
    engine, hf = engines()
    want = decode(hf, PROMPTS, "ar", batch_size=16)
    for count in (16, 1):
        assert decode(engine, PROMPTS[:count], batch_size=16) == want[:count]
    costs = engine.device_policy.costs[False]
    assert costs.times.rows(True), "drafting steps were never timed"
    assert any(cycle[-1].tree is not None for cycle in costs.cycles(128))
    assert {1, 16} <= {lanes for _, lanes in engine.device_policy.timed}


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("batch", [1, 3])
def test_fixed_plans_are_cut_to_the_bucket(batch: int) -> None:
    engine, hf = engines(rows=40)
    prompts = PROMPTS[:batch]
    want = decode(hf, prompts, "ar", batch_size=batch)
    for options in (
        {"strategy": "fused", "tree": 18},
        {"strategy": "fused"},
        {"strategy": "fused", "prepare": "last"},
        {"strategy": "two_forward"},
    ):
        results = engine.generate(prompts, max_new_tokens=6, ignore_eos=True, batch_size=batch, **options)
        assert [r.tokens for r in results] == want, options
        assert max(r.stats.widest for r in results) * min(batch, engine.backend.lanes(batch)) <= 40, options


@pytest.mark.parametrize("rows", [1, 8, 9, 10, 12, 40, 64, 171, None])
@pytest.mark.parametrize("prepare", ["all", "last", 3])
def test_a_fixed_cycle_never_outgrows_its_rows(rows: int | None, prepare: str | int) -> None:
    layout, grown = DraftLayout(block=BLOCK), grow(CHANCES["ranks"]["greedy"], 18)
    for strategy in ("ar", "two_forward", "fused"):
        for tree in (None, grown):
            for plan in cut_cycle(fixed_cycle(strategy, prepare, layout, tree), layout, rows):
                step = lowered(plan, BLOCK, "cpu")
                assert step.base_rows + step.draft_rows == num_rows(plan, layout)
                assert rows is None or step.base_rows + step.draft_rows <= rows
                assert not step.blocks or len(step.draft_parents) > 1, "a block that drafts nothing"
    if rows is None:
        assert cut_cycle(fixed_cycle("fused", "all", layout, grown), layout, None)[0].tree == grown


def test_cycles_of_auto_fit_with_their_drafting_steps() -> None:
    layout = DraftLayout(block=BLOCK)
    model = CostModel(layout, [0.8] * BLOCK)
    for rows in (1, 8, 9, 17, 128):
        for cycle in model.cycles(rows):
            assert all(num_rows(plan, layout) <= rows for plan in cycle), (rows, cycle)
    assert two_forward(4) in model.cycles(9)


def test_a_tree_beyond_the_headroom_is_refused() -> None:
    engine, _ = engines("off")
    with pytest.raises(UsageError, match="up to 127"):
        decode(engine, PROMPTS[:1], strategy="fused", tree=200)


@pytest.mark.usefixtures("plain")
def test_an_interrupted_recording_leaves_the_lanes_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a later call serves is not what an interrupted one left behind."""
    engine, hf = engines("off")
    want = decode(hf, PROMPTS[:1], "ar")

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(device_loop, "lay_rows", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decode(engine, PROMPTS[:1], "ar")
    assert not engine.backend.cache.leased
    assert decode(engine, PROMPTS[:1], "ar") == want


@pytest.mark.usefixtures("plain")
def test_a_larger_cache_takes_the_place_of_the_old_one_and_of_its_steps() -> None:
    engine, _ = engines("off")
    decode(engine, PROMPTS[:1], "ar", batch_size=1)
    old = engine.backend.cache
    assert len(old.loops) == 1
    decode(engine, PROMPTS[:2], "ar", batch_size=2)
    assert engine.backend.cache is not old
    assert not old.loops
    for temperature in range(1, 8):
        decode(engine, PROMPTS[:1], "ar", temperature=float(temperature), batch_size=1)
    assert len(engine.backend.cache.loops) <= 4


@pytest.mark.parametrize("mode", ["ar", "diffusion"])
def test_only_auto_times_plans(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default strategy is `auto`, in modes that know no strategy too."""
    _, hf = engines("off")
    monkeypatch.setattr(AutoPolicy, "trials", lambda *_: pytest.fail("plans were timed"))
    decode(hf, PROMPTS[:1], mode)


def test_an_engine_takes_weights_of_another_type() -> None:
    hf_model = small("qwen3", num_hidden_layers=1)
    checkpoint = {name: t.clone() for name, t in hf_model.state_dict().items()}
    engine = fused(Engine.from_model(hf_model, layout=DraftLayout(block=2)), checkpoint, dtype=torch.bfloat16)
    assert engine.backend.weights.embedding.dtype == torch.bfloat16
