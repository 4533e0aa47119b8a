"""A base's own settings, and stop tokens, on the fused backend: planned on the host, or seen by the host in time."""

from typing import Any

import pytest
import torch
from decoding import random_prompts, tokens_of
from fused_models import VOCABULARY, WIDE, pair, plain_decoder, small
from transformers import GenerationConfig

from retrofit import SamplingParams
from retrofit.adapters.rows import SequenceRows
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


def test_options_of_each_prompt_are_followed(engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Different ones in one batch, two outputs of one prompt, log-probabilities: planned on the host."""
    plain_decoder(monkeypatch)
    monkeypatch.setattr(device_steps, "DeviceSteps", None)
    fused, hf = engines
    params = [
        SamplingParams(temperature=0.8, n=2, seed=3, frequency_penalty=1.0, logprobs=1, max_new_tokens=NEW),
        SamplingParams(logit_bias={2: 3.0}, presence_penalty=-1.0, max_new_tokens=NEW, min_new_tokens=3),
        SamplingParams(
            temperature=1.2, min_p=0.1, seed=5, repetition_penalty=1.4, prompt_logprobs=1, max_new_tokens=NEW
        ),
    ]
    want = hf.generate(PROMPTS, params, "ar", batch_size=1)
    for way in WAYS:
        got = fused.generate(PROMPTS, params, batch_size=3, **way)
        assert [r.tokens for r in got] == [r.tokens for r in want], way
        for mine, other in zip(got, want, strict=True):
            for told, known in ((mine.logprobs, other.logprobs), (mine.prompt_logprobs, other.prompt_logprobs)):
                assert (told is None) == (known is None)
                for a, b in zip(told or (), known or (), strict=True):
                    assert (a is None and b is None) or a == pytest.approx(b, abs=1e-3)


def test_outputs_of_one_prompt_share_its_pages(engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Planned on the device, as the options allow; a copy of the pages is a prefill, bit for bit."""
    plain_decoder(monkeypatch)
    fused, hf = engines
    options: dict[str, Any] = {"temperature": 0.8, "max_new_tokens": NEW, "original_settings": False, "n": 3}
    want = tokens_of(hf, PROMPTS[:2], "ar", batch_size=1, **options)
    for way in WAYS:
        results = fused.generate(PROMPTS[:2], batch_size=2, **way, **options)
        assert [r.tokens for r in results] == want, way
        assert [r.stats.forwards.get("prefill", 0) for r in results] == [1, 0, 0, 1, 0, 0]
    cache = fused.backend.new_cache(3, 40)
    for slot, prompt in enumerate((PROMPTS[0], PROMPTS[0])):
        cache.open(slot, 40)
        rows = SequenceRows(slot, 0, prompt, last_logits_only=True)
        fused.backend.forward(fused.backend.row_plan([rows]), cache)
    cache.open(2, 40)
    cache.put_in(2, 0, [cache.take_out(0, 0, len(PROMPTS[0]))])
    first, own, copy = (cache.take_out(slot, 0, len(PROMPTS[0])) for slot in range(3))
    cache.release()
    for a, b, c in zip(first, own, copy, strict=True):
        count = len(PROMPTS[0])
        flat = [t.transpose(2, 3).flatten(1, 2)[:, :count] for t in (a, b, c)]
        assert torch.equal(flat[0], flat[1]) and torch.equal(flat[0], flat[2])


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


def test_ends_that_are_not_the_models_are_planned_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device ends a text at the model's own EOS, and nowhere else."""
    plain_decoder(monkeypatch)
    free = tokens_of(pair(small("llama", num_hidden_layers=1), WIDE)[1], PROMPTS, "ar", max_new_tokens=NEW)
    fused, hf = pair(small("llama", eos=[free[0][2], free[1][3]], num_hidden_layers=1), WIDE)
    assert fused.backend.eos == {free[0][2], free[1][3]}
    options: dict[str, Any] = {"batch_size": 2, "original_settings": False}
    for params in (
        GenerationConfig(eos_token_id=free[2][4], max_new_tokens=NEW),
        [SamplingParams(ignore_eos=n != 1, max_new_tokens=NEW) for n in range(3)],
    ):
        want = [r.tokens for r in hf.generate(PROMPTS, params, "ar", **options)]
        assert len({len(text) for text in want}) > 1
        for way in WAYS[:2]:
            assert [r.tokens for r in fused.generate(PROMPTS, params, **way, **options)] == want, way


@pytest.mark.parametrize("what", ["temperatures", "logprobs"])
def test_what_the_device_cannot_tell_apart_or_tell_is_planned_on_the_host(
    what: str, engines: tuple[Engine, Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each alone: nothing else about these requests keeps them off the device."""
    plain_decoder(monkeypatch)
    fused, hf = engines
    heats, told = ((0.0, 0.9, 1.3), None) if what == "temperatures" else ((0.0, 0.0, 0.0), 1)
    params = [SamplingParams(temperature=heat, logprobs=told, max_new_tokens=NEW) for heat in heats]
    want = hf.generate(PROMPTS, params, "ar", batch_size=1, original_settings=False)
    for way in WAYS[:2]:
        got = fused.generate(PROMPTS, params, batch_size=3, original_settings=False, **way)
        assert [r.tokens for r in got] == [r.tokens for r in want], way
        if told is not None:
            assert [len(r.logprobs or ()) for r in got] == [len(r.tokens) for r in want], way
