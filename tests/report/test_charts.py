"""Pictures of a report: they show what they were given, in colours that can be told from what they stand on."""

import re
import sys
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from reporting import small

from retrofit.report import document
from retrofit.report.html import charts
from retrofit.report.html.charts import Mark, Point
from retrofit.report.html.colours import COLOURS, MODES, WAYS, colour
from retrofit.report.html.picture import picture
from scripts import draw_docs

NASTY = "<b> & $\\frac{$ 日本 \x00"


def said(svg):
    return [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("text")]


def widths(svg):
    """Of every bar, from the corners of its path."""
    paths = re.findall(r'd="M ([\d.]+) [\d.]+ L ([\d.]+) [\d.]+ L [^"]*z"[^>]*var\(--', svg)
    return [float(right) - float(left) for left, right in paths]


def test_a_bar_is_as_long_as_its_value():
    pytest.importorskip("matplotlib")
    drawn = charts.bars([Mark("ar", "ar", [1.0]), Mark("fused", "self-spec", [2.5]), Mark("none", "ar", [None])], "t")
    one, other = widths(drawn)
    assert other == pytest.approx(2.5 * one, rel=1e-4)
    assert said(drawn) == ["ar", "1", "fused", "2.5"]
    assert said(charts.bars([Mark("nothing", "ar", [0.0])], "t")) == ["nothing", "0"]
    assert charts.bars([Mark("none", "ar", [None])], "t") == charts.lines([], [], "t") == ""


def test_the_same_numbers_give_the_same_picture_and_others_other_names():
    pytest.importorskip("matplotlib")
    curve = [Point(1.0, 100.0, "ar", "ar"), Point(1.5, 80.0, "0.9", "diffusion"), Point(2.0, 60.0, "0.5", "diffusion")]
    first, again = (charts.curve(curve, "a", across="x", up="y") for _ in range(2))
    other = charts.curve(curve, "b", across="x", up="y")
    assert first == again
    ids = [set(re.findall(r'id="([^"]*)"', svg)) for svg in (first, other)]
    assert ids[0] and not ids[0] & ids[1]


@pytest.mark.parametrize("draw", [
    lambda mark: charts.bars([mark], NASTY),
    lambda mark: charts.spans([Mark(mark.name, mark.colour, [1.0, 2.0])], NASTY),
    lambda mark: charts.lines([mark], [NASTY], NASTY, even=NASTY, below=NASTY),
    lambda mark: charts.curve([Point(1.0, 1.0, NASTY, "ar")], NASTY, across=NASTY, up=NASTY),
], ids=["bars", "spans", "lines", "curve"])  # fmt: skip
def test_names_are_text(draw, recwarn):
    pytest.importorskip("matplotlib")
    drawn = draw(Mark(NASTY, "ar", [1.0]))
    assert "<b> & $\\frac{$ 日本 " in said(drawn)
    assert "\x00" not in drawn and not recwarn.list


def test_lines_that_end_together_have_names_apart():
    pytest.importorskip("matplotlib")
    marks = [Mark(f"line {number}", "ar", [1.0, 0.5 + number / 1000], faint=True) for number in range(5)]
    drawn = ElementTree.fromstring(charts.lines(marks, ["1", "2"], "t"))
    heights = sorted(float(e.attrib["y"]) for e in drawn.iter("text") if (e.text or "").startswith("line"))
    assert min(b - a for a, b in pairwise(heights)) >= charts.APART - 0.01


def test_settings_of_the_machine_change_no_picture():
    matplotlib = pytest.importorskip("matplotlib")
    mark = Mark("ar", "ar", [1.0])
    plain = charts.bars([mark], "t")
    with matplotlib.rc_context({"savefig.bbox": "tight", "font.size": 30, "svg.fonttype": "path"}):
        assert charts.bars([mark], "t") == plain
        assert matplotlib.rcParams["font.size"] == 30


def test_a_matplotlib_that_cannot_be_imported_is_none(monkeypatch):
    charts.missing.cache_clear()
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        assert charts.missing() and charts.bars([Mark("ar", "ar", [1.0])], "t") == ""
    charts.missing.cache_clear()


@pytest.mark.parametrize(
    ("heights", "moved"),
    [
        ([], []),
        ([50], [50]),
        ([10, 80, 40], [10, 80, 40]),
        ([50, 50, 52], [50, 60, 70]),
        ([95, 94, 20], [100, 90, 20]),  # the highest stays below 100, and pushes the next down
    ],
)
def test_names_are_moved_as_little_as_needed(heights, moved):
    assert charts.apart(heights, 10, 0, 100) == moved


def contrast(one, other):
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05) of relative luminances."""

    def luminance(hexed):
        parts = [int(hexed[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_contrast_is_that_of_wcag():
    assert contrast("#ffffff", "#000000") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("dark", [False, True], ids=["paper", "dark"])
@pytest.mark.parametrize("name", sorted(set(COLOURS) - {"paper", "card", "rule"}))
def test_every_colour_can_be_read(name, dark):
    for ground in ("paper", "card"):
        assert contrast(COLOURS[name][dark], COLOURS[ground][dark]) >= 4.5


def test_a_mode_has_one_colour():
    assert colour("fused, batch 8") == colour("auto") == colour("two_forward") == "self-spec"
    assert colour("other-artifact, fused") == "self-spec" and colour("transformers assisted=small") == "base"
    assert colour("who knows") == "ink"
    assert {MODES[way] for way in WAYS} == set(COLOURS) - {"ink", "faint", "rule", "paper", "card", "bad"}
    assert len({pair[0] for pair in COLOURS.values()}) == len(COLOURS)


def test_the_picture_of_a_report(made, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.MonkeyPatch.context() as patch:
        data = small(patch, made).data
    drawn = picture(data)
    texts = said(drawn)
    assert "Tokens per second, for one user" in texts and "Tokens per forward" in texts
    assert {"the base", "ar", "self_spec", "diffusion"} <= set(texts)
    cell = data["sections"]["speed"]["data"]["cells"][0]
    assert charts.short(cell["ways"]["auto"]["tokens_per_s_user"]) in texts
    assert "prefers-color-scheme: dark" in drawn and "<script" not in drawn
    assert re.findall(r'https?:[^"]*', drawn) == ["http://www.w3.org/2000/svg"]
    document.write(tmp_path, data, {})
    assert list(draw_docs.report_picture(tmp_path).values()) == [drawn]
    assert draw_docs.report_picture(tmp_path / "elsewhere") == {}
    nothing = {name: {"status": "pending", "reason": "x"} for name in data["sections"]}
    assert "Neither speed nor drafts were measured yet." in said(picture({**data, "sections": nothing}))
    monkeypatch.setattr(charts, "missing", lambda: True)
    assert any("pip install 'retrofit-lm[report]'" in text for text in said(picture(data)))
