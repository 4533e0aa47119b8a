"""A report as one HTML page: the verdict, its pictures and tables, what is missing and why.

It holds all it shows and asks for nothing: no script, no font, no picture from elsewhere, and a policy that forbids
them.  What models and prompts say is escaped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retrofit.report.html import charts
from retrofit.report.html.colours import variables
from retrofit.report.html.generic import generic
from retrofit.report.html.picture import hero
from retrofit.report.html.sections import SECTIONS
from retrofit.report.html.words import SENTENCE, exactly, named, number, pairs, paragraph, percent, text
from retrofit.report.markdown import TITLES

Data = Mapping[str, Any]
STYLE = Path(__file__).with_name("page.css")
MOST = 150_000
"""Letters of a section of which nobody said how it should look."""
READ = {
    "losslessness": "Tokens by how far they fall short of the base's likeliest: <b>match</b>; <b>tie</b> and"
    " <b>near</b>, which rounding explains; <b>bug</b>, which it does not. The base against itself is the noise"
    " that everything else has to be held against.",
    "quality": "Every item was answered by both, so that differences are within items; McNemar's p is the chance that"
    " answers this different come from models as good.",
    "acceptance": "TPF is tokens per forward after the prompt, all kinds of forwards counted; tau is tokens per cycle"
    " of drafting and verifying. On text that loops any drafter looks brilliant, prompt lookup most of all.",
    "speed": "All ways took turns over the same prompts; times against others are medians within turns.",
    "against": "The same prompts, decoded by others; forwards are those of the base's size.",
    "break_even": "Up to which batch size a way is no slower than <code>ar</code> of the same engine.",
    "diffusion": "Agreement is the share of tokens that are the base's own first choice. It is not quality."
    " Here the base takes nothing back; by default it does, as where speed and quality are measured.",
}
"""How to read a section.  HTML."""
TILES = {
    "equal_texts_share": "texts equal to the base's",
    "tpf": "tokens per forward",
    "speedup_batch_": "times as fast as plain decoding",
    "speedup_over_transformers_batch_": "times as fast as transformers",
}
"""Figures that stand on top, by name; of those that end so, of the first batch."""
VERDICTS = {
    True: ("Every gate is passed", "passed"),
    False: ("It does not pass", "failed"),
    None: ("Nothing was judged", ""),
}
WITHOUT = (
    "The pictures are missing, for matplotlib is not installed here: <code>pip install 'retrofit-lm[report]'</code>,"
    " then <code>retrofit report show ARTIFACT --html &gt; report.html</code>. The tables hold every figure."
)


def html(data: Data) -> str:
    """The whole page."""
    title = text(f"Report: {_name(data)}")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    light, dark = (f"{{ {variables(dark)} }}" for dark in (False, True))
    colours = f":root {light}\n@media screen and (prefers-color-scheme: dark) {{ :root {dark} }}"
    head = [
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">', '<link rel="icon" href="data:,">',
        f"<title>{title}</title>", f"<style>\n{colours}\n{STYLE.read_text(encoding='utf-8')}</style>", "</head>",
    ]  # fmt: skip
    body = ["<body>", "<main>", *_top(data), *_sections(data), *_end(data), "</main>", "</body>", "</html>"]
    return "\n".join([*head, *body, ""])


def _name(data: Data) -> str:
    found = _compared(data)
    return found["artifact"]["name"] if found and found["artifact"] else "a live engine"


def _compared(data: Data) -> Data | None:
    section = data["sections"]["compared"]
    return section["data"] if section["status"] == "done" else None


def _top(data: Data) -> Iterator[str]:
    verdict, found = data["verdict"], _compared(data)
    said, kind = VERDICTS[verdict["ok"]]
    yield f"<header><p class='over'>retrofit report, suite {text(data['suite'])}, {text(data['date'][:10])}</p>"
    yield f"<h1>{text(_name(data))}</h1>"
    if found:
        base, machine = (found["base"] or {}).get("model", "a live model"), found["hardware"]
        base = "its original" if base == _name(data) else base
        yield paragraph(f"beside {text(base)}, on {text(machine['gpu'] or machine['cpu'])}", "faint")
    yield "</header>"
    if data["status"] == "partial":
        yield paragraph("<b>This report is partial</b>: the same command goes on from here.", "note")
    if charts.missing():
        yield paragraph(WITHOUT, "note")
    yield f'<section class="verdict {kind}"><h2>{said}</h2>'
    yield f"<ul class='lines'>{''.join(f'<li>{text(line, SENTENCE)}</li>' for line in verdict['lines'])}</ul>"
    yield f"<div class='tiles'>{''.join(_tiles(data['figures']))}</div>"
    yield hero(data)
    if verdict["gates"]:
        yield f"<ul class='gates'>{''.join(map(_gate, verdict['gates']))}</ul>"
    yield "</section>"
    done = [name for name, section in data["sections"].items() if section["status"] == "done"]
    yield f"<nav>{' '.join(map(_link, done))}</nav>"


def _tiles(figures: Mapping[str, float]) -> Iterator[str]:
    for name, said in TILES.items():
        found = next((key for key in figures if key == name or (name.endswith("_") and key.startswith(name))), None)
        if found is None:
            continue
        value = figures[found]
        shown = percent(value) if found.endswith("_share") else exactly(value, f"{value:.2f}")
        batch = f", batch {text(found.removeprefix(name))}" if found != name else ""
        yield f"<div><b>{shown}</b><span>{text(said)}{batch}</span></div>"


def _gate(gate: Data) -> str:
    mark, kind = ("✓ passed", "good") if gate["ok"] else ("✗ failed", "bad")
    says = text(gate["says"], SENTENCE)
    return f'<li><b class="{kind}">{mark}</b> <code>{text(gate["name"])}</code> <span>{says}</span></li>'


def _link(name: str) -> str:
    return f'<a href="#{_anchor(name)}">{_title(name)}</a>'


def _title(name: str) -> str:
    return text(TITLES.get(name, named(name).capitalize()))


def _anchor(name: str) -> str:
    return "".join(c if c.isascii() and c.isalnum() else "-" for c in name)


def _sections(data: Data) -> Iterator[str]:
    for name, section in data["sections"].items():
        if section["status"] == "done":
            yield f'<section id="{_anchor(name)}"><h2>{_title(name)}</h2>'
            yield paragraph(READ[name], "read") if name in READ else ""
            yield _section(name, section["data"])
            yield paragraph(f"<code>{text(data['command'], SENTENCE)}</code> makes these figures again.", "command")
            yield "</section>"


def _section(name: str, found: Data) -> str:
    if name in SECTIONS:
        return SECTIONS[name](found)
    drawn = generic(found)
    return drawn if len(drawn) <= MOST else paragraph("Too long for a page; <code>report.json</code> has it.", "note")


def _end(data: Data) -> Iterator[str]:
    if data["skipped"]:
        yield '<section id="not-measured"><h2>Not measured</h2>'
        yield pairs((_plain(one["section"]), text(one["reason"])) for one in data["skipped"])
        yield "</section>"
    if data["figures"]:
        yield '<section id="figures"><h2>Figures by name</h2>'
        yield paragraph("As <code>--fail-under NAME=V</code> takes them.", "read")
        yield pairs((name, number(value)) for name, value in data["figures"].items())
        yield "</section>"
    yield f"<footer>retrofit {text(data['retrofit'])}. Every figure comes from <code>report.json</code>.</footer>"


def _plain(name: str) -> str:
    return TITLES.get(name, named(name))
