"""Prompts from JSONL: the layouts of SPEED-Bench and Spec-Bench, a user's own, and what is wrong with a row."""

import json

import pytest

from retrofit.errors import DataError, UsageError
from retrofit.tasks.prompt_files import BenchPrompt, limited, read

SPEED = {"question_id": "q-1", "category": "coding", "sub_category": "easy", "turns": ["Write a loop.", "Shorter."]}
SPEC = {"question_id": 81, "category": "writing", "turns": ["Write a letter."], "reference": ["..."]}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go"}]


def written(tmp_path, *rows):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    return path


def test_every_layout(tmp_path):
    own = {"prompt": "Once upon\u2028a time"}
    path = written(tmp_path, SPEED | {"source": "x"}, SPEC, "", own, {"messages": CHAT, "category": "chat"})
    speed, spec, raw, chat = read(path)
    assert speed == BenchPrompt("q-1", "coding", "easy", ("Write a loop.", "Shorter."))
    assert spec == BenchPrompt("81", "writing", None, ("Write a letter.",))
    assert raw == BenchPrompt("4", "uncategorised", None, ("Once upon\u2028a time",))
    assert (chat.category, chat.turns, chat.chat()) == ("chat", ("Hi", "Go"), CHAT)
    assert speed.raw() == "Write a loop." and speed.chat() == [{"role": "user", "content": "Write a loop."}]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "not a JSON object"),
        ({"category": "a"}, "no turns"),
        ({"turns": []}, "no turns"),
        ({"turns": ["a", ""]}, "no turns"),
        ({"turns": ["a", 1]}, "no turns"),
        ({"turns": ["a"], "category": 3}, "category is not a text"),
        ({"messages": "hi"}, "messages are not a list"),
        ({"messages": CHAT[:2]}, "do not end with the user's"),
        ({"messages": []}, "do not end with the user's"),
        ({"turns": ["Full data must be fetched from the source using specdec_bench"]}, "text was not fetched"),
        (SPEED, "another row has the id q-1"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_row_that_is_no_prompt_is_named_with_its_line(tmp_path, row, words):
    path = written(tmp_path, SPEED, "", row)
    with pytest.raises(DataError, match=words) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:3: ") and error.value.hint


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(UsageError, match="No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="no prompts"):
        read(written(tmp_path, "", " "))
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8"):
        read(tmp_path / "latin.jsonl")


def test_a_limit_takes_the_categories_in_turn():
    prompts = [BenchPrompt(str(n), category, None, ("x",)) for n, category in enumerate("aaabbc")]
    assert [prompt.id for prompt in limited(prompts, 4)] == ["0", "1", "3", "5"]
    assert limited(prompts, 9) == prompts
