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


@pytest.mark.parametrize(("name", "found"), [("quality", QUALITY), ("against", AGAINST)], ids=["quality", "against"])
def test_every_figure_is_found_and_texts_are_texts(name, found):
    page = Page(SECTIONS[name](found))
    assert untraceable(page, found, short) == []
    assert page.names() <= {
        *("div", "table", "thead", "tbody", "tr", "th", "td", "p", "span", "data", "code", "h3", "wbr"),
        *("figure", "figcaption", "b", "svg", "g", "path", "defs", "use", "text", "clippath", "rect"),
    }
    said = " ".join(page.said)
    assert "<img src=x onerror=alert(1)> & 日本" in " ".join(said.split()) and "\x00" not in said
    assert "Left out: " in said


def test_a_difference_that_chance_explains_reaches_the_line():
    """Both ends of an interval stand where they are on one scale with 0."""
    pytest.importorskip("matplotlib")
    drawn = SECTIONS["quality"](QUALITY)
    assert "Tasks solved, against the original" in drawn and ">-0.25</text>" in drawn
    one = charts.intervals([charts.Mark("a", "ar", [-0.5, -0.25, 0.0])], "t")
    line, interval = (path for path in one.split("<path") if "stroke" in path and "d=" in path and " L " in path)
    zero = float(line.split('d="M ')[1].split()[0])
    left, right = (float(part.split()[0]) for part in interval.split('d="M ')[1].split('"')[0].split(" L "))
    assert right == pytest.approx(zero, abs=0.01) and left < right


def test_nothing_is_drawn_of_what_was_not_counted():
    nothing = {**QUALITY, "tasks": [], "answers": {}, "differing": [], "skipped": []}
    assert SECTIONS["quality"](nothing) == ""
    assert "<figure" not in SECTIONS["quality"]({**QUALITY, "tasks": QUALITY["tasks"][:1]})
