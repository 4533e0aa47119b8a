"""Prompts of a user's own, and those that ship."""

import json
from collections import Counter
from types import SimpleNamespace

import pytest

from retrofit.errors import DataError, UsageError
from retrofit.report.prompts import Prompt, categories, digest, own_rows, read_rows, tokenized


def written(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def test_the_layout_of_speed_bench_and_spec_bench(tmp_path):
    rows = read_rows(written(
        tmp_path / "mine.jsonl",
        {"question_id": 81, "category": "writing", "sub_category": "email", "turns": ["Ünï 日本", "Again"]},
        {"prompt": "def f("},
        {"category": None, "messages": [{"role": "user", "content": "hi"}]},
        {"tokens": [1, 2]},
    ))  # fmt: skip
    assert [(row.id, row.category, row.asked) for row in rows] == [
        ("81", "writing", "Ünï 日本"),
        ("2", "uncategorised", "def f("),
        ("3", "uncategorised", [{"role": "user", "content": "hi"}]),
        ("4", "uncategorised", [1, 2]),
    ]
    assert [row.left_out for row in rows] == [1, 0, 0, 0]
    assert [row.raw for row in rows] == [False, True, False, False]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "mine.jsonl:2: not valid JSON"),
        ("[" * 100_000, "mine.jsonl:2: not valid JSON"),
        ("[1]", "mine.jsonl:2: must hold one of turns, prompt, messages, tokens"),
        ('{"turns": ["a"], "prompt": "b"}', "mine.jsonl:2: must hold one of"),
        ('{"turns": []}', "mine.jsonl:2: `turns` must be a list that is not empty"),
        ('{"turns": [3]}', "mine.jsonl:2: `turns` must be"),
        ('{"prompt": 3}', "mine.jsonl:2: `prompt` must be text"),
    ],
)
def test_what_is_no_prompt_is_named_by_its_line(tmp_path, line, problem):
    path = tmp_path / "mine.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(DataError) as caught:
        read_rows(path)
    assert problem in str(caught.value)


def test_a_file_without_a_prompt_and_no_file(tmp_path):
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"none\.jsonl: holds no prompt"):
        read_rows(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"gone\.jsonl: cannot be read: No such file"):
        read_rows(tmp_path / "gone.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(DataError, match="not UTF-8 text"):
        read_rows(tmp_path / "latin.jsonl")


def test_our_own_are_of_many_kinds_from_the_first_few_on():
    rows = own_rows()
    counts = Counter(row.category for row in rows)
    assert len(counts) == 7 and set(counts.values()) == {5}
    assert {row.category for row in rows[:7]} == set(counts)
    assert len({row.asked for row in rows}) == len(rows)


def test_text_goes_through_the_template_where_there_is_one_but_raw_text_does_not(tmp_path):
    class Letters:
        chat_template = "a template"

        def __call__(self, text, **options):
            return {"input_ids": [ord(letter) for letter in text]}

        def apply_chat_template(self, messages, **options):
            return {"input_ids": [0, *(ord(letter) for letter in messages[0]["content"])]}

    engine = SimpleNamespace(tokenizer=Letters(), backend=SimpleNamespace(input_vocab=256))
    rows = read_rows(written(tmp_path / "mine.jsonl", {"turns": ["ab"]}, {"prompt": "ab"}, {"tokens": [7]}))
    assert [prompt.tokens for prompt in tokenized(rows, engine)] == [(0, 97, 98), (97, 98), (7,)]


def test_a_digest_is_of_the_tokens_alone():
    assert digest([Prompt("1", "a", (1, 2))]) == digest([Prompt("2", "b", (1, 2))]) != digest([Prompt("1", "a", (1,))])
    asked = [Prompt("1", "a", (1,)), Prompt("2", "b", (1,)), Prompt("3", "a", (1,))]
    assert categories(asked) == {"a": [0, 2], "b": [1]}
