"""What turns times into published figures, on times worked out by hand."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoding import randomise
from tiny_models import build
from torch import nn

from benchmarks.cpu import memory, speed, steps
from benchmarks.cpu.figures import Clock, bandwidth, floor_ms, interleaved, medians
from retrofit.adapters.layout import DraftLayout
from retrofit.eval.speed import ratio_of
from retrofit.runtime.engine import Engine
from retrofit.runtime.rules.tree import DraftTree


def test_every_way_takes_every_place_in_its_turn() -> None:
    asked: list[str] = []

    def way(name: str) -> Any:
        return lambda: asked.append(name) or float(len(asked))

    found = interleaved({name: way(name) for name in "abc"}, 4)
    assert "".join(asked) == "abcbcacababc"
    assert found[1] == {"b": 4.0, "c": 5.0, "a": 6.0}


def test_a_ratio_is_the_median_of_the_turns_ratios() -> None:
    """Not the ratio of the medians, 4 / 2: the machine was slow in the last turn, for both."""
    turns = [{"now": 1.0, "transformers": 3.0}, {"now": 2.0, "transformers": 4.0}, {"now": 10.0, "transformers": 30.0}]
    assert medians(turns) == {"now": 2.0, "transformers": 4.0}
    assert ratio_of(turns, "transformers", "now") == 3.0


@pytest.mark.parametrize(("bar", "met"), [(3.0, True), (3.01, False)])
def test_a_bar_says_how_many_times_as_fast(bar: float, met: bool) -> None:
    turns = [{"before": 4.0, "now": 2.0, "transformers": 6.0}]
    found = speed.bar_of("ar", bar, turns, "ms a token")
    assert found.met is met
    assert found.figure == "3.00 (ms a token: before 4.0, now 2.0, transformers 6.0)"


def test_the_floor_is_the_time_to_read_weights_and_keys() -> None:
    assert floor_ms(200_000_000, 50_000_000, 50e9) == 5.0
    assert bandwidth(1 << 20, repeats=2) > 0


def ticking(*times: float) -> Any:
    left = list(times)
    return lambda: left.pop(0)


def test_a_section_does_not_count_what_runs_inside_it() -> None:
    clock = Clock(ticking(0, 1, 4, 6, 7, 12))
    with clock.section("rest"):  # 0 .. 12
        with clock.section("products"):  # 1 .. 4
            pass
        with clock.section("products"):  # 6 .. 7
            pass
    assert clock.spent == {"rest": 1 + 2 + 5, "products": 3 + 1}


def test_a_section_can_keep_what_runs_inside_it() -> None:
    clock = Clock(ticking(0, 1, 2, 5, 9, 10), whole=("drafting",))
    with clock.section("rest"), clock.section("drafting"), clock.section("products"):
        pass
    assert clock.spent == {"rest": 1 + 1, "drafting": 1 + 3 + 4}


def test_weights_are_counted_once_and_keys_by_their_heads() -> None:
    """llama_tied: 2 layers, 4 K/V heads of width 8, a vocabulary of 64 by 32 that is embedding and head."""
    for name, heads in (("llama_tied", 4), ("llama", 2)):
        model = build(name).bfloat16()
        numbers = sum(p.numel() for p in model.parameters()) - (0 if name == "llama_tied" else 64 * 32)
        with Engine.from_model(model) as engine:
            assert steps.read_bytes(engine, 100) == (2 * numbers, 2 * 2 * 2 * heads * 8 * 100)


def test_tensors_that_share_memory_count_once() -> None:
    whole = torch.zeros(10, 4)
    holder = SimpleNamespace(layers={0: (whole, whole[2:]), 1: [torch.zeros(5)]}, slots=3)
    assert memory.tensor_bytes(holder) == 4 * 45


def test_blocks_hang_behind_the_best_path_and_where_else_it_likely_ends() -> None:
    tree = DraftTree((-1, 0, 1, 0, 2), (0, 0, 0, 1, 0), (1.0, 0.6, 0.5, 0.3, 0.1))
    assert steps.best_path(tree) == [0, 1, 2, 4]
    assert steps.ends(tree, 3) == (2, 3, 4)  # 0.4 end at row 2, 0.3 at row 3


def test_the_steps_of_the_stage_verify_their_text_and_draft() -> None:
    """Every step runs, with the rows its name says; clocks count the products of each."""
    engine = randomise(Engine.from_model(build("llama"), layout=DraftLayout()))
    prompt = list(range(20))
    stage = steps.Stage(engine, prompt)
    rows: list[int] = []
    own = engine.backend.forward

    def forward(plan: Any, cache: Any) -> Any:
        rows.append(plan.num_rows)
        return own(plan, cache)

    engine.backend.forward = forward  # type: ignore[method-assign]
    kinds = steps.steps(engine, prompt)
    rows.clear()
    for step in kinds.values():
        stage.take(step)
    assert rows == [1, 9, 9, 17, 48]
    parts = steps.parts_of(stage, kinds["fused, 9 + 8"], 1)
    assert list(parts) == list(steps.PARTS) and all(ms > 0 for ms in parts.values())
    assert steps.parts_of(stage, kinds["ar"], 1)["drafting"] == 0
    multiplied = steps.multiplying(engine.backend)
    inside = {id(m) for module in multiplied for m in module.modules()}
    linear = [m for m in engine.attached.model.modules() if isinstance(m, nn.Linear)]
    assert all(id(module) in inside for module in linear) and len(multiplied) == 2 * 7 + 1
    engine.close()
