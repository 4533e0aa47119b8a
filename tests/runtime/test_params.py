"""Options of an output: one object, per call or per prompt; what they say, and what they cannot."""

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from decoding import random_prompts
from optioned import EOS, close, engine
from tiny_models import VOCABULARY, build
from transformers import GenerationConfig

import retrofit
from retrofit import SamplingParams, UsageError, hub
from retrofit.runtime import engine as retrofit_engine
from retrofit.runtime.engine import Engine
from retrofit.runtime.results import Result

PROMPTS = random_prompts((3, 6, 4), seed=8)
HOT = {"temperature": 1.2, "top_k": 30, "max_new_tokens": 8}


def tokens(results: list[Result]) -> list[list[int]]:
    return [r.tokens for r in results]


def test_an_object_and_keywords_say_the_same() -> None:
    params = SamplingParams(**HOT, seed=4, stop_token_ids=3, stop="9.")
    assert (params.stop, params.stop_token_ids) == (("9.",), (3,))
    by_object = engine().generate(PROMPTS, params)
    assert tokens(by_object) == tokens(engine().generate(PROMPTS, **HOT, seed=4, stop_token_ids=[3], stop=["9."]))
    assert tokens(by_object) == tokens(engine().generate(PROMPTS, params, "ar"))
    assert tokens(by_object) == tokens(engine().generate(PROMPTS, replace(params, seed=9), seed=4)), (
        "keywords stand over"
    )
    each = [replace(params, seed=4 + n) for n in range(3)]
    assert tokens(by_object) == tokens(engine().generate(PROMPTS, each)), "of one for all, prompt i has seed + i"
    assert tokens(by_object) == tokens(
        engine().generate(PROMPTS, "self_spec", seed=4, **HOT, stop="9.", stop_token_ids=3)
    )
    assert hash(params) == hash(replace(params))


@pytest.mark.parametrize(
    ("params", "keywords", "message"),
    [
        (3, {}, "params is 3"),
        ([SamplingParams()] * 2, {}, "2 params for 3 prompts"),
        (None, {"logit_bias": {VOCABULARY: 1.0}}, "logit_bias"),
        (SamplingParams(stop_token_ids=[VOCABULARY]), {}, "stop token id"),
        (SamplingParams(max_new_tokens=3), {"min_new_tokens": 4}, "min_new_tokens is 4"),
        (None, {"mode": "diffusion", "logprobs": 1}, "logprobs mean nothing in mode diffusion"),
    ],
)
def test_what_cannot_be_asked(params: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine().generate(PROMPTS, params, **keywords)


@pytest.mark.parametrize(
    ("params", "keywords", "message"),
    [
        (3, {}, "params is 3"),
        (None, {"max_new_tokens": 0}, "max_new_tokens is 0"),
        (None, {"max_new_tokens": "3"}, "max_new_tokens is '3'"),
        (None, {"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens is 9"),
        (None, {"seed": None}, "seed is None"),
        (None, {"mode": "diffusion", "logprobs": 1}, "logprobs mean nothing"),
    ],
)
def test_wrong_options_are_wrong_without_a_prompt(params: Any, keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        engine().stream([], params, **keywords)
    assert engine().generate([], max_new_tokens=[], seed=[]) == []


def test_more_outputs_than_memory_has_are_refused() -> None:
    with pytest.raises(UsageError, match="n is 16385; it must be a whole number from 1 to 16384"):
        engine().stream(PROMPTS, n=16385)


def test_a_keyword_that_does_not_exist() -> None:
    with pytest.raises(TypeError, match="max_tokens"):
        engine().generate(PROMPTS, max_tokens=3)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "options",
    [
        {"mode": "ar", "strategy": "auto"},
        {"mode": "ar", "prepare": "all"},
        {"mode": "diffusion", "tree": 0},
        {"mode": "diffusion", "strategy": "fused"},
        {"mode": "ar", "threshold": 0.9},
        {"threshold": 0.9},
        {"prepare": "all"},
        {"strategy": "two_forward", "prepare": 2},
        {"strategy": "prompt_lookup", "tree": 4},
        {"strategy": "hybrid", "prepare": "all"},
        {"strategy": "hybrid", "tree": 0},
        {"strategy": "fused", "prepare": "none"},
        {"strategy": "two_forward", "prepare": "none"},
        {"strategy": "fused", "prepare": "last", "tree": 4},
    ],
    ids=str,
)
def test_what_means_nothing_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="means nothing"):
        engine().generate(PROMPTS, max_new_tokens=2, **options)


CONFIGS: dict[str, tuple[GenerationConfig, dict[str, Any]]] = {
    "greedy": (GenerationConfig(max_new_tokens=7), {"max_new_tokens": 7}),
    "temperature without do_sample": (GenerationConfig(max_new_tokens=7, temperature=0.5), {"max_new_tokens": 7}),
    "sampled": (
        GenerationConfig(do_sample=True, max_new_tokens=7),
        {"temperature": 1.0, "top_k": 50, "max_new_tokens": 7},
    ),
    "warpers": (
        GenerationConfig(do_sample=True, temperature=0.7, top_k=0, top_p=0.8, min_p=0.1, max_new_tokens=7),
        {"temperature": 0.7, "top_p": 0.8, "min_p": 0.1, "max_new_tokens": 7},
    ),
    "rules": (
        GenerationConfig(repetition_penalty=1.5, min_new_tokens=6, max_new_tokens=9),
        {"repetition_penalty": 1.5, "min_new_tokens": 6, "max_new_tokens": 9},
    ),
    "bias": (
        GenerationConfig(sequence_bias={(3,): 5.0, (4,): -2.0}, max_new_tokens=7),
        {"logit_bias": {3: 5.0, 4: -2.0}, "max_new_tokens": 7},
    ),
    "outputs": (
        GenerationConfig(do_sample=True, num_return_sequences=2, stop_strings="1.", max_new_tokens=7),
        {"temperature": 1.0, "top_k": 50, "n": 2, "stop": "1.", "max_new_tokens": 7},
    ),
}


@pytest.mark.parametrize(("config", "options"), CONFIGS.values(), ids=CONFIGS)
def test_a_generation_config_is_its_options(config: GenerationConfig, options: dict[str, Any]) -> None:
    assert tokens(engine().generate(PROMPTS, config)) == tokens(engine().generate(PROMPTS, **options))


def test_a_generation_config_is_followed_as_generate_does() -> None:
    """Rules that no keyword has, and ends of its own."""
    model = build("llama")
    config = GenerationConfig(no_repeat_ngram_size=1, suppress_tokens=[1, 2, 3], eos_token_id=9, max_length=20)
    made = Engine.from_model(model)
    config.pad_token_id = 0
    want = [
        model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), generation_config=config)[0, len(p) :]
        for p in PROMPTS
    ]
    made_tokens = tokens(made.generate(PROMPTS, config))
    made.close()
    assert made_tokens == [w.tolist() for w in want]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GenerationConfig(num_beams=4), "num_beams=4"),
        (GenerationConfig(guidance_scale=1.5), "guidance_scale=1.5"),
        (GenerationConfig(do_sample=True, typical_p=0.5), "typical_p=0.5"),
        (GenerationConfig(sequence_bias={(1, 2): 1.0}), "sequence_bias"),
        (GenerationConfig(watermarking_config={"bias": 2.0}), "watermarking_config"),
    ],
    ids=["beams", "guidance", "typical", "sequences", "watermark"],
)
def test_what_a_generation_config_cannot_have_is_named(config: GenerationConfig, named: str) -> None:
    with pytest.raises(UsageError, match=named):
        engine().generate(PROMPTS, config)


@pytest.mark.parametrize("eos", ["x", ["a"], [1.5], True], ids=str)
def test_what_ends_a_generation_config_is_checked(eos: Any) -> None:
    config = GenerationConfig(max_new_tokens=2)
    config.eos_token_id = eos
    with pytest.raises(UsageError, match="eos_token_id is"):
        engine().generate(PROMPTS, config)


# Several outputs of one prompt


@pytest.mark.parametrize("batch", [1, 2, 7])
@pytest.mark.parametrize("mode", ["ar", "self_spec", "diffusion"])
def test_n_outputs_are_those_of_n_prompts_and_one_prefill(mode: str, batch: int) -> None:
    want = engine().generate([p for p in PROMPTS for _ in range(3)], mode, seed=5, batch_size=1, **HOT)
    got = engine().generate(PROMPTS, mode, n=3, seed=5, batch_size=batch, **HOT)
    assert [(r.index, r.sample) for r in got] == [(i, j) for i in range(3) for j in range(3)]
    assert tokens(got) == tokens(want)
    assert [r.stats.forwards.get("prefill", 0) for r in got] == [1, 0, 0] * 3
    own = engine().generate(PROMPTS, [SamplingParams(**HOT, n=3, seed=5 + 3 * i) for i in range(3)], mode)
    assert tokens(own) == tokens(want)


@pytest.mark.parametrize("exact", ["off", "bucket", "invariant"])
@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "phi3_longrope", "gemma3"])
def test_a_copied_prompt_is_a_prefilled_one_bit_for_bit(name: str, exact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = Engine.from_model(build(name), exact=exact)
    prompt = random_prompts((40,))[0]
    kept: list[list[torch.Tensor]] = []

    def look(run: Any, requests: Any) -> None:
        prefill(run, requests)
        for r in requests:
            part = run.cache.take_out(r.slot, 0, len(prompt))
            kept.append([tensor for pair in part.values() for tensor in pair])

    prefill = retrofit_engine.prefill_step
    monkeypatch.setattr(retrofit_engine, "prefill_step", look)
    made.generate([prompt], "ar", n=3, batch_size=2, max_new_tokens=3)
    made.generate([prompt], "ar", batch_size=2, max_new_tokens=3)
    made.close()
    assert len(kept) == 4
    for copy in kept[:3]:
        assert all(torch.equal(a, b) for a, b in zip(copy, kept[3], strict=True))


# Log-probabilities


def test_logprobs_are_log_softmax_of_the_models_logits() -> None:
    model = build("llama")
    made = Engine.from_model(model)
    options: dict[str, Any] = {"temperature": 1.5, "frequency_penalty": 1.0, "max_new_tokens": 6, "ignore_eos": True}
    (result,) = made.generate([PROMPTS[1]], logprobs=2, prompt_logprobs=0, **options)
    (plain,) = made.generate([PROMPTS[1]], **options)
    made.close()
    assert (plain.tokens, plain.logprobs, plain.prompt_logprobs) == (result.tokens, None, None)
    text = [*result.prompt, *result.tokens]
    with torch.no_grad():
        scores = model(torch.tensor([text])).logits[0].log_softmax(-1)
    assert result.logprobs is not None and result.prompt_logprobs is not None
    start = len(result.prompt)
    for n, told in enumerate(result.logprobs):
        best = scores[start + n - 1].topk(2)
        assert list(told) == list(dict.fromkeys([result.tokens[n], *best.indices.tolist()]))
        assert told[result.tokens[n]] == pytest.approx(float(scores[start + n - 1, result.tokens[n]]), abs=1e-4)
    assert result.prompt_logprobs[0] is None and len(result.prompt_logprobs) == start
    for n, told in enumerate(result.prompt_logprobs[1:]):
        assert told == {text[n + 1]: pytest.approx(float(scores[n, text[n + 1]]), abs=1e-4)}


def test_prompt_logprobs_of_a_prompt_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    (whole,) = engine().generate([list(range(20))], max_new_tokens=2, prompt_logprobs=3)
    made = engine()
    monkeypatch.setattr(made.backend, "prefill_rows", 6)
    pieces = made.generate([list(range(20))], max_new_tokens=2, prompt_logprobs=3, n=2)
    for result in pieces:
        assert result.tokens == whole.tokens and close(result.prompt_logprobs, whole.prompt_logprobs)


# Streams


def test_a_minimum_keeps_off_eos_and_stop_tokens() -> None:
    options: dict[str, Any] = {"max_new_tokens": 8, "logit_bias": {EOS: 40.0, 7: 45.0}}
    short = engine().generate(PROMPTS, stop_token_ids=7, **options)
    assert [(r.tokens, r.finish_reason, r.stop_reason) for r in short] == [([7], "stop", 7)] * 3
    longer = engine().generate(PROMPTS, stop_token_ids=7, min_new_tokens=4, **options)
    assert [(len(r.tokens), r.tokens[-1], r.stop_reason) for r in longer] == [(5, 7, 7)] * 3
    options["logit_bias"] = {EOS: 40.0}
    ended = engine().generate(PROMPTS, min_new_tokens=2, **options)
    assert [(len(r.tokens), r.finish_reason, r.stop_reason) for r in ended] == [(3, "stop", None)] * 3
    free = engine().generate(PROMPTS, ignore_eos=True, **options)
    assert tokens(free) == [[EOS] * 8] * 3


def test_a_minimum_under_an_eos_that_the_vocabulary_has_not() -> None:
    """Bases name such ones, and so may a GenerationConfig."""
    config = GenerationConfig(eos_token_id=[EOS, VOCABULARY + 3], max_new_tokens=8)
    options: dict[str, Any] = {"logit_bias": {EOS: 40.0}, "min_new_tokens": 3}
    assert [len(r.tokens) for r in engine().generate(PROMPTS, config, **options)] == [4] * 3


def test_a_minimum_lets_no_bad_word_through() -> None:
    """A stop token is kept off until the minimum is reached; the base's own ban on it holds after that, too."""
    config = GenerationConfig(bad_words_ids=[[7]], max_new_tokens=6)
    options: dict[str, Any] = {"logit_bias": {7: 45.0}, "stop_token_ids": 7}
    want = tokens(engine().generate(PROMPTS, config, **options))
    assert not any(7 in some for some in want)
    assert tokens(engine().generate(PROMPTS, config, **options, min_new_tokens=1)) == want


def test_presence_counts_once_and_frequency_each_time_in_the_output_only() -> None:
    """Token 9 is ahead by so much that its penalties decide when another is next."""
    options: dict[str, Any] = {"max_new_tokens": 8, "ignore_eos": True, "logit_bias": {9: 100.0, 11: 97.5}}
    plain, once, each_time = (
        engine().generate([[9, 9, 9, 9]], **options, **more)[0].tokens
        for more in ({}, {"presence_penalty": 2.0}, {"frequency_penalty": 2.0})
    )
    assert plain == [9] * 8
    assert once[0] == each_time[0] == 9, "a prompt is not counted"
    assert once.count(9) > each_time.count(9) and {*each_time} == {9, 11}


def test_device_auto_is_the_default_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    for function in (Engine.load, retrofit.convert, retrofit.certify):
        assert inspect.signature(function).parameters["device"].default == "auto"
    monkeypatch.undo()
    for there, device in ((True, "cuda"), (False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert hub.resolved_device("auto") == device
        assert hub.resolved_device("cuda:1") == "cuda:1"


# What the package exports


def test_the_public_names() -> None:
    for name in retrofit.__all__:
        assert getattr(retrofit, name) is not None
    errors = {name for name, kind in vars(retrofit.errors).items() if isinstance(kind, type)}
    assert errors <= set(retrofit.__all__)
    assert (Path(retrofit.__file__).parent / "py.typed").is_file()
