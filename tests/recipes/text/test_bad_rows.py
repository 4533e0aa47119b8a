"""Eight faults of training text: each names file and line, says what to do, and is left out and counted if asked."""

import json
from pathlib import Path

import pytest
from commands import SHORT, done, refused, run
from saved import save_base
from text_sources import CHATML
from transformers import AutoTokenizer

from retrofit.errors import DataError
from retrofit.recipes.schema import Data
from retrofit.recipes.text.documents import documents
from retrofit.recipes.text.faults import KINDS, RowError, Skipped
from retrofit.recipes.text.lines import LONGEST_LINE

GOOD = {"text": "def area(radius): return radius * radius\n"}
CHAT = [{"role": "user", "content": "def"}, {"role": "assistant", "content": "class Stack"}]
STRICT = (
    "{% for m in messages %}{% if m.role not in ('user', 'assistant') %}{{ raise_exception('no role ' + m.role) }}"
    "{% endif %}{{ m.role }}: {{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
FAULTS = {
    "json": (b'{"text": "cut o', "not valid JSON", "JSON object on each line"),
    "field": ({"txet": "x"}, "needs `text`, `messages`", "data.field"),
    "encoding": (b'{"text": "\xff"}', "not UTF-8", "UTF-8"),
    "empty": ({"text": " "}, "is empty", "remove"),
    "long": ({"text": "x" * LONGEST_LINE}, "a line of 1,000,013 bytes", "a line of its own"),
    "template": ({"messages": [{"role": "pirate", "content": "d"}, *CHAT]}, "refuses the messages: no role", "roles"),
    "vocabulary": ({"text": "item"}, "outside the model's vocabulary", "belongs to the model"),
    "no_response": ({"messages": CHAT[:1]}, "no response token", "remove"),
}

pytestmark = pytest.mark.usefixtures("somewhere")


def test_every_kind_has_its_case():
    assert set(FAULTS) == set(KINDS)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base with a strict template, and a token `item` that its embedding has no row for."""
    folder = save_base(tmp_path_factory.mktemp("base") / "base", template=STRICT)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokenizer.add_tokens([f"filler{number}" for number in range(vocab - len(tokenizer))] + ["item"])
    assert tokenizer.convert_tokens_to_ids("item") == vocab
    tokenizer.save_pretrained(folder)
    return folder


def write(path: Path, *rows: object) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def with_fault(path: Path, kind: str, good: int = 6) -> Path:
    return write(path, *[GOOD] * 2, FAULTS[kind][0], *[GOOD] * (good - 2))


def read(path: Path, base: Path, skipped: Skipped | None = None) -> list:
    tokenizer = AutoTokenizer.from_pretrained(base)
    vocab = json.loads((base / "config.json").read_text())["vocab_size"]
    return list(documents(Data(source=str(path), held_out=0), tokenizer, part="all", skipped=skipped, vocab=vocab))


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_names_its_line_and_what_to_do(kind, base, tmp_path):
    _, message, hint = FAULTS[kind]
    path = with_fault(tmp_path / "a.jsonl", kind)
    with pytest.raises(RowError) as caught:
        read(path, base)
    assert caught.value.kind == kind
    assert str(caught.value).startswith(f"{path}:3: ") and message in str(caught.value)
    assert hint in caught.value.hint and "--skip-bad" in caught.value.hint


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_is_left_out_and_counted(kind, base, tmp_path):
    path = with_fault(tmp_path / "a.jsonl", kind)
    skipped = Skipped()
    assert [d.where for d in read(path, base, skipped)] == [f"{path}:{line}" for line in (1, 2, 4, 5, 6, 7)]
    assert skipped.counts() == {kind: 1}
    assert skipped.line() == f"skipped 1 bad row (1 {KINDS[kind]})"


def test_convert_stops_at_bad_rows_or_skips_and_counts_them(base, tmp_path):
    rows = [fault for fault, _, _ in FAULTS.values()]
    path = write(tmp_path / "all.jsonl", *[GOOD] * 4, *rows, *[GOOD] * 4)
    order = [f"data.source={path}", *SHORT, "train.steps=10", "data.held_out=2"]
    assert f"{path}:5: not valid JSON" in refused(run("convert", base, *order), 1)
    assert not Path("base-retrofit").exists()
    result = run("convert", base, *order, "--skip-bad", "--json")
    assert result.exit_code == 0, result.stderr
    want = dict.fromkeys(FAULTS, 1)
    assert json.loads(result.stdout)["training"]["skipped"] == want
    assert "skipped 8 bad rows (1 not a JSON object, 1 field missing" in result.stderr
    kept = json.loads(done("inspect", "base-retrofit", "--json"))
    assert "skipped" in json.dumps(kept)


@pytest.mark.parametrize("kind", FAULTS)
def test_a_fault_alone_stops_a_conversion(kind, base, tmp_path):
    path = with_fault(tmp_path / "a.jsonl", kind)
    message = refused(run("convert", base, f"data.source={path}", *SHORT, "train.steps=5", "data.held_out=0"), 1)
    assert f"{path}:3: " in message and "--skip-bad" in message
    assert not Path("base-retrofit").exists()


def test_validate_names_all_bad_rows_in_order(base, tmp_path):
    rows = [fault for fault, _, _ in FAULTS.values()]
    path = write(tmp_path / "all.jsonl", *[GOOD] * 6, *rows, GOOD)
    result = run("data", "validate", path, "--model", base)
    assert result.exit_code == 1
    lines = result.stdout.splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"{path}:{number}" for number in range(7, 15)]
    assert all(message in line for line, (_, message, _) in zip(lines, FAULTS.values(), strict=True))
    assert "8 of 15 rows cannot be used" in result.stderr and "--skip-bad" in result.stderr
    found = json.loads(done("data", "validate", path, "--model", base, "--skip-bad", "--json"))
    assert (found["good"], found["bad"], found["kinds"]) == (7, 8, dict.fromkeys(FAULTS, 1))
    assert [row["kind"] for row in found["rows"]] == list(FAULTS)
    assert done("data", "validate", write(tmp_path / "good.jsonl", GOOD), "--model", base) == ""


def test_validate_prints_the_rows_even_where_nothing_is_left(base, tmp_path):
    path = write(tmp_path / "a.jsonl", {"txet": 1}, b"{")
    for options in ([], ["--skip-bad"]):
        result = run("data", "validate", path, "--model", base, *options)
        assert result.exit_code == 1
        assert len(result.stdout.splitlines()) == 2
        assert "holds no text: skipped 2 bad rows" in result.stderr


@pytest.mark.parametrize(
    ("name", "content", "line", "kind"),
    [
        ("a.jsonl", b"", 1, "empty"),
        ("a.txt", b"\n \n", 1, "empty"),
        ("a.txt", b"good\n\xff\nfine\n", 2, "encoding"),
        ("a.txt", b"good\n" + b"y" * LONGEST_LINE + b"y\nfine\n", 2, "long"),
        ("a.jsonl", b'{"text": "good"}\n{"text": "' + b"y" * 3 * LONGEST_LINE + b'"}\n{"text": "fine"}', 2, "long"),
    ],
)
def test_files_of_text(name, content, line, kind, base, tmp_path):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(RowError) as caught:
        read(path, base)
    assert (caught.value.where, caught.value.kind) == (f"{path}:{line}", kind)
    skipped = Skipped()
    if kind == "empty":
        with pytest.raises(DataError, match="holds no text: skipped 1 bad row"):
            read(path, base, skipped)
        return
    tokenizer = AutoTokenizer.from_pretrained(base)
    pieces = [tokenizer.decode(document.tokens) for document in read(path, base, skipped)]
    assert [piece.replace(" ", "").strip() for piece in pieces] == ["good", "fine"]
    assert skipped.counts() == {kind: 1}


def test_a_bad_file_of_a_folder_is_left_out(base, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("def area")
    (folder / "b.txt").write_bytes(b"def\n\xff\n")
    (folder / "c.jsonl").write_bytes(b"")
    skipped = Skipped()
    assert [document.id for document in read(folder, base, skipped)] == ["a.txt"]
    assert list(skipped.rows) == [f"{folder}/b.txt:2", f"{folder}/c.jsonl:1"]


def test_bad_rows_are_listed_by_line_number():
    skipped = Skipped()
    for line in (10, 9, 2, 10):
        skipped.add(RowError("json", f"b.jsonl:{line}", "x", "y"))
    skipped.add(RowError("json", "a.jsonl:11", "x", "y"))
    assert [row.where for row in skipped.sorted()] == ["a.jsonl:11", "b.jsonl:2", "b.jsonl:9", "b.jsonl:10"]
    assert len(skipped.rows) == 4


def test_a_tokenizer_without_template(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    path = write(tmp_path / "a.jsonl", GOOD, {"messages": CHAT})
    tokenizer.chat_template = None
    with pytest.raises(RowError, match=r"a\.jsonl:2: the tokenizer has no chat template") as caught:
        list(documents(Data(source=str(path), held_out=0), tokenizer, part="all"))
    assert "`prompt` and `response`" in caught.value.hint
    tokenizer.chat_template = CHATML
    assert len(list(documents(Data(source=str(path), held_out=0), tokenizer, part="all"))) == 2
