"""The text of Python's own library: its parts are disjoint, its order is drawn, prompts are exact and held out."""

from itertools import islice

import pytest
from text_sources import read

from retrofit.errors import DataError, ResourceError
from retrofit.recipes.schema import Data
from retrofit.recipes.text import library
from retrofit.recipes.text.documents import documents
from retrofit.recipes.text.library import held_out_prompts, stdlib_texts

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
