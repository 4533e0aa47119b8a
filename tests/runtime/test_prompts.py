"""Every form of a prompt gives the same tokens, conversations are continued, texts end before what they stop at."""

import json
from collections import UserList
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from commands import done
from decoding import Oracle, random_prompts, randomise, reference_greedy
from saved import save_artifact
from tiny_models import VOCABULARY, build
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from retrofit.adapters.layout import DraftLayout
from retrofit.runtime.engine import Engine
from retrofit.runtime.host import modes
from retrofit.runtime.prompts import encode, listed

PROMPTS = random_prompts((3, 9, 6), seed=2)
NEW = 12
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@lru_cache(maxsize=1)
def free_run() -> list[list[int]]:
    return reference_greedy(build("llama"), PROMPTS, NEW)


def end() -> int:
    """A token that the first text holds once, in its middle; the tokenizer calls it <end>, and special."""
    text = free_run()[0]
    return next(t for t in text[5:] if text.count(t) == 1)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Word by word: token n is `n.`, but for a few special ones."""
    taken = [t for t in range(10, VOCABULARY) if t not in free_run()[0]]
    special = {end(): "<end>", taken[0]: "<user>", taken[1]: "<assistant>", taken[2]: "<system>", taken[3]: "<pad>"}
    words = {special.get(n, f"{n}."): n for n in range(VOCABULARY)}
    inner = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<pad>"))
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(list(special.values()))
    inner.add_tokens([word for word in words if word not in special.values()])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, chat_template=TEMPLATE, pad_token="<pad>", clean_up_tokenization_spaces=False
    )


@pytest.fixture(scope="module")
def engine() -> Engine:
    return randomise(Engine.from_model(build("llama"), tokenizer(), layout=DraftLayout(block=4)))


def spelled(tokens: list[int]) -> str:
    return "".join("<end>" if t == end() else f"{t}." for t in tokens)


TEXTS = ["1.2.3.", "4.5.", "6.7.8.9."]
IDS = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]


def both_sides() -> dict[str, Any]:
    forms: dict[str, Any] = {}
    for side in ("left", "right"):
        made = tokenizer()
        made.padding_side = side
        for kind in ("pt", "np", None):
            forms[f"{side} {kind}"] = made(TEXTS, padding=True, return_tensors=kind)
    return forms


FORMS: dict[str, Any] = {
    "texts": TEXTS,
    "a tuple": tuple(TEXTS),
    "another sequence": UserList(TEXTS),
    "ids": IDS,
    "tuples of ids": tuple(map(tuple, IDS)),
    "numpy ids": [[np.int64(t) for t in ids] for ids in IDS],
    "arrays": [np.array(ids) for ids in IDS],
    "tensors": [torch.tensor(ids) for ids in IDS],
    "tensors of one row": [torch.tensor([ids]) for ids in IDS],
    "mixed": [TEXTS[0], IDS[1], torch.tensor(IDS[2])],
    "not padded": tokenizer()(TEXTS),
    "a plain mapping": {"input_ids": IDS},
    "a mapping of tensors": {"input_ids": [torch.tensor(ids) for ids in IDS]},
    **both_sides(),
}


@pytest.mark.parametrize("prompts", FORMS.values(), ids=FORMS)
def test_every_form_is_the_same_prompt(prompts: Any, engine: Engine) -> None:
    results = engine.generate(prompts, "ar", max_new_tokens=2)
    assert [r.prompt for r in results] == IDS
    assert [r.tokens for r in results] == [r.tokens for r in engine.generate(IDS, "ar", max_new_tokens=2)]


@pytest.mark.parametrize(
    "prompts",
    [
        [1, 2, 3],
        (1, 2, 3),
        range(1, 4),
        [np.int32(1), 2, 3],
        torch.tensor([1, 2, 3]),
        np.array([[1, 2, 3]]),
        tokenizer()("1.2.3."),
    ],
    ids=["list", "tuple", "range", "numpy", "tensor", "array of one row", "encoding"],
)
def test_one_prompts_ids_alone_are_one_prompt(prompts: Any, engine: Engine) -> None:
    assert [r.prompt for r in engine.generate(prompts, "ar", max_new_tokens=1)] == [[1, 2, 3]]


def test_a_tensor_without_a_mask_is_taken_whole() -> None:
    pad = tokenizer().pad_token_id
    assert listed(torch.tensor([[pad, 1], [2, pad]])) == [[pad, 1], [2, pad]]


# Conversations

HELLO = {"role": "user", "content": "1.2."}


def rendered(*messages: dict[str, str]) -> str:
    prompt = encode(list(messages), "prompt", tokenizer(), VOCABULARY)
    return "".join(tokenizer().convert_ids_to_tokens(prompt))


def test_messages_begin_the_assistants_turn() -> None:
    assert rendered(HELLO) == "<user>1.2.<end><assistant>"
    assert rendered({"role": "system", "content": "9."}, HELLO) == "<system>9.<end><user>1.2.<end><assistant>"


def test_a_last_message_of_the_assistants_is_continued(engine: Engine) -> None:
    begun = {"role": "assistant", "content": "3.4."}
    assert rendered(HELLO, begun) == "<user>1.2.<end><assistant>3.4."
    assert rendered(begun) == "<assistant>3.4."
    assert rendered(HELLO, begun, HELLO) == "<user>1.2.<end><assistant>3.4.<end><user>1.2.<end><assistant>"
    whole, plain = engine.generate([[HELLO, begun], "<user>1.2.<end><assistant>3.4."], max_new_tokens=6)
    assert (whole.prompt, whole.tokens) == (plain.prompt, plain.tokens)


def test_an_empty_message_of_the_assistants_is_its_turn_begun() -> None:
    assert rendered(HELLO, {"role": "assistant", "content": ""}) == "<user>1.2.<end><assistant>"


# Where a text stops

WAYS: list[dict[str, Any]] = [
    {"mode": "ar"},
    {"mode": "self_spec", "strategy": "two_forward"},
    {"mode": "self_spec", "strategy": "fused", "prepare": "all"},
]


def stopped(engine: Engine, way: dict[str, Any], **stop: Any) -> Any:
    """The result, after a look at its stream."""
    (result,) = engine.generate(PROMPTS[:1], max_new_tokens=NEW, **way, **stop)
    sent = ""
    for event in engine.stream(PROMPTS[:1], max_new_tokens=NEW, **way, **stop):
        sent += event.text
        assert result.text.startswith(sent)
    assert sent == result.text
    return result


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.get("strategy", way["mode"]))
def test_stop_strings_of_special_tokens(way: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_run()[0]
    monkeypatch.setattr(modes, "draft_tokens", Oracle({0: free}, mistakes=0.0))
    at = free.index(end())
    before, after = free[:at], free[at + 1]
    last = f"{before[-1]}."
    for stop, completes, text in (
        ("<end>", at + 1, spelled(before)),
        ("nd>", at + 1, spelled(before)),
        ("<e", at + 1, spelled(before)),
        (f"{last}<end>", at + 1, spelled(before[:-1])),
        (f".<end>{after}", at + 2, spelled(before)[:-1]),
        (f"<end>{after}.", at + 2, spelled(before)),
        (f"d>{after}", at + 2, spelled(before)),
        ([f"<end>{after}", ".<end>"], at + 1, spelled(before)[:-1]),
    ):
        result = stopped(engine, way, stop=stop)
        assert result.finish_reason == "stop", stop
        assert result.tokens == free[:completes], stop
        assert result.text == text, stop
    result = stopped(engine, way, stop="<end>never")
    assert (result.finish_reason, result.tokens) == ("length", free)
    assert result.text == spelled(free).replace("<end>", "")


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.get("strategy", way["mode"]))
def test_stop_strings_across_a_special_token(
    way: dict[str, Any], engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text without special tokens is what stop strings were always looked for in."""
    free = free_run()[0]
    monkeypatch.setattr(modes, "draft_tokens", Oracle({0: free}, mistakes=0.0))
    at = free.index(end())
    stop = spelled(free[at - 1 : at]) + spelled(free[at + 1 : at + 2])
    result = stopped(engine, way, stop=stop)
    assert (result.finish_reason, result.tokens, result.text) == ("stop", free[: at + 2], spelled(free[: at - 1]))


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.get("strategy", way["mode"]))
@pytest.mark.parametrize("place", [0, 3, "end"])
def test_stop_tokens(way: dict[str, Any], place: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_run()[0]
    monkeypatch.setattr(modes, "draft_tokens", Oracle({0: free}, mistakes=0.0))
    token = end() if place == "end" else free[place]
    first = free.index(token)
    never = next(t for t in range(VOCABULARY) if t not in free)
    for stop in (token, [never, token], np.array([token]), {token}):
        result = stopped(engine, way, stop_token_ids=stop)
        assert (result.finish_reason, result.tokens) == ("stop", free[: first + 1])
        assert result.text == spelled(free[:first])
        assert result.stats.tokens == first
    assert stopped(engine, way, stop_token_ids=never).finish_reason == "length"


def test_an_end_of_the_models_own_comes_first(engine: Engine) -> None:
    model = build("llama")
    model.generation_config.eos_token_id = end()
    (result,) = Engine.from_model(model, tokenizer()).generate(
        PROMPTS[:1], "ar", max_new_tokens=NEW, stop_token_ids=end(), stop="<end>"
    )
    assert (result.finish_reason, result.tokens[-1]) == ("stop", end())
    bare = Engine.from_model(build("llama")).generate(PROMPTS[:1], "ar", max_new_tokens=NEW, stop_token_ids=[end()])
    assert (bare[0].text, bare[0].finish_reason) == (None, "stop")


def test_stop_tokens_on_the_command_line(tmp_path: Path) -> None:
    base = tmp_path / "base"
    build("llama").save_pretrained(base)
    tokenizer().save_pretrained(base)
    made = save_artifact(tmp_path / "made", base)
    options = ["--json", "--max-new-tokens", NEW, "--mode", "ar"]
    free = json.loads(done("generate", made, "1.2.", *options))["tokens"]
    stop = ["--stop-token-id", free[4], "--stop-token-id", free[4]]
    found = json.loads(done("generate", made, "1.2.", *options, *stop))
    assert (found["tokens"], found["finish_reason"]) == (free[: free.index(free[4]) + 1], "stop")
