"""The one picture of a report: tokens per second and tokens per forward of each mode, beside the base.

It stands on top of the page, and as `report.svg` in a model card or a README.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from retrofit.report.headline import first_cells, swept
from retrofit.report.html import charts
from retrofit.report.html.charts import ROW, Mark
from retrofit.report.html.colours import MAIN, colour, variables
from retrofit.report.html.words import clean, figure, figures, short

Data = Mapping[str, Any]
FASTEST = (("the base", "transformers"), ("ar", "ar"), ("self_spec", "auto"), ("diffusion", "diffusion"))
"""A mode's name and the way of decoding that stands for it."""
SURE = 0.9
"""Threshold of the sweep that is drawn."""
WIDE, EDGE, HEAD, FOOT = 840, 24, 104, 52
"""Of the picture, in pixels: its width, and the room around and between, above and below its two halves."""
WITHOUT = "Drawn with matplotlib, which is not installed here: pip install 'retrofit-lm[report]'"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"


@dataclass(frozen=True)
class Half:
    """One idea: bars of one measure.  said: where it was measured."""

    title: str
    said: str
    marks: Sequence[Mark]

    def drawn(self) -> str:
        return charts.bars(self.marks, f"{self.title}. {self.said}")


def hero(data: Data) -> str:
    """The picture's halves as figures of the page."""
    return figures(*(figure(half.title, half.said, half.drawn()) for half in halves(data)))


def picture(data: Data) -> str:
    """An SVG file that follows the screen it is shown on.  What cannot be drawn it says, and what to do about it."""
    found = data["sections"]["compared"].get("data", {})
    name = clean((found.get("artifact") or {}).get("name", "a live engine"), 60)
    base = clean((found.get("base") or {}).get("model", "its base"), 60)
    machine = found.get("hardware", {})
    title, foot = (
        f"{name} beside {'its original' if name == base else base}",
        f"{machine.get('gpu') or machine.get('cpu') or ''}",
    )
    some = [] if charts.missing() else list(halves(data))
    height = HEAD + ROW * max((len(half.marks) for half in some), default=0) + FOOT
    parts = [_text(EDGE, 38, title, size=18, weight="bold")]
    for number, half in enumerate(some):
        left = EDGE + number * (WIDE / 2)
        parts += [_text(left, 70, half.title, weight="bold"), _text(left, 89, half.said, size=13, fill="faint")]
        parts.append(_placed(half, left))
    if not some:
        parts.append(_text(EDGE, 70, WITHOUT if charts.missing() else "Neither speed nor drafts were measured yet."))
    said = f"{foot}; suite {data['suite']}, {data['date'][:10]}".removeprefix("; ")
    parts.append(_text(EDGE, height - 20, clean(said), size=13, fill="faint"))
    return _file(parts, height, f"{title}: tokens per second and tokens per forward, by mode")


def _placed(half: Half, left: float) -> str:
    where = f'x="{left:g}" y="{HEAD}" width="{WIDE / 2 - EDGE:g}" height="{ROW * len(half.marks)}"'
    return half.drawn().replace("<svg ", f'<svg {where} preserveAspectRatio="xMinYMin" ', 1)


def _file(parts: Sequence[str], height: int, title: str) -> str:
    light, dark = (f":root {{ {variables(dark)} }}" for dark in (False, True))
    opened = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDE} {height}" width="{WIDE}" height="{height}" '
        f'role="img" aria-label={quoteattr(title)} font-family="{FONT}">'
    )
    style = f"<style>{light} @media (prefers-color-scheme: dark) {{ {dark} }}</style>"
    ground = '<rect width="100%" height="100%" rx="10" style="fill: var(--paper); stroke: var(--rule)"/>'
    return "\n".join([opened, style, ground, *parts, "</svg>", ""])


def _text(x: float, y: float, content: str, *, size: int = 15, weight: str = "normal", fill: str = "ink") -> str:
    style = f"font-size: {size}px; font-weight: {weight}; fill: var(--{fill})"
    return f'<text x="{x:g}" y="{y:g}" style="{style}">{escape(content)}</text>'


def halves(data: Data) -> Iterator[Half]:
    """Those that were measured."""
    done = {name: section["data"] for name, section in data["sections"].items() if section["status"] == "done"}
    if cells := first_cells(done):
        cell = min(cells, key=lambda one: one["batch_size"])
        said = (
            f"Batch {short(cell['batch_size'])}, {short(cell['context_tokens'])} tokens before,"
            f" T = {short(cell['temperature'])}"
        )
        marks = [
            Mark(name, colour(way), [cell["ways"][way]["tokens_per_s_user"]], way not in MAIN)
            for name, way in FASTEST if way in cell["ways"] and cell["ways"][way]["tokens_per_s_user"] is not None
        ]  # fmt: skip
        yield Half("Tokens per second, for one user", said, marks)
    if marks := list(_per_forward(done)):
        said = "All forwards after the prompt are counted"
        yield Half("Tokens per forward", said, marks)


def _per_forward(done: Mapping[str, Data]) -> Iterator[Mark]:
    sweep = {name: point["tpf"] for name, _, point in swept(done["diffusion"])} if "diffusion" in done else {}
    if sweep.get("ar") is not None:
        yield Mark("ar", "ar", [sweep["ar"]], faint=True)
    if "acceptance" in done:
        one = done["acceptance"]["by_temperature"][0]
        said = f"T = {short(one['temperature'])}"
        drafted, looked = one["drafter"]["tpf"], one["prompt_lookup"]["tpf"]
        yield from [Mark(f"self_spec, {said}", "self-spec", [drafted])] if drafted is not None else []
        yield from [Mark(f"prompt lookup, {said}", "lookup", [looked], faint=True)] if looked is not None else []
    if sweep.get("default") is not None:
        yield Mark("diffusion", "diffusion", [sweep["default"]], faint=True)
    elif sweep.get(SURE) is not None:
        yield Mark(f"diffusion, threshold {short(SURE)}", "diffusion", [sweep[SURE]], faint=True)
