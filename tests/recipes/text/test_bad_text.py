"""Bad text and a Hub that fails: file and line are named before anything is read."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
from text_sources import MESSAGES, fake_datasets, read, write_lines

from retrofit.errors import DataError, ResourceError, UsageError
from retrofit.recipes.schema import Data
from retrofit.recipes.text.documents import documents

# bad input

GOOD = {"text": "good"}
BAD_ROWS = {
    "not_json": ("{text: 1}", "not valid JSON"),
    "cut_off": ('{"text": "a', "not valid JSON"),
    "huge_number": ('{"text": ' + "1" * 5000 + "}", "not valid JSON"),
    "deep": ("[" * 100_000, "not valid JSON"),
    "no_object": ("[1, 2]", "must be a JSON object, not list"),
    "other_fields": ({"body": "x", "label": 1}, "there are `body`, `label`"),
    "no_fields": ({}, "there are none"),
    "prompt_only": ({"prompt": "x"}, "`prompt` has no response"),
    "text_no_string": ({"text": 3}, "`text` must be text, not int"),
    "text_null": ({"text": None}, "`text` must be text, not NoneType"),
    "text_blank": ({"text": " \n"}, "no response token"),
    "response_blank": ({"prompt": "x", "response": ""}, "no response token"),
    "surrogate": ('{"text": "\\ud800"}', "surrogate"),
    "messages_no_list": ({"messages": "hi"}, "must be a list"),
    "messages_of_text": ({"messages": ["hi"]}, "must be a list of objects"),
    "message_no_role": ({"messages": [{"content": "hi"}]}, "`messages` 0: `role` must be text"),
    "message_parts": (
        {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
        "`messages` 0: `text` must be text, not NoneType",
    ),
    "no_assistant": ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant message"),
    "no_messages": ({"messages": []}, "`messages` is empty"),
    "assistant_blank": (
        {"messages": [MESSAGES[0], {"role": "assistant", "content": ""}]},
        "no response token",
    ),
    "assistant_first": ({"messages": [{"role": "assistant", "content": "x"}]}, "answers nothing"),
}


@pytest.mark.parametrize(("row", "problem"), BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_bad_row_names_file_and_line_before_anything_is_read(chat_tokenizer, tmp_path, row, problem):
    path = write_lines(tmp_path / "a.jsonl", GOOD, "", row, GOOD)
    with pytest.raises(DataError) as caught:
        documents(Data(source=str(path), held_out=0), chat_tokenizer, part="train")  # the call, not the iteration
    assert str(caught.value).startswith(f"{path}:3: ") and problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_wrong_field_is_told_what_there_is(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"body": "x"})
    with pytest.raises(DataError, match=r"a\.jsonl:1: no field `bdy`; there are `body`"):
        read(path, tokenizer, field="bdy")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_text_that_is_not_utf8_names_the_line(tokenizer, tmp_path, name):
    (tmp_path / name).write_bytes(b'{"text": "a"}\n\xff\xfe\n')
    for source in (tmp_path / name, tmp_path):
        with pytest.raises(DataError, match=f"{name}:2: not UTF-8 text .byte 0xff"):
            read(source, tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.md"])
@pytest.mark.parametrize("text", ["", " \n\n"])
def test_an_empty_file_is_refused(tokenizer, tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=f"{name}:1: the file is empty"):
        read(tmp_path / name, tokenizer)


def test_a_folder_without_text_is_refused(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"holds no \.txt"):
        read(tmp_path, tokenizer)
    (tmp_path / "__init__.py").write_text("")
    with pytest.raises(DataError, match="holds no text"):
        read(tmp_path, tokenizer)


@pytest.mark.parametrize(
    "source", ["./none", "/none/at/all", "none.jsonl", "some/none.txt", "a/b/c", "~/none", "with blank"]
)
def test_a_path_that_does_not_exist_is_a_usage_error(tokenizer, source):
    with pytest.raises(UsageError, match="no such file or folder"):
        read(source, tokenizer)


def test_a_file_of_another_kind_is_a_usage_error(tokenizer, tmp_path):
    (tmp_path / "a.xls").write_bytes(b"a,b")
    with pytest.raises(UsageError, match=r"cannot read \.xls"):
        read(tmp_path / "a.xls", tokenizer)


# the Hub, without network


def test_a_hub_source_is_read_like_jsonl(chat_tokenizer, monkeypatch):
    calls = fake_datasets(monkeypatch, [{"messages": MESSAGES}, {"text": "x"}, {"text": "y"}])
    found = read("owner/name:config", chat_tokenizer, split="test")
    assert sorted(document.id for document in found) == [f"owner/name:config:{n}" for n in range(3)]
    assert set(map(str, calls)) == {str((("owner/name", "config"), {"split": "test", "streaming": True}))}
    held = read("owner/name", chat_tokenizer, "held_out", held_out=1)
    assert len(held) == 1


def test_a_bad_hub_record_is_named(tokenizer, monkeypatch):
    fake_datasets(monkeypatch, [{"txet": "x"}])
    with pytest.raises(DataError, match=r"owner/name \(train\) record 0: needs `text`"):
        read("owner/name", tokenizer)


def hub_errors():
    from datasets.exceptions import DatasetNotFoundError

    return [
        (
            DatasetNotFoundError("Dataset 'owner/name' doesn't exist\non the Hub"),
            ResourceError,
            "doesn't exist on the Hub",
        ),
        (ConnectionError("Couldn't reach 'owner/name' on the Hub"), ResourceError, "Couldn't reach"),
        (ValueError("Unknown split \"train\". Should be one of ['test']."), UsageError, "Unknown split"),
    ]


@pytest.mark.parametrize(("raised", "kind", "message"), hub_errors(), ids=lambda value: str(value)[:20])
def test_what_the_hub_says_is_passed_on(tokenizer, monkeypatch, raised, kind, message):
    fake_datasets(monkeypatch, raised)
    with pytest.raises(kind, match=message) as caught:
        read("owner/name", tokenizer)
    assert "owner/name" in str(caught.value) and caught.value.hint


def test_without_the_package_datasets(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ResourceError, match="not installed"):
        read("owner/name", tokenizer)


def test_reading_text_loads_neither_torch_nor_datasets():
    code = (
        "import sys; from types import SimpleNamespace as N; from retrofit.recipes.text.documents import documents;"
        "data = N(source='stdlib', template={}, responses='keep');"
        "next(documents(data, lambda *a, **k: {'input_ids': [1]}, part='held_out'), None);"
        "sys.exit(bool({'torch', 'datasets', 'transformers', 'pydantic'} & set(sys.modules)))"
    ).replace(
        "lambda *a, **k: {'input_ids': [1]}",
        "type('T', (), {'eos_token_id': 0, '__call__': lambda *a, **k: {'input_ids': [1]}})()",
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_section_is_needed(tokenizer):
    """Any object with the section's fields will do; the schema is not imported for it."""
    keys = {"split": "train", "field": None, "held_out": 64, "template": {}, "responses": "keep"}
    section = SimpleNamespace(source="stdlib", **keys)
    assert next(documents(section, tokenizer, part="held_out")).id == "_strptime.py"
