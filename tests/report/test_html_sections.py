"""Sections of `report.html` that need more than a small run to fill: how what they hold is shown."""

import pytest
from reporting import Page, untraceable

from retrofit.report.html import charts
from retrofit.report.html.sections import SECTIONS
from retrofit.report.html.words import short

NASTY = "<img src=x onerror=alert(1)> & \x00 日本"


def stat(**changes):
    return {
        "n": 12, "value": 0.25, "original": 0.5, "delta": -0.25, "ci95": [-0.4375, -0.0625], "only_here": 1,
        "only_original": 4, "mcnemar_p": 0.375, "same_text": 3, **changes,
    }  # fmt: skip


QUALITY = {
    "asked": {"tasks": ["format", NASTY]},
    "tasks": [
        {"task": NASTY, "metric": "nats", "lower_is_better": True,
         "modes": {"ar": stat(ci95=None, mcnemar_p=None, only_here=None, only_original=None)}},
        {"task": "all", "metric": "accuracy", "lower_is_better": False,
         "modes": {"self_spec": stat(delta=0.0, ci95=[0.0, 0.0], value=0.5), "diffusion": stat()}},
    ],
    "answers": {"self_spec": {"items": 12, "equal": 9, "by_rounding": 2, "other": 1}},
    "differing": [{"mode": "diffusion", "task": NASTY, "item": "format-3", "original": NASTY, "answer": ""}],
    "skipped": [{"what": "mmlu", "why": NASTY}],
}  # fmt: skip
AGAINST = {
    "prompts": 6, "looping_share": 0.5,
    "rows": [
        {"way": way, "tokens_per_s": rate, "ratio_to_transformers": 0.75, "tokens_per_forward": 1.5,
         "small_forwards_per_token": 2.25, "equal_texts": 5}
        for way, rate in (("transformers", 30.0), ("auto", 45.5), (f"{NASTY}, fused", 12.25))
    ],
    "skipped": [{"what": "big", "why": "its vocabulary has 7 tokens"}],
}  # fmt: skip
SPEED_OF_LIGHT = {
    "slots": 4, "skipped": [{"what": "steps of many rows", "why": NASTY}],
    "oracle": [
        {"temperature": 0.8, "realised_tau": 1.75, "by_candidates": [
            {"candidates": 16, "cycles": 9, "tokens_per_cycle": 2.375, "accept_cond": [0.625, 0.375]},
        ]},
    ],
    "machine": {"read_gb_per_s": 28.4, "multiply_gflop_per_s": 158.25, "weight_bytes": 13509632, "weight_numbers": 5},
    "steps": [
        {"way": way, "rows": rows, "measured_ms": 16.5 * rows, "least_ms": 0.5, "bound_by": "reading",
         "share_of_best": 0.03125}
        for way, rows in (*(("ar", 2**power) for power in range(7)), ("fused", 80.25))
    ],
    "speedup": {"tokens_per_forward": 1.6875, "predicted": 0.4375, "measured": 0.3125},
}  # fmt: skip
RATES = {"ar_tokens_per_s": 65.125, "drafter_tokens_per_s": 110.5, "speedup": 1.6875}
OTHER_HARDWARE = {
    "kind": "projection", "dtype": "bfloat16", "fixed_ms": 15.5, "fixed_explained_ms": 0.5, "row_ms": 1.25,
    "row_explained_ms": 0.0625,
    "check": {
        "setting": NASTY, "kept": {"steps": [], "median_error_percent": 61.5, "worst_error_percent": 218.5},
        "scaled": {"steps": [], "median_error_percent": 41.5, "worst_error_percent": 98.25},
    },
    "devices": [
        {"device": name, "source": "a data sheet", "read_gb_per_s": 4800.0, "multiply_gflop_per_s": 989000.0,
         "kept": RATES, "scaled": {**RATES, "speedup": gain}}
        for name, gain in (("One", 0.875), (NASTY, 2.125), ("None", None))
    ],
}  # fmt: skip
FOUND = {
    "quality": QUALITY, "against": AGAINST, "speed_of_light": SPEED_OF_LIGHT, "other_hardware": OTHER_HARDWARE,
}  # fmt: skip


@pytest.mark.parametrize(("name", "found"), FOUND.items(), ids=FOUND)
def test_every_figure_is_found_and_texts_are_texts(name, found):
    page = Page(SECTIONS[name](found))
    assert untraceable(page, found, short) == []
    assert page.names() <= {
        *("div", "table", "thead", "tbody", "tr", "th", "td", "p", "span", "data", "code", "h3", "wbr"),
        *("figure", "figcaption", "b", "svg", "g", "path", "defs", "use", "text", "clippath", "rect"),
    }
    said = " ".join(page.said)
    assert "<img src=x onerror=alert(1)> & 日本" in " ".join(said.split()) and "\x00" not in said
    assert ("Left out: " in said) is bool(found.get("skipped"))


def test_a_difference_that_chance_explains_reaches_the_line():
    """Both ends of an interval stand where they are on one scale with 0."""
    pytest.importorskip("matplotlib")
    drawn = SECTIONS["quality"](QUALITY)
    assert "Tasks solved, against the base" in drawn and ">-0.25</text>" in drawn
    one = charts.intervals([charts.Mark("a", "ar", [-0.5, -0.25, 0.0])], "t")
    line, interval = (path for path in one.split("<path") if "stroke" in path and "d=" in path and " L " in path)
    zero = float(line.split('d="M ')[1].split()[0])
    left, right = (float(part.split()[0]) for part in interval.split('d="M ')[1].split('"')[0].split(" L "))
    assert right == pytest.approx(zero, abs=0.01) and left < right


def test_what_was_not_measured_is_not_drawn_nor_said():
    plain = {**SPEED_OF_LIGHT, "oracle": [], "speedup": None, "steps": SPEED_OF_LIGHT["steps"][:1]}
    page = SECTIONS["speed_of_light"](plain)
    assert "<figure" not in page and "drafts would be worth" not in page and "GB/s" in page


def test_a_projection_says_that_it_is_one():
    page = SECTIONS["other_hardware"](OTHER_HARDWARE)
    assert "Nothing here was measured there." in page
    if not charts.missing():
        assert "Projected, not measured" in page and ">0.875 to 1.688</text>" in page and ">1.688 to 2.125<" in page


def test_nothing_is_drawn_of_what_was_not_counted():
    nothing = {**QUALITY, "tasks": [], "answers": {}, "differing": [], "skipped": []}
    assert SECTIONS["quality"](nothing) == ""
    assert "<figure" not in SECTIONS["quality"]({**QUALITY, "tasks": QUALITY["tasks"][:1]})
