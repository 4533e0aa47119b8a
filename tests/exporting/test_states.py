"""Bases with a recurrent state are refused where refused drafts would stay in it, by name."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import recurrent_models
from artifact_folders import CONFIG
from tiny_models import build

from retrofit.artifact.engines import STATEFUL, refuse_unfit
from retrofit.errors import UnsupportedModelError
from retrofit.exporting import transformers_folder, uno
from retrofit.runtime.backends.hf.refused import has_state


@pytest.mark.parametrize("name", recurrent_models.RECURRENT)
def test_what_is_driven_with_a_state_is_known_to_have_one(name: str) -> None:
    model = recurrent_models.build(name)
    assert has_state(model)
    assert type(model).__name__ in STATEFUL


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss", "llama4"])
def test_attention_is_no_state(name: str) -> None:
    assert not has_state(build(name))


@pytest.mark.parametrize("compare", [transformers_folder.compare, uno.compare])
def test_exports_that_roll_back_k_and_v_alone_are_refused(compare: Any) -> None:
    base: Any = SimpleNamespace(model=recurrent_models.build("lfm2"))
    artifact: Any = SimpleNamespace(folder=Path("mine"))
    with pytest.raises(UnsupportedModelError, match=r"mine cannot be exported .* the state of a Lfm2ForCausalLM"):
        compare(Path("out"), base, artifact)


def test_sglang_is_refused() -> None:
    config = {**CONFIG, "base": {**CONFIG["base"], "architecture": "Qwen3_5ForCausalLM"}}
    with pytest.raises(UnsupportedModelError, match=r"mine cannot be served by sglang: .* the state of a Qwen3_5"):
        refuse_unfit("mine", config, "sglang")
