"""The numbers in docs/numbers.md, docs/index.md and README.md are drawn from results/, never typed."""

import json
from pathlib import Path

import pytest

from benchmarks.gpu.bars import BARS, TITLES
from benchmarks.readme_numbers import __main__ as numbers
from benchmarks.readme_numbers import blocks as parts

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


BEGIN, END = numbers.markers("numbers")


@pytest.mark.parametrize("page", numbers.PAGES, ids=lambda path: path.name)
def test_pages_are_what_the_results_say(page):
    text = page.read_text(encoding="utf-8")
    assert text == numbers.redrawn(text, numbers.RESULTS, page.name), numbers.HINT


def test_every_section_that_has_figures_has_a_table():
    text = (numbers.ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
    for path in numbers.RESULTS.glob("*.json"):
        for section in json.loads(path.read_text())["sections"].values():
            rows = [f"| {bar['what'].strip()} | {bar['bar']} | {bar['figure']} |" for bar in section["bars"]]
            assert [row for row in rows if row not in text] == []
            assert not section["bars"] or parts.source(section) in text


def test_the_readme_has_figures_of_the_results():
    text = (numbers.ROOT / "README.md").read_text(encoding="utf-8")
    found = parts.Results(numbers.RESULTS)
    for figure in (
        found.figure("bars-cpu", "tpf", "TPF, fused, T = 0.8"),
        found.figure("bars-cpu", "speed", "seconds per token, auto / ar, T = 0.8, batch 1"),
        found.figure("bars-cpu", "conversion", "conversion of the embedded base"),
    ):
        assert f" {figure}" in text


def test_a_figure_that_was_not_measured_is_an_error(tmp_path):
    found = parts.Results(results(tmp_path))
    assert found.figure("bars-cpu", "tpf", "looping outputs") == "12%"
    with pytest.raises(ValueError, match="no figure 'TPF, fused, T = 2'"):
        found.figure("bars-cpu", "tpf", "TPF, fused, T = 2")
    with pytest.raises(ValueError, match="no section forwards"):
        found.figures("bars-cpu", "forwards")


def test_what_was_printed_is_shortened_in_the_middle_only():
    lines = [f"line {i}" for i in range(20)]
    assert parts.shortened(lines[:10]) == lines[:10]
    assert parts.shortened(lines) == ["line 0", "line 1", "...", *lines[-4:]]
    assert parts.shortened(["a" * 200]) == ["a" * 115 + "..."]


def test_only_the_block_is_replaced(tmp_path):
    text = f"top\n{BEGIN}\nold\n{END}\nbottom\n"
    new = numbers.redrawn(text, results(tmp_path))
    assert new.startswith(f"top\n{BEGIN}\n") and new.endswith(f"{END}\nbottom\n")
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
    text = numbers.redrawn(f"{BEGIN}{END}", tmp_path)
    for what, bar in BARS.values():
        assert f"| {what} | {bar} | not measured |  |" in text
    assert text.count("| what |") == 1 and "`python -m benchmarks.gpu`" in text


def test_gpu_results_stand_beside_what_is_still_not_measured(tmp_path):
    what, bar = BARS["ar"]
    text = numbers.redrawn(f"{BEGIN}{END}", gpu_results(results(tmp_path), what=what, bar=bar))
    assert f"**{TITLES['ar']}**\n" in text and f"| {what} | {bar} | 91.0% | met |" in text
    assert "on NVIDIA Abacus, driver 580.1; torch 2.13.0; commit 0123456789ab" in text
    assert TITLES["rows"] not in text  # it has no figure
    assert text.count("not measured |") == len(BARS) - 1 and f"| {what} | {bar} | not measured" not in text
    assert text.index("TPF, fused") < text.index(what) < text.index("**GPU, not measured**")


def test_all_gpu_bars_measured_leave_no_table_without_figures(tmp_path):
    rows = [{"what": what, "bar": bar, "figure": "1", "met": True} for what, bar in BARS.values()]
    (tmp_path / "gpu-a.json").write_text(json.dumps({"sections": {"ar": {**SECTION, "bars": rows}}}))
    assert "not measured" not in numbers.redrawn(f"{BEGIN}{END}", tmp_path)


@pytest.mark.parametrize("text", ["", BEGIN, END, f"{END}{BEGIN}"])
def test_missing_markers_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="numbers:begin"):
        numbers.redrawn(text, tmp_path)


def test_the_real_models_tables_have_each_figure_in_its_place(tmp_path):
    def rates(first: float) -> dict[str, dict[str, float]]:
        return {"tokens_per_s": {way: first + n for n, way in enumerate(parts.WAYS)}}

    speed = {
        kind: {
            **SECTION,
            "figures": {f"{kind}, batch 1, T = 0": rates(first), f"{kind}, batch 1, T = 0.8": rates(first + 10)},
        }
        for kind, first in (("bfloat16", 100.0), ("float32", 200.0))
    }
    tpf = {
        f"{name}, T = {at}": {"prompts": 8, "chain": {"tpf": value + n}}
        for n, name in enumerate(parts.BENCHMARKS)
        for at, value in (("0", 1.25), ("0.8", 1.5), ("1", 1.75))
    }
    sections = {f"speed, {kind}": section for kind, section in speed.items()}
    sections["acceptance, float32"] = {**SECTION, "figures": tpf}
    (tmp_path / "smollm2.json").write_text(json.dumps({"sections": sections}))
    drawn = parts.real_model(parts.Results(tmp_path)).splitlines()
    assert "| transformers' `generate` | 100.0 | 110.0 | 200.0 | 210.0 |" in drawn
    assert "| `ar` | 102.0 | 112.0 | 202.0 | 212.0 |" in drawn
    assert "| chain | 1.25 / 1.50 / 1.75 | 2.25 / 2.50 / 2.75 | 3.25 / 3.50 / 3.75 |" in drawn
