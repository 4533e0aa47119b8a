"""A base's own generation settings: followed as transformers' `generate` follows them, at any strategy, or named."""

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import done, run
from decoding import Oracle, random_prompts, randomise, tokens_of
from saved import save_artifact, save_base
from tiny_models import CONTEXT, VOCABULARY, build
from transformers import GenerationConfig, PreTrainedModel

from retrofit.adapters.layout import DraftLayout
from retrofit.errors import UnsupportedModelError, UsageError
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import drafting, modes
from retrofit.runtime.loading import text_config
from retrofit.runtime.rules.processors import Guard, Rules
from retrofit.runtime.settings import DEFAULT_NEW_TOKENS, folder_settings, read_settings

NEW = 12
LENGTHS = (1, 9, 20, CONTEXT - 6)
SEEDS = (11, 12, 13, 14)
WAYS: dict[str, dict[str, Any]] = {
    "ar": {"mode": "ar"},
    "two_forward": {"strategy": "two_forward"},
    "fused": {"strategy": "fused", "tree": 0},
    "last": {"strategy": "fused", "prepare": "last"},
    "tree": {"strategy": "fused", "tree": 9},
    "auto": {"strategy": "auto"},
    "prompt_lookup": {"strategy": "prompt_lookup"},
    "hybrid": {"strategy": "hybrid"},
    "in_turn": {"strategy": "hybrid", "prepare": "none"},
}
PROMPTS = random_prompts(LENGTHS)


def with_settings(**settings: Any) -> PreTrainedModel:
    model = build("llama")
    model.generation_config = GenerationConfig(pad_token_id=0, **settings)
    return model


def generated(model: PreTrainedModel, new: int | None = NEW) -> list[list[int]]:
    """What transformers' own greedy decoding says under the model's own settings; our texts end with the context."""
    texts = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        more = {} if new is None else {"max_new_tokens": new}
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=model.generation_config, do_sample=False, **more
        )
        texts.append(out[0, len(prompt) : CONTEXT].tolist())
    return texts


@cache
def free_run() -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, generated(with_settings())))


def cases() -> dict[str, dict[str, Any]]:
    """Settings that bite: they forbid what the model would have said."""
    free = free_run()
    eos = [free[0][2], free[1][3], free[2][0], free[3][1]]
    pairs = [list(text[i : i + 2]) for text in free for i in range(1, len(text) - 1, 3)]
    words = [[free[1][0]], [eos[0]], *pairs, list(free[0][0:3]), list(free[3][2:5])]
    return {
        "penalty": {"repetition_penalty": 1.7},
        "reward": {"repetition_penalty": 0.6},
        "no token twice": {"no_repeat_ngram_size": 1},
        "no pair twice": {"no_repeat_ngram_size": 2},
        "suppressed": {"suppress_tokens": [t for text in free for t in text[:5]] + [VOCABULARY + 9]},
        "suppressed first": {"begin_suppress_tokens": [text[0] for text in free]},
        "bad words": {"bad_words_ids": words},
        "bad words and an end": {"bad_words_ids": words, "eos_token_id": eos[0]},
        "begins with": {"forced_bos_token_id": 7, "begin_suppress_tokens": [free[0][1], free[1][0]]},
        "ends with": {"forced_eos_token_id": 9, "eos_token_id": 9},
        "ends with one of": {"forced_eos_token_id": [17, 9]},
        "ends with one of, one suppressed": {"forced_eos_token_id": [9, 17], "suppress_tokens": [9]},
        "at least so many": {"min_length": 12, "eos_token_id": eos},
        "at least so many new": {"min_length": 3, "min_new_tokens": 6, "eos_token_id": eos},
        "all": {
            "repetition_penalty": 1.2,
            "no_repeat_ngram_size": 3,
            "bad_words_ids": words,
            "min_new_tokens": 4,
            "eos_token_id": eos,
            "forced_bos_token_id": 5,
            "forced_eos_token_id": eos[:1],
            "suppress_tokens": [1, 2, 3],
            "begin_suppress_tokens": [4, 5, 6],
        },
    }


CASES = cases()


@cache
def greedy_reference(name: str) -> list[list[int]]:
    return generated(with_settings(**CASES[name]))


@cache
def engine_with(name: str, block: int = 4) -> Engine:
    return randomise(Engine.from_model(with_settings(**CASES[name]), layout=DraftLayout(block=block)))


def decoded(name: str, way: str, batch: int, **options: Any) -> list[list[int]]:
    options = {"mode": "self_spec", **WAYS[way], "max_new_tokens": NEW, "seed": SEEDS, "batch_size": batch, **options}
    return tokens_of(engine_with(name), PROMPTS, **options)


@pytest.mark.usefixtures("restless_auto")
@pytest.mark.parametrize("name", CASES)
def test_greedy_is_generate_under_the_same_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    want = greedy_reference(name)
    assert want != [list(text) for text in free_run()]
    oracle = Oracle(dict(zip(SEEDS, want, strict=True)))
    for way, batch in (("ar", 1), ("ar", 3), ("two_forward", 3), ("tree", 3), ("hybrid", 3)):
        assert decoded(name, way, batch) == want, ("own drafts", way)
    oracle.plant(monkeypatch)
    for way, batch in (("two_forward", 3), ("fused", 1), ("last", 3), ("tree", 1), ("tree", 3), ("auto", 3)):
        assert decoded(name, way, batch) == want, ("good drafts", way)
    assert oracle.drafted > 0


@pytest.mark.usefixtures("restless_auto")
@pytest.mark.parametrize("name", ["penalty", "no pair twice", "bad words", "at least so many", "ends with", "all"])
def test_sampled_self_spec_is_ar_under_settings(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampled: dict[str, Any] = {"temperature": 0.8, "top_k": 24}
    want = decoded(name, "ar", 1, **sampled)
    for way, batch in (("ar", 3), ("fused", 3), ("tree", 1)):
        assert decoded(name, way, batch, **sampled) == want, ("own drafts", way)
    Oracle(dict(zip(SEEDS, want, strict=True))).plant(monkeypatch)
    for way, batch in (("two_forward", 3), ("tree", 3), ("hybrid", 3), ("auto", 1)):
        assert decoded(name, way, batch, **sampled) == want, ("good drafts", way)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_diffusion_keeps_to_what_is_suppressed(threshold: float) -> None:
    options: dict[str, Any] = {"max_new_tokens": NEW, "threshold": threshold, "temperature": 0.0}
    engine = engine_with("suppressed")
    assert not set(CASES["suppressed"]["suppress_tokens"]) & {
        t for text in tokens_of(engine, PROMPTS, "diffusion", **options) for t in text
    }
    assert len(tokens_of(engine_with("all"), PROMPTS, "diffusion", **options)) == 4


# What the comparison must catch


class Fault:
    @staticmethod
    def looks_at_the_committed_text_only(patch: pytest.MonkeyPatch) -> None:
        banned = Guard.banned
        patch.setattr(Guard, "banned", lambda guard, path: banned(guard, []))

    @staticmethod
    def takes_a_tree_for_a_chain(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(modes, "_row_paths", lambda row: [list(row.tokens[1 : j + 1]) for j in range(len(row.tokens))])

    @staticmethod
    def forces_nothing(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Guard, "forced", lambda guard, path: ())

    @staticmethod
    def forgets_the_first_token(patch: pytest.MonkeyPatch) -> None:
        right = modes._constrain
        patch.setattr(modes, "_constrain", lambda owners, paths: None if not any(paths or ()) else right(owners, paths))


@pytest.mark.parametrize(
    ("fault", "name", "way"),
    [
        ("looks_at_the_committed_text_only", "no token twice", "fused"),
        ("looks_at_the_committed_text_only", "bad words", "two_forward"),
        ("looks_at_the_committed_text_only", "at least so many", "two_forward"),
        ("takes_a_tree_for_a_chain", "no token twice", "tree"),
        ("forces_nothing", "ends with", "fused"),
        ("forgets_the_first_token", "suppressed first", "ar"),
    ],
)
def test_planted_faults_are_caught(fault: str, name: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modes, "draft_tokens", Oracle(dict(zip(SEEDS, greedy_reference(name), strict=True))))
    getattr(Fault, fault)(monkeypatch)
    assert decoded(name, way, 3) != greedy_reference(name)


# What the caller says


def test_the_callers_penalty_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    free = [list(text) for text in free_run()]
    assert decoded("penalty", "fused", 3, repetition_penalty=1.0) == free
    assert decoded("penalty", "fused", 3, repetition_penalty=0.6) == greedy_reference("reward")


@pytest.mark.parametrize("name", ["penalty", "all", "no pair twice"])
def test_original_settings_can_be_left_out(name: str) -> None:
    free = [list(text) for text in free_run()]
    assert decoded(name, "two_forward", 3, original_settings=False, ignore_eos=True) == free
    with pytest.raises(UsageError, match="original_settings is 'no'; it must be True or False"):
        decoded(name, "ar", 1, original_settings="no")


def test_without_an_end_no_least_length_holds() -> None:
    assert decoded("at least so many", "fused", 3, ignore_eos=True) == [list(text) for text in free_run()]


@pytest.mark.parametrize(
    ("settings", "new"),
    [({"max_new_tokens": 5}, 5), ({"max_new_tokens": 5, "max_length": 3}, 5), ({"max_length": 30}, None)],
)
@pytest.mark.filterwarnings("ignore")
def test_the_length_is_the_bases_where_nobody_asks(settings: dict[str, Any], new: int | None) -> None:
    model = with_settings(**settings, forced_eos_token_id=9)
    engine = Engine.from_model(model, layout=DraftLayout(block=4))
    texts = engine.generate(PROMPTS[:3], batch_size=2)
    want = []
    for prompt in PROMPTS[:3]:
        ids = torch.tensor([prompt])
        want.append(model.generate(ids, attention_mask=torch.ones_like(ids))[0, len(prompt) :].tolist())
    assert [r.tokens for r in texts] == want
    assert [len(r.tokens) for r in texts] == [new or 30 - len(prompt) for prompt in PROMPTS[:3]]
    assert tokens_of(engine, PROMPTS[:1], "ar", max_new_tokens=[2])[0][-1] == 9
    if new is None:
        with pytest.raises(UsageError, match=r"prompt 0 has 122 tokens; .* allow 30 with the output \(max_length\)"):
            engine.generate(PROMPTS[3:])
    assert len(engine.generate([[1]], original_settings=False)[0].tokens) == CONTEXT - 1 < DEFAULT_NEW_TOKENS


# What is not followed is named


def test_settings_that_are_not_followed_are_named() -> None:
    model = build("llama")
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, typical_p=1.0, num_beams=4, guidance_scale=1.5,
        sequence_bias=[[[3], 2.0]], renormalize_logits=True, use_cache=True, pad_token_id=0, penalty_alpha=0.6,
        stop_strings=["\n\n"], bad_words_ids=[[VOCABULARY]], no_repeat_ngram_size=2.5, repetition_penalty=1.5,
        house_rule="x" * 99, encoder_repetition_penalty=1.0,
    )  # fmt: skip
    named = {setting.partition("=")[0] for setting in Engine.from_model(model).not_honoured}
    assert named == {
        *("min_p", "num_beams", "guidance_scale", "sequence_bias", "renormalize_logits", "penalty_alpha"),
        *("stop_strings", "bad_words_ids", "no_repeat_ngram_size", "house_rule"),
    }


def test_usual_settings_are_named_by_nobody() -> None:
    assert read_settings(build("llama").generation_config, frozenset([2]), VOCABULARY).not_honoured == ()
    usual = GenerationConfig(
        bos_token_id=1, eos_token_id=[2, 3], pad_token_id=2, do_sample=True, temperature=0.7, top_p=0.8, top_k=20,
        repetition_penalty=1.05, max_length=4096, transformers_version="4.40",
    )  # fmt: skip
    settings = read_settings(usual, frozenset([2, 3]), VOCABULARY)
    assert settings.not_honoured == ()
    assert (settings.repetition_penalty, settings.max_length, settings.rules.active) == (1.05, 4096, False)


def test_an_end_that_generate_would_not_see_is_named() -> None:
    settings = read_settings(GenerationConfig(do_sample=True), frozenset([2]), VOCABULARY)
    assert settings.not_honoured == ("eos_token_id=None (the model's own ends a text: 2)",)


def test_a_folder_says_what_its_model_says(tmp_path: Path) -> None:
    model = build("llama", eos_token_id=5)
    model.save_pretrained(tmp_path)
    file = tmp_path / "generation_config.json"
    for content in (None, {"eos_token_id": 6, "suppress_tokens": [3], "repetition_penalty": 1.3, "num_beams": 3}):
        if content is not None:
            file.write_text(json.dumps(content))
        live = type(model).from_pretrained(tmp_path)
        config = text_config(tmp_path)
        wanted = Engine.from_model(live).backend
        assert folder_settings(tmp_path, config, frozenset([config.eos_token_id])) == wanted.settings
    file.write_text('{"forced_eos_token_id": 3, "suppress_tokens": [3]}')
    with pytest.raises(UnsupportedModelError, match=r"generation_config.json: .*suppress"):
        text_config(tmp_path)
    file.write_text("{ no JSON")
    assert text_config(tmp_path).eos_token_id == 5
    file.unlink()
    assert folder_settings(tmp_path, text_config(tmp_path), frozenset([5])).rules == Rules(eos=(5,))


def test_rules_that_forbid_nothing_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "constrained", None)
    monkeypatch.setattr(modes, "constrained", None)
    monkeypatch.setattr(modes, "_row_paths", None)
    engine = Engine.from_model(with_settings(repetition_penalty=1.1, eos_token_id=[1]), layout=DraftLayout(block=4))
    assert engine.generate(PROMPTS[:1], strategy="fused", max_new_tokens=4)


# The command line


@pytest.fixture(scope="module")
def artifact_of_a_strict_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strict")
    base = save_base(folder / "base")
    settings = {"suppress_tokens": list(range(0, VOCABULARY, 2)), "max_new_tokens": 7, "num_beams": 4}
    (base / "generation_config.json").write_text(json.dumps(settings))
    return save_artifact(folder / "artifact", base)


@pytest.mark.parametrize("mode", ["ar", "self_spec"])
def test_the_command_line_follows_the_original(mode: str, artifact_of_a_strict_base: Path) -> None:
    made = ("generate", artifact_of_a_strict_base, "def area", "--json", "--mode", mode)
    result = run(*made, RETROFIT_DEVICE="cpu")
    assert result.exit_code == 0, result.stderr
    tokens = json.loads(result.stdout)["tokens"]
    assert len(tokens) == 7 and all(token % 2 for token in tokens)
    notes = [line for line in result.stderr.splitlines() if "note" in line]
    assert notes == ["note: of the base's generation_config num_beams=4 is not followed"]
    assert run(*made, "-q").stderr == ""
    free = json.loads(done(*made, "--no-original-settings", "--max-new-tokens", 7))["tokens"]
    assert not all(token % 2 for token in free)
