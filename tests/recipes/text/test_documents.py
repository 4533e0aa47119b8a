"""Text sources: which documents they give, and which tokens are responses."""

import pytest
from text_sources import CHATML, MESSAGES, THOUGHT_LAST, TINY, answers, read, write_lines
from transformers import AutoTokenizer

from retrofit.errors import DataError

# as Qwen3: the last answer carries an empty thought, which earlier ones lose
# as the DeepSeek-R1 distillations: the generation prompt has more than the turn itself
THOUGHT_ASKED = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
    "{% else %}<A>{{ m.content.split('</think>')[-1] }}<E>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)


# local text


def test_a_folder_gives_one_document_per_file(tokenizer, tmp_path):
    for name in ("a.txt", "b.md", "sub/c.py", ".hidden/d.py", "e.csv", "blank.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(" \n" if name == "blank.py" else name)
    write_lines(tmp_path / "rows.jsonl", {"text": "one"}, "", {"text": "two"})
    found = {document.id: tokenizer.decode(document.tokens) for document in read(tmp_path, tokenizer)}
    eos = tokenizer.eos_token
    assert found == {name: name + eos for name in ("a.txt", "b.md", "sub/c.py")} | {
        "rows.jsonl:1": "one" + eos,
        "rows.jsonl:3": "two" + eos,
    }


def test_a_file_that_is_the_whole_source_is_cut_at_line_ends(tokenizer, tmp_path):
    text = "".join(f"line {n} \N{SNOWMAN}\n" for n in range(3000)) + "\n\n"
    path = tmp_path / "book.txt"
    path.write_text(text, encoding="utf-8")
    found = sorted(read(path, tokenizer), key=lambda document: int(document.id.split(":")[1]))
    assert len(found) > 4
    assert [document.tokens[-1] == tokenizer.eos_token_id for document in found] == [False] * (len(found) - 1) + [True]
    pieces = [tokenizer.decode(document.tokens) for document in found]
    assert "".join(pieces) == text + tokenizer.eos_token
    assert all(piece.endswith("\n") for piece in pieces[:-1])
    lines = text.split("\n")
    assert all(piece.startswith(lines[int(d.id.split(":")[1]) - 1]) for piece, d in zip(pieces, found, strict=True))


def test_a_byte_order_mark_is_no_text(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "hello"}')
    assert len({document.tokens for document in read(tmp_path, tokenizer)}) == 1


def test_a_tokenizer_without_eos_ends_nothing(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.eos_token = None
    (tmp_path / "a.txt").write_text("hello")
    assert tokenizer.decode(read(tmp_path / "a.txt", tokenizer)[0].tokens) == "hello"


@pytest.mark.parametrize("held_out", [0, 1, 3, 5, 1000])
def test_held_out_documents_are_never_trained_on(tokenizer, tmp_path, held_out):
    path = write_lines(tmp_path / "a.jsonl", *({"text": f"text {n}"} for n in range(10)))
    held = {document.id for document in read(path, tokenizer, "held_out", held_out=held_out)}
    train = [{document.id for document in read(path, tokenizer, seed=s, held_out=held_out)} for s in (0, 1)]
    assert len(held) == min(held_out, 5)
    assert train[0] == train[1] and not train[0] & held and len(train[0] | held) == 10


def test_held_out_documents_stay_when_the_file_moves(tokenizer, tmp_path):
    rows = [{"text": f"text {n}"} for n in range(10)]
    (tmp_path / "other").mkdir()
    there = [write_lines(folder / "a.jsonl", *rows) for folder in (tmp_path, tmp_path / "other")]
    held = [[document.id for document in read(path, tokenizer, "held_out", held_out=3)] for path in there]
    assert held[0] == held[1]


def test_one_document_cannot_be_both(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"text": "x"})
    with pytest.raises(DataError, match="one document") as caught:
        read(path, tokenizer, held_out=1)
    assert "data.held_out=0" in caught.value.hint


# records


def test_prompt_and_response(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.jsonl", {"prompt": "def f", "response": "(x): return x"})
    (document,) = read(path, tokenizer)
    prompt = tokenizer("def f")["input_ids"]
    assert list(document.tokens[: len(prompt)]) == prompt  # tokenized alone, as in decoding
    assert not any(document.response[: len(prompt)])
    assert answers(document, tokenizer) == ["(x): return x" + tokenizer.eos_token]


def test_an_empty_prompt_is_fine(tokenizer, tmp_path):
    (document,) = read(write_lines(tmp_path / "a.jsonl", {"prompt": "", "response": "x"}), tokenizer)
    assert all(document.response)


@pytest.mark.parametrize(
    "value", ["hello", [{"role": "user", "content": "q"}, {"role": "assistant", "content": "hello"}]]
)
def test_a_field_of_another_name(chat_tokenizer, tmp_path, value):
    path = write_lines(tmp_path / "a.jsonl", {"text": "wrong", "body": value})
    (document,) = read(path, chat_tokenizer, field="body")
    assert answers(document, chat_tokenizer)[0].startswith("hello")


@pytest.mark.parametrize(
    ("template", "want"),
    [
        (CHATML, ["a<|im_end|>", "<b> user<|im_end|>"]),
        (THOUGHT_LAST, ["a<|im_end|>", "<think>\n\n</think>\n\n<b> user<|im_end|>"]),
    ],
    ids=["chatml", "thought_last"],
)
def test_response_tokens_are_the_assistants(chat_tokenizer, tmp_path, template, want):
    chat_tokenizer.chat_template = template
    (document,) = read(write_lines(tmp_path / "a.jsonl", {"messages": MESSAGES}), chat_tokenizer)
    whole = chat_tokenizer.apply_chat_template(MESSAGES, tokenize=False)
    assert chat_tokenizer.decode(document.tokens) == whole
    assert answers(document, chat_tokenizer) == want


def test_a_generation_prompt_that_the_turn_does_not_repeat(chat_tokenizer, tmp_path):
    chat_tokenizer.chat_template = THOUGHT_ASKED
    chat_tokenizer.add_special_tokens({"additional_special_tokens": ["<A>", "<U>", "<E>"]})
    messages = [*MESSAGES[1:4], {"role": "assistant", "content": "<think>why</think>so"}]
    (document,) = read(write_lines(tmp_path / "a.jsonl", {"messages": messages}), chat_tokenizer)
    assert answers(document, chat_tokenizer) == ["a<E>", "so<E>"]


def test_conversations_need_a_chat_template(tokenizer, tmp_path):
    with pytest.raises(DataError, match=r"a\.jsonl:1: the tokenizer has no chat template"):
        read(write_lines(tmp_path / "a.jsonl", {"messages": MESSAGES}), tokenizer)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}{{ m.content | lower }};{% endfor %}", "cannot tell"),
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", "cannot tell"),
    ],
    ids=["refuses", "rewrites", "no_closing_token"],
)
def test_templates_that_cannot_be_followed(chat_tokenizer, tmp_path, template, problem):
    chat_tokenizer.chat_template = template
    with pytest.raises(DataError, match=problem) as caught:
        read(write_lines(tmp_path / "a.jsonl", {"messages": MESSAGES}), chat_tokenizer)
    assert "a.jsonl:1" in str(caught.value)
