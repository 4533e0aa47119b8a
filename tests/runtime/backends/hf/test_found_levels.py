"""What tests load the second time is what the self-test would have found: `shared/bases/found_levels.py`."""

from pathlib import Path
from typing import Any

import found_levels
import pytest
import torch
from decoding import random_prompts
from tiny_models import build

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.backends.hf import exact_rows
from retrofit.runtime.engine import Engine

PROMPTS = random_prompts((9, 3))


@pytest.fixture
def looked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The classes of the models that the self-test was run on; nothing is known at first."""
    seen: list[str] = []
    right = exact_rows.settle

    def settle(backend: Any, *asked: Any) -> Any:
        seen.append(type(backend.model).__name__)
        return right(backend, *asked)

    monkeypatch.setattr(found_levels, "settle", settle)
    monkeypatch.setattr(found_levels, "FOUND", {})
    return seen


def kept(engine: Engine) -> tuple[Any, ...]:
    backend = engine.backend
    return backend.exact, backend.form, backend.least_rows, backend.most_rows, backend.cut, backend.prefill_alone


def test_the_second_load_keeps_what_the_self_test_finds(
    made: Path, self_test_once: None, looked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, again = Engine.load(made), Engine.load(made)
    assert looked == ["LlamaForCausalLM"]
    monkeypatch.undo()
    anew = Engine.load(made)
    assert kept(first) == kept(again) == kept(anew)
    assert first.settled == again.settled == anew.settled
    for way in ({"mode": "ar"}, {"strategy": "fused"}):
        one, other, third = (
            [result.tokens for result in engine.generate(PROMPTS, max_new_tokens=6, **way)]
            for engine in (first, again, anew)
        )
        assert one == other == third


def test_another_model_type_or_level_is_looked_at(self_test_once: None, looked: list[str]) -> None:
    def load(name: str = "llama", dtype: torch.dtype = torch.bfloat16, exact: str = "auto", block: int = 4) -> None:
        Engine.from_model(build(name).to(dtype), layout=DraftLayout(block=block), exact=exact)

    for options in ({}, {"name": "qwen2"}, {"dtype": torch.float16}, {"exact": "bucket"}, {"block": 3}):
        count = len(looked)
        load(**options)  # type: ignore[arg-type]
        load(**options)  # type: ignore[arg-type]
        assert len(looked) == count + 1, options


def test_a_model_with_a_router_is_looked_at_every_time(self_test_once: None, looked: list[str]) -> None:
    for _ in range(2):
        Engine.from_model(build("qwen3_moe").to(torch.bfloat16), layout=DraftLayout(block=4))
    assert len(looked) == 2
