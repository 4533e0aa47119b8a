"""Conversations and prompts alone that the base answers: trained on exactly as they were asked, and as a chat asks."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import SHORT, done
from saved import save_base
from text_sources import write_lines
from tiny_models import VOCABULARY, build
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from retrofit.adapters.layout import DraftLayout
from retrofit.recipes.schema import Data
from retrofit.recipes.text.documents import Document, documents
from retrofit.recipes.text.regenerate import ResponseCache, regenerate
from retrofit.recipes.text.rewriting import NEW_TOKENS
from retrofit.recipes.text.sources import stable_hash
from retrofit.recipes.text.windows import windows
from retrofit.runtime import prompts
from retrofit.runtime.engine import Engine

pytestmark = pytest.mark.usefixtures("somewhere")

CHARACTERS = "?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 :;,.+-*/()[]"
SAID = "{{ m.role }}:{{ m.content }}{{ END if m.role == 'assistant' else ';' }}"
KEEPS = "{% for m in messages %}" + SAID + "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
DROPS = "{% for m in messages %}" + SAID.replace("m.content", "m.content[:2]") + "{% endfor %}"
DROPS += "{% if add_generation_prompt %}assistant:{{ '' if fast is defined and fast else '()' }}{% endif %}"
ASK = {"role": "user", "content": "abc"}
TALK = [ASK, {"role": "assistant", "content": "fgh"}, {"role": "user", "content": "de"}]
LIMITS = {"temperature": 0.8, "seed": 5, "max_length": 120}


@pytest.fixture
def engine() -> Engine:
    """Its tokenizer has a token for each character, so any text it writes is the same tokens again."""
    known = {character: number for number, character in enumerate(CHARACTERS[:VOCABULARY])}
    plain = Tokenizer(models.WordLevel(known, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    plain.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, unk_token="?", chat_template=KEEPS, clean_up_tokenization_spaces=False
    )
    return Engine.from_model(build("llama"), tokenizer, layout=DraftLayout(4))


@pytest.fixture
def ending(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Sets a template whose turns end with the third token that the base writes to the first question."""

    def use(template: str) -> None:
        engine.tokenizer.chat_template = template.replace("END", "'?'")
        draw = stable_hash("5 talk") % (1 << 31)
        (found,) = engine.generate([[ASK]], "ar", temperature=0.8, seed=draw, max_new_tokens=3)
        end = engine.tokenizer.decode([found.tokens[2]])
        engine.tokenizer.chat_template = template.replace("END", f"'{end}'")
        monkeypatch.setattr(engine.backend, "eos", frozenset([found.tokens[2]]))

    return use


def read(engine: Engine, folder: Path, *rows: Any, **keys: Any) -> list[Document]:
    """The rows as training would read them; the first has the id `talk`."""
    path = write_lines(folder / "rows.jsonl", *rows)
    data = Data(source=str(path), responses="regenerate", held_out=0, **keys)
    found = list(windows(documents(data, engine.tokenizer, part="all"), data.max_length, data.lengths))
    names = {f"rows.jsonl:{number}#0": "talk" if number == 1 else f"talk {number}" for number in range(1, 9)}
    return [Document(names[d.id], d.tokens, d.response, d.source, d.where, d.chat) for d in found]


def written(engine: Engine, found: list[Document], monkeypatch: pytest.MonkeyPatch, **options: Any) -> tuple[Any, Any]:
    """What the base makes of documents, and what it was asked."""
    asked: list[list[int]] = []
    stream = Engine.stream

    def noted(self: Engine, given: Any, *arguments: Any, **keywords: Any) -> Any:
        asked.extend(given)
        return stream(self, given, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "stream", noted)
        return list(regenerate(found, engine, **{**LIMITS, **options})), asked


def runs(document: Document) -> list[tuple[list[int], list[int]]]:
    """Of each response, what stood before it, and itself."""
    flags = [*document.response, False]
    ends = [place for place in range(1, len(flags)) if flags[place - 1] and not flags[place]]
    starts = [place for place in range(len(flags)) if flags[place] and not (place and flags[place - 1])]
    return [(list(document.tokens[:a]), list(document.tokens[a:b])) for a, b in zip(starts, ends, strict=True)]


def as_a_chat_asks(engine: Engine, messages: list[dict[str, str]], **arguments: Any) -> list[int]:
    return prompts.encode(messages, "prompt", engine.tokenizer, VOCABULARY, arguments)


@pytest.mark.parametrize("limit", [None, 7, 500])
def test_a_prompt_alone_is_answered_as_a_chat_answers_it(engine, tmp_path, monkeypatch, limit):
    rows = [{"prompt": "abc"}, {"messages": [ASK]}, {"instruction": "abc"}]
    found, asked = written(engine, read(engine, tmp_path, *rows), monkeypatch, max_new_tokens=limit)
    assert len(found) == 3 and asked == [as_a_chat_asks(engine, [ASK])] * 3
    for document, name in zip(found, ["talk", "talk 2", "talk 3"], strict=True):
        ((prompt, response),) = runs(document)
        assert prompt == asked[0] and document.id == name and document.chat is None
        assert len(response) == min(limit or NEW_TOKENS, 120 - len(prompt))
        want = engine.generate(
            [[ASK]], "ar", temperature=0.8, seed=[stable_hash(f"5 {name}") % (1 << 31)], max_new_tokens=len(response)
        )
        assert response == want[0].tokens


@pytest.mark.parametrize(("template", "parts"), [(KEEPS, 1), (DROPS, 2)], ids=["keeps", "drops"])
def test_what_is_trained_on_begins_with_exactly_what_was_asked(engine, tmp_path, monkeypatch, ending, template, parts):
    ending(template)
    found, asked = written(engine, read(engine, tmp_path, {"messages": TALK}), monkeypatch, max_new_tokens=9)
    assert len(found) == parts and len(asked) == 2
    turns = [turn for document in found for turn in runs(document)]
    assert [prompt for prompt, _ in turns] == asked
    said = engine.tokenizer.decode(turns[0][1][:-1])
    assert asked[0] == as_a_chat_asks(engine, [ASK])
    assert asked[1] == as_a_chat_asks(engine, [ASK, {"role": "assistant", "content": said}, TALK[2]])
    assert [document.id for document in found] == ["talk", "talk part 2"][:parts]


def test_arguments_of_the_template_are_those_of_the_recipe(engine, tmp_path, monkeypatch):
    engine.tokenizer.chat_template = DROPS.replace("END", "'.'")
    rows = [{"messages": [ASK]}] * 8
    _, asked = written(engine, read(engine, tmp_path, *rows, template={"fast": [True, False]}), monkeypatch)
    fast, slow = (as_a_chat_asks(engine, [ASK], fast=value) for value in (True, False))
    assert fast != slow and {tuple(one) for one in asked} == {tuple(fast), tuple(slow)}


def test_nothing_follows_an_answer_that_is_cut(engine, tmp_path, monkeypatch, ending):
    ending(KEEPS)
    found, asked = written(engine, read(engine, tmp_path, {"messages": TALK}), monkeypatch, max_new_tokens=2)
    assert len(asked) == 1 and len(runs(found[0])[0][1]) == 2


@pytest.mark.parametrize("role", ["tool", "assistant"])
def test_nothing_follows_an_answer_that_the_rest_does_not_fit(engine, tmp_path, monkeypatch, ending, role):
    ending(KEEPS)
    talk = [*TALK[:2], {"role": role, "content": "3"}, TALK[2]]
    _, asked = written(engine, read(engine, tmp_path, {"messages": talk}), monkeypatch, max_new_tokens=9)
    assert len(asked) == 1


def test_answers_are_as_long_as_the_rows_own_unless_the_recipe_says_more(engine, tmp_path, monkeypatch):
    (document,) = read(engine, tmp_path, {"messages": TALK[:2]})
    (own,), _ = written(engine, [document], monkeypatch)
    assert len(own.tokens) == len(document.tokens)
    (more,), _ = written(engine, [document], monkeypatch, max_new_tokens=40)
    assert len(runs(more)[0][1]) == 40


def test_a_prompt_that_leaves_no_room_is_left_out(engine, tmp_path, monkeypatch):
    found = read(engine, tmp_path, {"prompt": "a" * 200}, {"prompt": "abc"}, max_length=64)
    new, asked = written(engine, found, monkeypatch, max_length=64)
    assert len(new) == len(asked) == 1 and new[0].id == "talk 2"
    assert len(new[0].tokens) == 64


def test_answers_are_kept(engine, tmp_path, monkeypatch, ending):
    ending(DROPS)
    found = read(engine, tmp_path, {"messages": TALK}, {"prompt": "abc"})
    first, asked = written(engine, found, monkeypatch, cache=ResponseCache("base", 0.8, folder=tmp_path))
    again, nothing = written(engine, found, monkeypatch, cache=ResponseCache("base", 0.8, folder=tmp_path))
    assert again == first and len(asked) == 3 and nothing == []


def test_a_conversion_of_prompts_alone(tmp_path):
    base = save_base(tmp_path / "base", template=KEEPS.replace("END", "';'"))
    path = write_lines(tmp_path / "asks.jsonl", *[{"prompt": f"def area {number}"} for number in range(8)])
    keys = [*SHORT, f"data.source={path}", "data.responses=regenerate", "data.max_new_tokens=12", "data.max_length=64"]
    done("convert", base, *keys, "-o", "out", RETROFIT_CACHE=str(tmp_path / "cache"))
    kept = [json.loads(line) for file in (tmp_path / "cache").rglob("*.jsonl") for line in file.open()]
    assert kept and all(1 <= len(entry["tokens"]) <= 12 for entry in kept)
    shown = json.loads(done("data", "stats", path, "--model", base, "data.responses=regenerate", "--json"))
    assert shown["to_answer"] == shown["windows"] == 8 and shown["response_tokens"] == 0
