"""Text sources: which documents they give, which tokens are responses, and what bad input is told."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from retrofit.errors import DataError, ResourceError, UsageError
from retrofit.recipes.schema import Data
from retrofit.recipes.text import library
from retrofit.recipes.text.documents import Document, documents, windows
from retrofit.recipes.text.formats import Chat, encode
from retrofit.recipes.text.library import held_out_prompts, stdlib_texts

TINY = Path(library.__file__).parents[1] / "tiny"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as Qwen3: the last answer carries an empty thought, which earlier ones lose
THOUGHT_LAST = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# as the DeepSeek-R1 distillations: the generation prompt has more than the turn itself
THOUGHT_ASKED = (
    "{% for m in messages %}{% if m.role == 'user' %}<U>{{ m.content }}"
    "{% else %}<A>{{ m.content.split('</think>')[-1] }}<E>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<A><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def chat_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = CHATML
    return tokenizer


def read(source, tokenizer, part="train", seed=0, **options):
    options = {"held_out": 0, **options}
    return list(documents(Data(source=str(source), **options), tokenizer, part=part, seed=seed))


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def answers(document, tokenizer):
    """Text of every run of response tokens."""
    runs, run = [], []
    for token, is_response in zip(document.tokens, document.response, strict=True):
        if is_response:
            run.append(token)
        elif run:
            runs.append(tokenizer.decode(run))
            run = []
    return [*runs, tokenizer.decode(run)] if run else runs


# stdlib


def test_stdlib_parts_are_disjoint_and_the_held_out_one_is_the_list(tokenizer):
    held = [document.id for document in read("stdlib", tokenizer, "held_out")]
    listed = library.HELD_OUT_LIST.read_text().split()
    assert held and held == [name for name in listed if name in held]
    train = documents(Data(), tokenizer, part="train")
    assert not {document.id for document in islice(train, 50)} & set(listed)


def test_stdlib_documents_are_the_files_and_end_with_eos(tokenizer):
    document = read("stdlib", tokenizer, "held_out")[0]
    text = (library._stdlib_root() / document.id).read_text(encoding="utf-8")
    assert tokenizer.decode(document.tokens) == text + tokenizer.eos_token
    assert all(document.response) and len(document.response) == len(document.tokens)


def test_stdlib_leaves_out_packages_tables_and_blank_files(tokenizer, tmp_path, monkeypatch):
    names = library.HELD_OUT_LIST.read_text().split()[:1]
    for name, text in {
        names[0]: "held = 1\n",
        "good.py": "good = 1\n",
        "deep/er/good.py": "good = 2\n",
        "blank.py": "\n \n",
        "long.py": "x" * 400_001,
        "just.py": "x" * 400_000,
        "foreign.py": "ä" * 2 + "x" * 100,
        "little.py": "ä" + "x" * 99,
        "site-packages/p.py": "x = 1\n",
        "encodings/e.py": "x = 1\n",
        "lib2to3/tests/data/d.py": "x = 1\n",
        "lib2to3/good.py": "good = 3\n",
        "notes.txt": "text\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "latin.py").write_bytes(b"# \xe4\n" + b"x = 1\n" * 99)
    monkeypatch.setattr(library, "_stdlib_root", lambda: tmp_path)
    ids = sorted(document.id for document in read("stdlib", tokenizer))
    assert ids == ["deep/er/good.py", "good.py", "just.py", "lib2to3/good.py", "little.py"]
    assert [document.id for document in read("stdlib", tokenizer, "held_out")] == names
    assert list(stdlib_texts("held_out")) == ["held = 1\n"]
    assert sorted(map(len, stdlib_texts("train"))) == [9, 9, 9, 100, 400_000]


def test_a_python_without_sources_is_told(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(library, "_stdlib_root", lambda: tmp_path / "none")
    with pytest.raises(ResourceError, match=r"lacks the \.py files") as caught:
        documents(Data(), tokenizer, part="train")
    assert "data.source" in caught.value.hint


def test_the_order_of_training_is_drawn_from_the_seed(tokenizer):
    def first(seed, part="train"):
        return [document.id for document in islice(documents(Data(), tokenizer, part=part, seed=seed), 10)]

    assert first(0) == first(0)
    assert first(0) != first(1)
    assert first(0, "held_out") == first(1, "held_out")


# prompts


@pytest.mark.parametrize("length", [1, 64, 256])
def test_held_out_prompts_are_exact_distinct_and_repeatable(tokenizer, length):
    prompts = held_out_prompts(tokenizer, 70, length)  # more than there are files
    assert [len(prompt) for prompt in prompts] == [length] * 70
    assert prompts == held_out_prompts(tokenizer, 70, length)
    assert prompts[:5] == held_out_prompts(tokenizer, 5, length)
    assert length < 64 or len(set(map(tuple, prompts))) == 70


def test_held_out_prompts_come_from_line_starts_of_different_files(tokenizer):
    texts = list(stdlib_texts("held_out"))
    prompts = [tokenizer.decode(prompt) for prompt in held_out_prompts(tokenizer, 16, 64)]
    homes = set()
    for prompt in prompts:
        prompt = prompt.rstrip("\N{REPLACEMENT CHARACTER}")  # the cut may fall into a character
        homes.add(next(n for n, text in enumerate(texts) if f"\n{prompt}" in f"\n{text}"))
    assert len(homes) > 12  # equal boilerplate may be found in another file first


def test_too_many_or_too_long_prompts_are_refused(tokenizer):
    with pytest.raises(DataError, match="yield 0 prompts of 1000000 tokens, not 1"):
        held_out_prompts(tokenizer, 1, 1_000_000)


# windows


def test_windows_cut_without_loss_and_number_the_pieces():
    document = Document("d", tuple(range(10)), (False,) * 4 + (True,) * 6)
    cut = list(windows([document], 4))
    assert [(w.id, w.tokens) for w in cut] == [("d#1", (4, 5, 6, 7)), ("d#2", (8, 9))]  # #0 has no response
    whole = list(windows([document], 10))
    assert [(w.id, w.tokens, w.response) for w in whole] == [("d#0", document.tokens, document.response)]
    plain = Document("p", tuple(range(9)), (True,) * 9)
    assert sum((w.tokens for w in windows([plain], 4)), ()) == plain.tokens


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


MESSAGES = [
    {"role": "system", "content": "You are a"},
    {"role": "user", "content": "assistant"},
    {"role": "assistant", "content": "a"},
    {"role": "user", "content": "answer <b>"},
    {"role": "assistant", "content": "<b> user"},
]


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


def marked(template, turn):
    """The template with `{% generation %}` around what it writes of an assistant's turn.

    The empty text keeps a line end that follows, which Jinja would take for the end of the block's own line.
    """
    inside = f"{{% generation %}}{turn}{{% endgeneration %}}"
    assert template.count(turn) == 1
    return template.replace(
        turn, f"{{% if m.role == 'assistant' %}}{inside}{{% else %}}{turn}{{% endif %}}{{{{ '' }}}}"
    )


THOUGHT = "{% if loop.last and m.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
BOTH_WAYS = {
    "chatml": (CHATML, "{{ m.content }}<|im_end|>"),
    "thought_last": (THOUGHT_LAST, THOUGHT + "{{ m.content.split('</think>')[-1] }}<|im_end|>"),
}


def encoded(template, tokenizer):
    tokenizer.chat_template = template
    return encode(Chat(MESSAGES), tokenizer, "here")


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_marks_of_a_template_agree_with_what_is_found_without(chat_tokenizer, name):
    template, turn = BOTH_WAYS[name]
    found = encoded(template, chat_tokenizer)
    assert encoded(marked(template, turn), chat_tokenizer) == found
    assert sum(found[1]) > 0
    # The marks decide: other ones give the same tokens and other flags.
    for other in ("<|im_end|>", "{{ m.role }}\n", "{{ m.role }}\n" + turn):
        tokens, response = encoded(marked(template, other), chat_tokenizer)
        assert tokens == found[0]
        assert response != found[1]


def test_marks_are_followed_where_nothing_can_be_found_without(chat_tokenizer):
    template = "{% for m in messages %}{{ m.content | upper }}\n{% endfor %}"
    with pytest.raises(DataError, match="cannot tell"):
        encoded(template, chat_tokenizer)
    tokens, response = encoded(marked(template, "{{ m.content | upper }}"), chat_tokenizer)
    text = chat_tokenizer.decode([token for token, flag in zip(tokens, response, strict=True) if flag])
    assert text == "A<B> USER"


def test_marks_that_cover_no_response_are_told(chat_tokenizer):
    template = "{% for m in messages %}{{ m.content }};{% if false %}{% generation %}{% endgeneration %}{% endif %}"
    template += "{% endfor %}"
    with pytest.raises(DataError, match="here: the chat template leaves no response token"):
        encoded(template, chat_tokenizer)


def test_a_tokenizer_that_leaves_out_spaces_does_not_mark_all_that_follows(chat_tokenizer):
    words = ["<unk>", "you", "a", "answer", "user", "assistant", "system", "<b>", "END"]
    plain = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>")
    template, turn = "{% for m in messages %} {{ m.role }} {{ m.content }} END {% endfor %}", " {{ m.content }} END "
    template += "{% if add_generation_prompt %} assistant{% endif %}"
    assert encoded(marked(template, turn), tokenizer) == encoded(template, tokenizer)
    tokens, response = encoded(template, tokenizer)
    flagged = [words[token] for token, flag in zip(tokens, response, strict=True) if flag]
    assert flagged == ["a", "END", "<b>", "user", "END"]


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
    "prompt_only": ({"prompt": "x"}, "there are `prompt`"),
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
        "`content` must be text, not list",
    ),
    "no_assistant": ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant message"),
    "no_messages": ({"messages": []}, "no assistant message"),
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
    (tmp_path / "a.csv").write_bytes(b"a,b")
    with pytest.raises(UsageError, match=r"cannot read \.csv"):
        read(tmp_path / "a.csv", tokenizer)


# the Hub, without network


def fake_datasets(monkeypatch, outcome):
    import datasets

    calls = []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


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
        "next(documents(N(source='stdlib'), lambda *a, **k: {'input_ids': [1]}, part='held_out'), None);"
        "sys.exit(bool({'torch', 'datasets', 'transformers', 'pydantic'} & set(sys.modules)))"
    ).replace(
        "lambda *a, **k: {'input_ids': [1]}",
        "type('T', (), {'eos_token_id': 0, '__call__': lambda *a, **k: {'input_ids': [1]}})()",
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_only_the_section_is_needed(tokenizer):
    """Any object with the section's fields will do; the schema is not imported for it."""
    section = SimpleNamespace(source="stdlib", split="train", field=None, held_out=64)
    assert next(documents(section, tokenizer, part="held_out")).id == "_strptime.py"
