"""Prompts that need no file: what they are, that they are always the same, and who may name them."""

import random
import re
import sys
from collections import Counter
from itertools import combinations
from types import ModuleType, SimpleNamespace

import pytest
from text_sources import read

from retrofit.errors import ResourceError, UsageError
from retrofit.recipes.schema import Data
from retrofit.recipes.text.documents import documents
from retrofit.recipes.text.prompts import TASKS, _questions, everyday


def asked(source, tokenizer, part="all", **options):
    return read(source, tokenizer, part=part, responses="regenerate", **options)


def test_everyday_has_forty_of_each_category_and_none_twice():
    rows = everyday()
    assert set(Counter(row["category"] for row in rows).values()) == {40}
    assert len({row["category"] for row in rows}) == 10
    assert all(row["prompt"] == row["prompt"].strip() != "" for row in rows)
    words = [set(re.findall(r"\w+", row["prompt"].lower())) for row in rows]
    alike = [pair for pair in combinations(words, 2) if len(pair[0] & pair[1]) > 0.4 * len(pair[0] | pair[1])]
    assert alike == []


def test_everyday_is_put_as_a_users_message(chat_tokenizer):
    found = asked("prompts:everyday", chat_tokenizer)
    assert [document.id for document in found] == [f"everyday:{number}" for number in range(1, 401)]
    assert not any(any(document.response) for document in found)
    first = [{"role": "user", "content": everyday()[0]["prompt"]}]
    wanted = chat_tokenizer.apply_chat_template(first, add_generation_prompt=True)["input_ids"]
    assert list(found[0].tokens) == wanted
    (raw, *_) = asked("prompts:everyday", chat_tokenizer, ask="text")
    assert chat_tokenizer.decode(raw.tokens) == everyday()[0]["prompt"]


def test_without_a_template_a_prompt_is_the_beginning_of_a_text(tokenizer):
    (first, *_) = asked("prompts:everyday", tokenizer)
    assert list(first.tokens) == tokenizer(everyday()[0]["prompt"])["input_ids"]


def test_some_are_held_out(tokenizer):
    train, held = (asked("prompts:everyday", tokenizer, part=part, held_out=20) for part in ("train", "held_out"))
    assert (len(train), len(held)) == (380, 20)
    assert not {document.id for document in train} & {document.id for document in held}


@pytest.mark.parametrize(
    ("source", "options", "message", "hint"),
    [
        ("prompts:everyday", {}, "holds prompts without responses", "data.responses=regenerate"),
        ("prompts:evryday", {"responses": "regenerate"}, "did you mean `prompts:everyday`", "reasoning-gym"),
    ],
)
def test_what_cannot_be_asked_is_told(tokenizer, source, options, message, hint):
    with pytest.raises(UsageError, match=message) as caught:
        documents(Data(source=source, **options), tokenizer, part="train")
    assert hint in caught.value.hint


@pytest.fixture
def gym(monkeypatch):
    """A package of the same shape: every task's question tells its task, seed and number."""

    def create_dataset(name, size, seed):
        return [{"question": f"{name} {random.Random(seed + n).random():.9f}"} for n in range(size)]

    package, factory = ModuleType("reasoning_gym"), ModuleType("reasoning_gym.factory")
    package.create_dataset = create_dataset
    factory.DATASETS = dict.fromkeys([*TASKS, "composite", "acre"])
    _questions.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", package)
    monkeypatch.setitem(sys.modules, "reasoning_gym.factory", factory)


def texts(tokenizer, **options):
    return [tokenizer.decode(document.tokens) for document in asked("prompts:reasoning-gym", tokenizer, **options)]


def test_tasks_come_in_equal_shares_and_by_the_seed(gym, tokenizer):
    first = texts(tokenizer, prompts=7, tasks=["gcd", "lcm", "gcd"])
    assert [text.split()[0] for text in first] == ["gcd", "lcm"] * 3 + ["gcd"]
    assert len(set(first)) == 7
    assert texts(tokenizer, prompts=7, tasks=["gcd", "lcm"]) == first
    assert texts(tokenizer, prompts=4, tasks=["gcd", "lcm"]) == first[:4]
    assert not set(texts(tokenizer, prompts=7, tasks=["gcd", "lcm"], data_seed=9)) & set(first)
    assert [text.split()[0] for text in texts(tokenizer, prompts=60)] == [*TASKS, *TASKS[:10]]
    assert len(texts(tokenizer, prompts=3)) == 3, "fewer prompts than tasks"


@pytest.mark.parametrize("name", ["gdc", "composite"])
def test_a_task_that_does_not_exist_is_told(gym, tokenizer, name):
    with pytest.raises(UsageError, match=f"has no task `{name}`") as caught:
        texts(tokenizer, tasks=[name])
    assert "word_ladder" in caught.value.hint and "composite" not in caught.value.hint


def test_without_the_package(tokenizer, monkeypatch):
    _questions.cache_clear()
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ResourceError, match="made by the package `reasoning-gym`") as caught:
        texts(tokenizer)
    assert "retrofit-lm[reasoning-gym]" in caught.value.hint


def test_the_real_package_makes_the_tasks_named_here_always_alike(tokenizer):
    pytest.importorskip("reasoning_gym")
    _questions.cache_clear()
    first = texts(tokenizer, prompts=len(TASKS))
    assert texts(tokenizer, prompts=len(TASKS)) == first and len(set(first)) == len(TASKS)


def test_any_object_with_the_fields_will_do(tokenizer):
    keys = {"split": "train", "field": None, "held_out": 0, "template": {}, "responses": "regenerate", "ask": "text"}
    section = SimpleNamespace(source="prompts:everyday", **keys)
    assert next(documents(section, tokenizer, part="all")).id == "everyday:1"
