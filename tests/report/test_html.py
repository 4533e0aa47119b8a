"""`report.html`: it says what `report.json` holds and nothing else, whatever models and prompts say."""

import copy
import re

import pytest
from reporting import Page, small, untraceable

from retrofit.report import document
from retrofit.report.html import charts
from retrofit.report.html.page import html
from retrofit.report.html.words import short
from retrofit.report.markdown import TITLES

NASTY = "<script>alert('x')</script> \"onload=\" $\\frac{$ & \n \u202e \x00\x1b[31m \ud800 日本 🙂"
MARKUP = {
    *("html", "head", "meta", "link", "title", "style", "body", "main", "header", "section", "nav", "footer", "div"),
    *("h1", "h2", "h3", "h4", "h5", "h6", "p", "ul", "li", "a", "b", "span", "code", "data", "wbr", "table", "thead"),
    *("tbody", "tr", "th", "td", "figure", "figcaption", "svg", "g", "path", "defs", "use", "text", "clippath", "rect"),
}


@pytest.fixture(scope="module")
def data(made):
    with pytest.MonkeyPatch.context() as patch:
        return small(patch, made, price=2.0).data


@pytest.fixture
def changed(data):
    return copy.deepcopy(data)


def found(data, name):
    return data["sections"][name]["data"]


def spoiled(value):
    """The same report with every text of a model, of a prompt or of a machine replaced."""
    if isinstance(value, dict):
        return {key: spoiled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [spoiled(item) for item in value]
    return f"{NASTY}{value}" if isinstance(value, str) else value


def asks_for_nothing(page):
    links = page.values("href", "src", "srcset", "action", "xlink:href", "background", "poster")
    assert [link for link in links if not link.startswith("#") and link != "data:,"] == []
    assert page.names() <= MARKUP
    assert [name for _, attrs in page.tags for name in attrs if name.startswith("on")] == []


def test_every_figure_is_one_of_the_report(data):
    page = html(data)
    assert untraceable(Page(page), data, short) == []
    assert len(Page(page).figures) > 200
    value, shown = Page(page).figures[-1]
    planted = page.replace(
        f'<data value="{value!r}">{shown}</data>', f'<data value="{value!r}">{value * 1.1:.4g}</data>'
    )
    assert untraceable(Page(planted), data, short) != []
    assert untraceable(Page(page.replace("</h1>", " 17.25</h1>")), data, short) == ["17.25 in 'made 17.25'"]


def test_sections_stand_in_the_order_of_the_report_and_what_is_missing_has_its_reason(data):
    page = html(data)
    titles = re.findall(r"<h2>(.*?)</h2>", page)
    done = [name for name, section in data["sections"].items() if section["status"] == "done"]
    assert titles[1:-2] == [TITLES[name] for name in done] and len(done) >= 8
    assert titles[-2:] == ["Not measured", "Figures by name"]
    for one in data["skipped"]:
        assert one["reason"] in page
    assert page.count("makes these figures again.") == len(done)
    for line in data["verdict"]["lines"]:
        assert line.replace("'", "&#x27;") in page
    assert [gate["name"] for gate in data["verdict"]["gates"] if f"<code>{gate['name']}</code>" not in page] == []


def test_a_page_asks_for_nothing(data):
    page = html(data)
    asks_for_nothing(Page(page))
    assert "<script" not in page and "@import" not in page and "http:" not in page and "https:" not in page
    assert not re.findall(r"url\((?!#)", page)
    assert len(page.encode()) < 1_000_000


@pytest.mark.parametrize("with_pictures", [True, False], ids=["drawn", "without matplotlib"])
def test_what_models_and_prompts_say_is_text(changed, with_pictures, monkeypatch):
    if not with_pictures:
        monkeypatch.setattr(charts, "missing", lambda: True)
    first = {"way": NASTY, "prompt": NASTY, "token": 3, "class": "bug", "ulp": None, "before": NASTY,
             "expected": NASTY, "got": NASTY}  # fmt: skip
    found(changed, "losslessness")["greedy"] |= {"worst": [first], "bug": 1}
    found(changed, "acceptance")["by_category"] = [
        {**found(changed, "acceptance")["by_category"][0], "category": NASTY + name} for name in "ab"
    ]
    found(changed, "speed")["cells"][0]["ways"][NASTY] = found(changed, "speed")["cells"][0]["ways"]["ar"]
    found(changed, "speed")["cells"][0]["ratio_to_ar"][NASTY] = 1.0
    found(changed, "speed")["cells"][0]["ratio_to_transformers"][NASTY] = 1.0
    changed["sections"][NASTY] = {"status": "done", "seconds": 1.0, "data": {NASTY: [{NASTY: NASTY}], "a": {NASTY: 1}}}
    for nasty in (changed, {**spoiled(changed), "status": "complete", "sections": _spoiled_sections(changed)}):
        page = html(nasty)
        asks_for_nothing(Page(page))
        assert not set("\x00\x1b\u202e\ud800") & set(page)
        assert "&lt;script&gt;" in page and "日本" in page
        assert page.encode("utf-8")


def _spoiled_sections(data):
    return {
        name: {**section, "data": spoiled(section["data"])} if section["status"] == "done" else section
        for name, section in data["sections"].items()
    }


def test_names_within_pictures_do_not_clash(data):
    pytest.importorskip("matplotlib")
    page = Page(html(data))
    ids = page.values("id")
    assert len(ids) == len(set(ids)) and page.names() >= {"svg", "use"}
    refers = [one[1:] for one in page.values("href") if one.startswith("#")]
    refers += re.findall(r"url\(#([^)]*)\)", " ".join(page.values("clip-path", "style")))
    assert set(refers) <= set(ids) and len(refers) > 10


def test_nothing_measured_yet(changed):
    for name in changed["sections"]:
        changed["sections"][name] = {"status": "pending", "reason": f"no {name} yet"}
    changed |= {"status": "partial", "figures": {}, "skipped": [{"section": "speed", "reason": "not run yet"}]}
    changed["verdict"] = {"ok": None, "lines": ["Nothing.", "Nothing.", "Nothing."], "gates": []}
    assert document.problem(changed) is None
    page = html(changed)
    assert "This report is partial" in page and "Nothing was judged" in page and "not run yet" in page
    asks_for_nothing(Page(page))


def test_some_sections_only(changed):
    for name in ("losslessness", "speed", "diffusion"):
        changed["sections"][name] = {"status": "skipped", "reason": "left out"}
    page = html(changed)
    assert untraceable(Page(page), changed, short) == []
    assert "Does it answer the same</h2>" not in page and "What the drafts are worth</h2>" in page


def test_figures_without_a_value(changed):
    """As of prompts that gave no token."""
    acceptance, speed = found(changed, "acceptance"), found(changed, "speed")
    nothing = {"tpf": None, "tau": None, "tau_macro": None, "rows_per_token": None, "looping_share": None,
               "accept_joint": [], "accept_cond": [], "tried": [], "requests": 0, "tokens": 0}  # fmt: skip
    for one in acceptance["by_temperature"]:
        one["drafter"] |= nothing
        one["prompt_lookup"] |= nothing
    acceptance |= {"by_category": [], "by_batch": [], "by_context": []}
    for cell in speed["cells"]:
        for way in cell["ways"].values():
            way |= {key: None for key in way if key not in ("requests", "tokens", "seconds_per_token")}
    found(changed, "diffusion")["points"] = []
    found(changed, "break_even")["by_context"] = []
    assert document.problem(changed) is None
    page = Page(html(changed))
    assert untraceable(page, changed, short) == []
    asks_for_nothing(page)


def test_one_prompt(made):
    with pytest.MonkeyPatch.context() as patch:
        one = small(patch, made, prompts=["def Ünï(日本):"], batch=[1], modes=["ar", "self_spec"]).data
    page = html(one)
    assert untraceable(Page(page), one, short) == []
    assert "mode diffusion was not asked for" in page


def test_a_very_large_report_is_still_a_page(changed):
    acceptance, speed = found(changed, "acceptance"), found(changed, "speed")
    category, cell = acceptance["by_category"][0], speed["cells"][0]
    acceptance["by_category"] = [{**category, "category": f"{number} {'&' * 500}"} for number in range(2000)]
    speed["cells"] = [{**cell, "batch_size": number + 1} for number in range(300)]
    rows = [{f"column {place}": "x" * 500 for place in range(30)} for _ in range(2000)]
    changed["sections"]["other"] = {"status": "done", "seconds": 1.0, "data": {"rows": rows}}
    page = html(changed)
    assert len(page.encode()) < 1_000_000
    assert "The other rows are in <code>report.json</code>." in page and "Too long for a page" in page


def test_a_section_that_nobody_knows_is_shown_as_tables(changed):
    changed["sections"]["new_one"] = {
        "status": "done", "seconds": 1.0,
        "data": {
            "share": 0.125, "ok": True, "names": ["a", "b"], "nothing": None,
            "tasks": [{"task": "copying", "delta": {"points": -1.5, "interval": [-2.5, 0.5]}, "trace": {"x": 987654}}],
            "by_mode": {"ar": {"score": 0.75}, "diffusion": {"score": 0.5}},
        },
    }  # fmt: skip
    page = html(changed)
    assert untraceable(Page(page), changed, short) == []
    part = page[page.index("<h2>New one</h2>") :]
    part = part[: part.index("</section>")]
    for said in ("share", ">0.125<", "yes", "a, b", "delta points", ">-1.5<", ">-2.5<", "by mode", ">0.75<"):
        assert said in part
    assert "987654" not in part and "987,654" not in part


def test_without_matplotlib_the_page_says_how_to_get_pictures(data, monkeypatch):
    monkeypatch.setattr(charts, "missing", lambda: True)
    page = html(data)
    assert "pip install 'retrofit-lm[report]'" in page
    assert "<svg" not in page and "<figure" not in page
    assert untraceable(Page(page), data, short) == []


def test_a_bug_and_a_failed_gate_are_seen(changed):
    changed["verdict"]["ok"] = changed["verdict"]["gates"][0]["ok"] = False
    found(changed, "losslessness")["greedy"]["by_way"] = {
        "fused, batch 2": {"texts": 2, "equal_texts": 1, "match": 5, "tie": 0, "near": 0, "bug": 3}
    }
    page = html(changed)
    assert "It does not pass" in page and "✗ failed" in page
    assert '<data value="3" class="bad">3</data>' in page
