"""The numbers in README.md are drawn from results/, never typed."""

import json
from pathlib import Path

import pytest

from benchmarks import readme_numbers as numbers
from benchmarks.gpu.bars import BARS, TITLES

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


def gpu_results(folder: Path, **bar: object) -> Path:
    """Two sections of a GPU, one of them skipped."""
    hardware = {**SECTION["hardware"], "gpu": "NVIDIA Abacus", "driver": "580.1", "commit": "0123456789ab"}
    ar = {**SECTION, "hardware": hardware, "bars": [{"figure": "91.0%", "met": True, **bar}]}
    sections = {"ar": ar, "rows": {**ar, "bars": [], "skipped": "0 s were left, it needs 20"}}
    (folder / "gpu-nvidia-abacus.json").write_text(json.dumps({"sections": sections}))
    return folder


def test_without_results_every_gpu_bar_is_not_measured(tmp_path):
    text = numbers.redrawn(f"{numbers.BEGIN}{numbers.END}", tmp_path)
    for what, bar in BARS.values():
        assert f"| {what} | {bar} | not measured |  |" in text
    assert text.count("| what |") == 1 and "`python -m benchmarks.gpu`" in text


def test_gpu_results_stand_beside_what_is_still_not_measured(tmp_path):
    what, bar = BARS["ar"]
    text = numbers.redrawn(f"{numbers.BEGIN}{numbers.END}", gpu_results(results(tmp_path), what=what, bar=bar))
    assert f"**{TITLES['ar']}**\n" in text and f"| {what} | {bar} | 91.0% | met |" in text
    assert "on NVIDIA Abacus, driver 580.1; torch 2.13.0; commit 0123456789ab" in text
    assert TITLES["rows"] not in text  # it has no figure
    assert text.count("not measured |") == len(BARS) - 1 and f"| {what} | {bar} | not measured" not in text
    assert text.index("TPF, fused") < text.index(what) < text.index("**GPU, not measured**")


def test_all_gpu_bars_measured_leave_no_table_without_figures(tmp_path):
    rows = [{"what": what, "bar": bar, "figure": "1", "met": True} for what, bar in BARS.values()]
    (tmp_path / "gpu-a.json").write_text(json.dumps({"sections": {"ar": {**SECTION, "bars": rows}}}))
    assert "not measured" not in numbers.redrawn(f"{numbers.BEGIN}{numbers.END}", tmp_path)


@pytest.mark.parametrize("text", ["", numbers.BEGIN, numbers.END, f"{numbers.END}{numbers.BEGIN}"])
def test_missing_markers_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="numbers:begin"):
        numbers.redrawn(text, tmp_path)
