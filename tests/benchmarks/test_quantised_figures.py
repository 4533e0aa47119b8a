"""What the figures of quantised bases say, by hand: how a command ended, shares, ratios, and what is not run again."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.quantised import __main__ as quantised
from benchmarks.quantised import commands, drafting, tables
from benchmarks.readme_numbers import __main__ as readme_numbers

ABOUT = {
    "command": "c",
    "seconds": 1.0,
    "bars": [],
    "hardware": {"cpu": "x", "threads": 1, "cores": 2, "versions": {}, "commit": "a", "date": "d"},
}


def ran(code: int = 0, err: str = "", out: str = "") -> dict[str, Any]:
    return {"exit": code, "seconds": 1.0, "out": out, "err": err}


@pytest.mark.parametrize(
    ("code", "err", "said"),
    [
        (0, "wrote it in 3 s", "works"),
        (1, "loading\nError: it is gptq\nhint: use nf4", "refused (1): Error: it is gptq hint: use nf4"),
        (1, "Error: KeyError: x\nhint: not foreseen, so maybe a bug", "not foreseen: Error: KeyError: x"),
        (0, "Traceback (most recent call last)\nTypeError: y", "not foreseen: TypeError: y"),
        (-9, "Killed", "not foreseen: exit -9"),
    ],
)
def test_how_a_command_ended(code: int, err: str, said: str) -> None:
    assert commands.ended(ran(code, err)) == said


@pytest.mark.parametrize(
    ("ends", "same", "met"),
    [
        (("works", "works", "works"), True, True),
        (("works", "works", "works"), False, False),
        (("refused (1): Error: x",), False, True),
        (("works", "not foreseen: KeyError", "works"), False, False),
    ],
)
def test_use_is_met_where_it_works_or_is_refused(ends: tuple[str, ...], same: bool, met: bool) -> None:
    found = {part: {"ended": end} for part, end in zip(("convert", "self_spec", "ar"), ends, strict=False)}
    assert commands.bar_of_use("nf4", {**found, "same": same}).met is met


def test_a_certificate_needs_every_check() -> None:
    checks = {"gate": {"status": "passed"}, "bitwise": {"status": "skipped"}}
    found = {"prompts": 2, "tokens": 4, "ok": False, "exact": "off", "dtype": "bfloat16", "checks": checks}
    bar = commands.bar_of_certificate("int8", found)
    assert bar.met is False and bar.figure == "1 of 2, exact=off in bfloat16, bitwise skipped"


def test_only_nf4_has_a_bar_of_bytes() -> None:
    sizes = {"weights": 41, "running": 50, "loading": 120}
    found = {"plain": {"weights": 100, "running": 200, "loading": 110}, "nf4": sizes, "int8": {**sizes, "weights": 60}}
    four, _, loading, eight, *_ = commands.bars_of_weight(found)
    assert (four.figure, four.met, eight.figure, eight.met) == ("0.410", False, "0.600", None)
    assert loading.figure == "1.20", "of the plain weights' bytes"


def cell(trained: str, on: str, *taus: float) -> dict[str, Any]:
    return {"trained": trained, "on": on, "seeds": [{"tau": tau} for tau in taus]}


CELLS = {
    f"{trained} on {on}": cell(trained, on, *taus)
    for trained, on, taus in (
        ("shipped", "plain", (1.4, 1.6)), ("shipped", "nf4", (1.3, 1.4)), ("plain", "plain", (1.2,)),
        ("nf4", "nf4", (1.14,)),
    )
}  # fmt: skip


def test_an_adapter_is_held_against_its_like_on_plain_weights() -> None:
    bars = {bar.what: bar.figure for bar in drafting.bars_of(CELLS)}
    assert bars["tau, the shipped adapter, on plain"] == "1.500 (1.40 to 1.60)"
    assert bars["tau, the shipped adapter, on nf4"] == "1.350 (1.30 to 1.40); 0.900 of plain's"
    assert bars["tau, trained on nf4, on nf4"] == "1.140; 0.950 of plain's"


def test_the_table_has_a_line_for_each_way_of_holding(tmp_path: Path) -> None:
    weights = {"plain": {"weights": 100}, "nf4": {"weights": 41}}
    checks = {"checks": {"gate": {"status": "passed"}}, "prompts": 2, "tokens": 4}
    figures = ({"nf4": {"same": True}}, weights, {"nf4": checks}, CELLS)
    sections = {title: {**ABOUT, "figures": one} for title, one in zip(tables.STAGES, figures, strict=True)}
    (tmp_path / "quantised.json").write_text(json.dumps({"sections": sections}))
    text = readme_numbers.blocks("numbers.md", tmp_path)["quantised"]
    assert "| nf4 | 0.410 | equal | 1 of 1 checks, 2 texts of 4 tokens | 1.35 (1.30 to 1.40) | - | 1.14 (" in text
    assert "| plain | 1.000 | - | - | 1.50 (1.40 to 1.60) | 1.20 (" in text
    assert all(title in readme_numbers.TITLES for title in tables.STAGES)


def test_what_is_measured_is_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "RESULTS", tmp_path / "quantised.json")
    asked: list[str] = []

    def measure(name: str) -> dict[str, Any]:
        asked.append(name)
        return {"ended": name}

    for names in (["nf4"], ["nf4", "int8"]):
        quantised.stage(tables.USED, "c", names, measure, lambda found: [])
    assert asked == ["nf4", "int8"]
    written = json.loads((tmp_path / "quantised.json").read_text())["sections"]
    assert list(written[tables.USED]["figures"]) == ["nf4", "int8"]
