"""A base's own settings, and stop tokens, on the fused backend: planned on the host, or seen by the host in time."""

from typing import Any

import pytest
from decoding import random_prompts, tokens_of
from fused_models import VOCABULARY, WIDE, pair, plain_decoder, small
from transformers import GenerationConfig

from retrofit.runtime.device import steps as device_steps
from retrofit.runtime.engine import Engine

PROMPTS = random_prompts((9, 3, 5), vocab=VOCABULARY)
NEW = 8
WAYS: tuple[dict[str, Any], ...] = (
    {"mode": "ar"},
    {"strategy": "two_forward"},
    {"strategy": "fused", "tree": 6},
)


@pytest.fixture(scope="module")
def engines() -> tuple[Engine, Engine]:
    """The fused engine, and the hf one, whose base has settings."""
    model = small("llama", num_hidden_layers=1)
    free = tokens_of(pair(model, WIDE)[1], PROMPTS, "ar", max_new_tokens=NEW)
    model = small("llama", num_hidden_layers=1)
    model.generation_config = GenerationConfig(
        suppress_tokens=[text[0] for text in free], no_repeat_ngram_size=2, forced_eos_token_id=3, pad_token_id=0
    )
    fused, hf = pair(model, WIDE)
    fused.backend.settings = hf.backend.settings
    return fused, hf


def test_settings_are_followed(engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    plain_decoder(monkeypatch)
    monkeypatch.setattr(device_steps, "DeviceSteps", None)  # what plans on the device knows no rules
    fused, hf = engines
    options: dict[str, Any] = {"max_new_tokens": NEW, "batch_size": 2, "temperature": 0.0}
    for options["temperature"] in (0.0, 0.8):
        want = tokens_of(hf, PROMPTS, "ar", **options)
        assert {text[-1] for text in want} == {3}
        for way in WAYS:
            assert tokens_of(fused, PROMPTS, **{"mode": "self_spec", **way}, **options) == want, way


def test_stop_tokens_are_seen_in_time(engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    plain_decoder(monkeypatch)
    fused, hf = engines
    options: dict[str, Any] = {"max_new_tokens": NEW, "batch_size": 2, "original_settings": False}
    free = tokens_of(hf, PROMPTS, "ar", **options)
    stops = [free[0][3], free[1][0], free[2][NEW - 2]]
    want = [text[: min(text.index(t) for t in stops if t in text) + 1] for text in free]
    for way in WAYS:
        results = fused.generate(PROMPTS, **{"mode": "self_spec", **way}, stop_token_ids=stops, **options)
        assert [r.tokens for r in results] == want, way
        assert {r.finish_reason for r in results} == {"stop"}
