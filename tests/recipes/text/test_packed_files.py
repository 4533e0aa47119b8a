"""JSON arrays, CSV and compressed files give the documents that the same rows give as JSONL."""

import csv
import gzip
import json
import tempfile
from types import SimpleNamespace

import pytest
from text_sources import read, write_lines

from retrofit.errors import DataError, ResourceError
from retrofit.recipes.text import unpacked
from retrofit.recipes.text.faults import Skipped
from retrofit.recipes.text.lines import LONGEST_LINE

ROWS = [
    {"text": "def f(x):\n    return x, 'é'"},
    {"prompt": 'a "quoted", one', "response": "x" * 200_000},
    {"text": "import os"},
    {"prompt": "", "response": "b"},
]


def packed(path, rows):
    """The rows in the form that the file's name says."""
    names = path.name.split(".")[1:]
    if names[0] == "jsonl":
        text = "".join(json.dumps(row) + "\n" for row in rows)
    elif names[0] == "json":
        text = json.dumps(rows, indent=2)
    else:
        file = SimpleNamespace(text="")
        file.write = lambda part: setattr(file, "text", file.text + part)
        writer = csv.DictWriter(file, ["text", "prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
        text = "\ufeff" + file.text  # as spreadsheets write it
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if names[-1] == "gz" else raw)
    return path


NAMES = ("a.json", "a.csv", "a.jsonl.gz", "a.json.gz", "a.csv.gz")


def contents(documents):
    return [(document.tokens, document.response) for document in documents]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_jsonl(tokenizer, tmp_path, name):
    rows = ROWS if "csv" not in name else [ROWS[0], ROWS[1], ROWS[2]]  # an empty cell is no text
    want = read(write_lines(tmp_path / "want.jsonl", *rows), tokenizer, part="all")
    found = read(packed(tmp_path / name, rows), tokenizer, part="all")
    assert contents(found) == contents(want)
    assert [document.id for document in found] == [f"{name}:{number}" for number in range(1, len(rows) + 1)]
    assert found[1].where == f"{tmp_path / name}:2"
    shuffled = read(tmp_path / name, tokenizer, seed=3)
    assert sorted(contents(shuffled)) == sorted(contents(want)), "in any order"


def test_a_json_file_may_hold_a_record_on_each_line(tokenizer, tmp_path):
    path = write_lines(tmp_path / "a.json", *ROWS)
    assert contents(read(path, tokenizer, part="all")) == contents(
        read(write_lines(tmp_path / "b.jsonl", *ROWS), tokenizer, part="all")
    )


@pytest.mark.parametrize("name", ["a.json", "a.jsonl.gz"])
def test_bad_rows_are_named_by_their_number_or_left_out(tokenizer, tmp_path, name):
    path = packed(tmp_path / name, [ROWS[0], {"txet": "x"}, ROWS[2], {"text": "x" * LONGEST_LINE}, "no object"])
    with pytest.raises(DataError, match=rf"{name}:2: needs `text`"):
        read(path, tokenizer)
    skipped = Skipped()
    from retrofit.recipes.schema import Data
    from retrofit.recipes.text.documents import documents

    found = list(documents(Data(source=str(path), held_out=0), tokenizer, part="all", skipped=skipped))
    assert len(found) == 2
    assert skipped.counts() == {"json": 1, "field": 1, "long": 1}
    assert list(skipped.rows) == [f"{path}:{number}" for number in (2, 4, 5)]


@pytest.mark.parametrize("name", ["a.json", "a.csv"])
def test_a_row_may_be_as_long_in_any_language(tokenizer, tmp_path, name):
    """As JSON has it without escapes, which are twice as long as most letters beyond ASCII."""
    path = packed(tmp_path / name, [{"text": "\u4e2d" * (LONGEST_LINE // 4)}])
    assert len(read(path, tokenizer, part="all")) == 1


def test_half_of_a_surrogate_pair_is_told_of_its_row(tokenizer, tmp_path):
    (tmp_path / "a.json").write_bytes(rb'[{"text": "a"}, {"text": "\ud800"}]')
    with pytest.raises(DataError, match=r"a\.json:2: `text` holds half of a surrogate pair"):
        read(tmp_path / "a.json", tokenizer)


def test_blank_lines_count_as_lines(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'\n{"text": "a"}\n\n{"text": "b"}\n'))
    assert [document.where for document in read(path, tokenizer, part="all")] == [f"{path}:2", f"{path}:4"]


BROKEN = {
    "cut_json": ("a.json", b'[{"text": "a"},\n{"text": ', r"a\.json:2: not valid JSON"),
    "deep": ("a.json", b"[" * 100_000, r"a\.json: not valid JSON"),
    "no_utf8": ("a.json", b'[{"text":\n"\xff"}]', r"a\.json:2: not UTF-8"),
    "cut_gzip": ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-20], r"a\.jsonl\.gz: cannot be unpacked"),
    "no_gzip": ("a.json.gz", b"[]", r"a\.json\.gz: cannot be unpacked"),
    "columns": ("a.csv", b"text\na\nb,c\n", r"a\.csv:3: a row of 2 columns under a header of 1"),
    "quotes": ("a.csv", b'text\n"a"b\n', r"a\.csv:2: not valid CSV"),
    "csv_no_utf8": ("a.csv", b"text\n\xff\n", r"a\.csv: not UTF-8"),
    "empty_array": ("a.json", b"[]", "the file is empty"),
    "no_rows": ("a.csv", b"text\n", "the file is empty"),
    "nothing": ("a.jsonl.gz", gzip.compress(b""), "the file is empty"),
}


@pytest.mark.parametrize(("name", "raw", "problem"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_file_is_told(tokenizer, tmp_path, name, raw, problem):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=problem) as caught:
        read(tmp_path / name, tokenizer)
    assert "\n" not in str(caught.value)


def test_a_folder_is_read_without_settings_and_tables_of_others(tokenizer, tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    packed(tmp_path / "b.jsonl.gz", ROWS[:1])
    for name in ("package.json", "prices.csv", "c.json.gz"):
        (tmp_path / name).write_bytes(b"no text to train on")
    assert [document.id for document in read(tmp_path, tokenizer, part="all")] == ["a.py", "b.jsonl.gz:1"]


def test_a_full_disk_is_no_fault_of_the_file(tokenizer, tmp_path, monkeypatch):
    path = packed(tmp_path / "a.json", ROWS)
    full = SimpleNamespace(TemporaryFile=lambda: open("/dev/full", "w+b"), gettempdir=tempfile.gettempdir)  # noqa: PTH123, SIM115
    monkeypatch.setattr(unpacked, "tempfile", full)
    with pytest.raises(ResourceError, match="cannot unpack a file: No space left") as caught:
        read(path, tokenizer)
    assert "TMPDIR" in caught.value.hint
