"""The numbers in README.md are drawn from results/, never typed."""

import json
from pathlib import Path

import pytest

from benchmarks import readme_numbers as numbers

SECTION = {
    "command": "python -m benchmarks.bars",
    "hardware": {
        "cpu": "Abacus",
        "threads": 2,
        "cores": 2,
        "versions": {"torch": "2.13.0"},
        "commit": None,
        "date": "2026-11-30 10:00 UTC",
    },
    "bars": [
        {"what": "TPF, fused, T = 0.8", "bar": ">= 1.65", "figure": "1.80", "met": True},
        {"what": "  looping outputs", "bar": "stated", "figure": "12%", "met": None},
    ],
}


def results(folder: Path) -> Path:
    (folder / "bars-cpu.json").write_text(json.dumps({"sections": {"tpf": SECTION}}))
    return folder


def test_readme_is_what_the_results_say():
    if not list(numbers.RESULTS.glob("*.json")):
        pytest.skip("no results yet")
    if not numbers.README.is_file():
        pytest.skip("no README yet")
    text = numbers.README.read_text(encoding="utf-8")
    assert text == numbers.redrawn(text, numbers.RESULTS), numbers.HINT


def test_only_the_block_is_replaced(tmp_path):
    text = f"top\n{numbers.BEGIN}\nold\n{numbers.END}\nbottom\n"
    new = numbers.redrawn(text, results(tmp_path))
    assert new.startswith(f"top\n{numbers.BEGIN}\n") and new.endswith(f"{numbers.END}\nbottom\n")
    assert "old" not in new
    assert "| TPF, fused, T = 0.8 | >= 1.65 | 1.80 | met |" in new
    assert "| looping outputs | stated | 12% |  |" in new
    assert "`python -m benchmarks.bars` on Abacus, 2 of 2 cores; torch 2.13.0; commit not committed" in new
    assert numbers.redrawn(new, tmp_path) == new


def test_without_results_it_says_so(tmp_path):
    assert "Not measured yet" in numbers.redrawn(f"{numbers.BEGIN}{numbers.END}", tmp_path)


@pytest.mark.parametrize("text", ["", numbers.BEGIN, numbers.END, f"{numbers.END}{numbers.BEGIN}"])
def test_missing_markers_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="numbers:begin"):
        numbers.redrawn(text, tmp_path)
