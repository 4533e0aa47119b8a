"""Contexts as configurations mean them: YaRN and longrope in every family, against `generate`."""

from typing import Any

import pytest
import torch
from decoding import Oracle, random_prompts, randomise, reference_greedy, tokens_of
from tiny_models import CONFIGS, CONTEXT, ORIGINAL_CONTEXT, SIZES, randomize
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig, PreTrainedModel, Qwen2Config, Qwen3Config

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UnsupportedModelError, UsageError
from retrofit.runtime.backends.context import context_length, rope_boundary
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes

NEW = 10
SHORT = {**SIZES, "max_position_embeddings": ORIGINAL_CONTEXT}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0}
YARN_32 = {**YARN, "original_max_position_embeddings": 32}
LONG = {
    "rope_type": "longrope", "rope_theta": 10_000.0, "original_max_position_embeddings": ORIGINAL_CONTEXT,
    "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 3.0, 6.0, 9.0],
}  # fmt: skip

CONTEXTS = {
    "as Qwen's instructions say": (Qwen2Config(**SHORT, rope_parameters=dict(YARN_32)), 128),
    "extended a little": (Qwen3Config(**{**SHORT, "max_position_embeddings": 40}, rope_parameters=dict(YARN_32)), 128),
    "old names": (Qwen2Config(**SHORT, rope_scaling={"type": "yarn", "factor": 4.0}), 128),
    "no original": (LlamaConfig(**{**SIZES, "max_position_embeddings": 256}, rope_parameters=dict(YARN)), 1024),
    "as DeepSeek writes it": (CONFIGS["deepseek_v3"](), CONTEXT),
    "extended further": (DeepseekV3Config(max_position_embeddings=4096, rope_parameters=dict(YARN_32)), 4096),
    "longrope, extended": (LlamaConfig(**SIZES, rope_parameters=dict(LONG)), CONTEXT),
    "longrope, by its factor": (LlamaConfig(**SHORT, rope_parameters={**LONG, "factor": 2.0}), 64),
    "phi3": (CONFIGS["phi3_longrope"](), CONTEXT),
    "dynamic": (LlamaConfig(**SHORT, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}), 32),
    "linear": (LlamaConfig(**SHORT, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}), 32),
    "none": (LlamaConfig(**SHORT), 32),
    "by layer": (CONFIGS["gemma3"](), CONTEXT),
}  # fmt: skip


@pytest.mark.parametrize(("config", "positions"), CONTEXTS.values(), ids=CONTEXTS)
def test_context_is_what_the_configuration_means(config: Any, positions: int) -> None:
    assert context_length(config) == positions


def test_layers_that_change_their_rope_at_different_places_are_refused() -> None:
    config = CONFIGS["gemma3"]()
    config.rope_parameters = {
        "full_attention": dict(LONG),
        "sliding_attention": {**LONG, "original_max_position_embeddings": 16},
    }
    with pytest.raises(UnsupportedModelError, match=r"different positions: \[16, 32\]"):
        rope_boundary(config)


def model_of(config: Any) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, 0)
    return model.eval()


EXTENDED = {
    "qwen2 yarn": lambda: CONTEXTS["as Qwen's instructions say"][0],
    "llama longrope": lambda: LlamaConfig(**SIZES, rope_parameters=dict(LONG)),
    "qwen3 longrope": lambda: Qwen3Config(**SHORT, head_dim=8, rope_parameters={**LONG, "factor": 4.0}),
    "phi3 longrope": CONFIGS["phi3_longrope"],
}
LENGTHS = (ORIGINAL_CONTEXT - 5, 3, ORIGINAL_CONTEXT, ORIGINAL_CONTEXT + 1, CONTEXT - 6)
SEEDS = (1, 2, 3, 4, 5)


@pytest.mark.usefixtures("restless_auto")
@pytest.mark.parametrize("name", EXTENDED)
def test_greedy_is_generate_beyond_the_original_context(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts that cross it, begin at it, begin beyond it, and end with the extended context."""
    model = model_of(EXTENDED[name]())
    prompts = random_prompts(LENGTHS)
    want = reference_greedy(model, prompts, NEW, context=CONTEXT)
    engine = randomise(Engine.from_model(model, layout=DraftLayout(block=4)))
    assert engine.limits.context == CONTEXT
    options: dict[str, Any] = {"max_new_tokens": NEW, "seed": SEEDS}
    assert tokens_of(engine, prompts, "ar", batch_size=3, **options) == want
    assert [len(text) for text in want] == [NEW] * 4 + [6]
    monkeypatch.setattr(modes, "draft_tokens", Oracle(dict(zip(SEEDS, want, strict=True))))
    for n, way in enumerate(({"strategy": "two_forward"}, {"strategy": "fused", "tree": 9}, {"strategy": "auto"})):
        assert tokens_of(engine, prompts, "self_spec", batch_size=(3, 1)[n % 2], **way, **options) == want, way
    with pytest.raises(UsageError, match=f"the model's context is {CONTEXT}"):
        engine.generate([[1] * CONTEXT])


def test_dynamic_is_refused_beyond_its_context() -> None:
    engine = Engine.from_model(model_of(CONTEXTS["dynamic"][0]))
    (result,) = engine.generate([[1] * 30], "ar", max_new_tokens=9)
    assert len(result.tokens) == 2
    with pytest.raises(UsageError, match="the model's context is 32"):
        engine.generate([[1] * 32])


def test_a_family_with_a_way_of_its_own_ends_at_the_original_context(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(EXTENDED["llama longrope"]())
    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", lambda *a, **k: None)
    engine = Engine.from_model(model)
    assert engine.limits.context == ORIGINAL_CONTEXT
    assert engine.not_honoured == (f"max_position_embeddings={CONTEXT} (longrope: texts end at {ORIGINAL_CONTEXT})",)
