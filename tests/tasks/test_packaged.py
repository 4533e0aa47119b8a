"""Benchmarks read from installed packages, here from folders laid out as those packages are."""

import gzip
import json
import sys

import pytest

from retrofit.errors import DataError, ResourceError, UsageError
from retrofit.tasks import execution
from retrofit.tasks.packaged import GSM8K, HUMANEVAL, MT_BENCH, items, mt_bench
from retrofit.tasks.suite import score

PROMPT = 'def one():\n    """One."""\n'
PROBLEM = {
    "task_id": "T/0",
    "prompt": PROMPT,
    "entry_point": "one",
    "test": "METADATA = {}\n\n\ndef check(candidate):\n    assert candidate() == 1\n",
}


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Lay out a package with rows in its file; nothing else of the kind is found."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def laid_out(carried, rows):
        path = tmp_path / carried.package / carried.file
        path.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / carried.package / "__init__.py").write_text("raise RuntimeError('imported')")
        raw = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
        return path

    return laid_out


def test_gsm8k_of_either_package(install):
    install(GSM8K[1], [{"id": "g-13", "prompt": "How many?", "expected": "1,018", "source": "gsm8k"}])
    (item,) = items("gsm8k")
    assert (item.id, item.category, item.kind, item.max_new_tokens) == ("g-13", "gsm8k", "number", 256)
    assert item.fields["prompt"] == "Question: How many?\nAnswer:"
    assert score(item, " First 18. Then 1000 more, so 1018.", False)["scores"]["accuracy"] == 1.0
    install(GSM8K[0], [{"question": f"Q{n}?", "answer": f"It is 2 * {n}.\n#### {2 * n}"} for n in range(10)])
    assert [item.fields["answer"] for item in items("gsm8k", 5)] == ["0", "4", "8", "12", "16"]


@pytest.mark.skipif(not execution.find_spec("resource"), reason="no limits for processes")
def test_humaneval_is_run_with_its_own_tests(install):
    install(HUMANEVAL[0], [PROBLEM])
    (item,) = items("humaneval")
    assert score(item, "    return 1\n\n\ndef two():\n    return 2\n", True)["scores"] == {"parses": 1.0, "passes": 1.0}
    assert score(item, "    return 2\n", True)["scores"] == {"parses": 1.0, "passes": 0.0}


def test_prompts_of_mt_bench(install):
    install(MT_BENCH[0], [{"question_id": 81, "category": "writing", "turns": ["Write.", "Again."]}])
    (prompt,) = mt_bench()
    assert (prompt.id, prompt.category, prompt.turns) == ("81", "writing", ("Write.", "Again."))


@pytest.mark.parametrize("name", ["gsm8k", "humaneval"])
def test_a_package_that_is_not_there_is_named(name, monkeypatch):
    monkeypatch.setattr("retrofit.named_bases.find_spec", lambda package: None)
    with pytest.raises(ResourceError, match=f"{name} is read from the package") as error:
        items(name)
    assert error.value.hint.startswith("pip install ")


def test_what_is_no_task_and_what_has_changed(install):
    with pytest.raises(UsageError, match="did you mean"):
        items("gsm8")
    path = install(HUMANEVAL[0], [{"task_id": "T/0"}])
    with pytest.raises(DataError, match="not the humaneval that retrofit reads \\(KeyError: 'prompt'\\)"):
        items("humaneval")
    path.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="not the humaneval"):
        items("humaneval")
