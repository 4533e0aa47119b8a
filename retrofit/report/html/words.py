"""What a page says: numbers that keep their full value, text that is text and no markup, tables.

A number stands in `<data value=...>` with what `report.json` holds, and is shown short.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from typing import Any

from retrofit.report.html.colours import colour
from retrofit.report.markdown import number as short_or_text

Data = Mapping[str, Any]
MOST_LETTERS = 160
"""Of one text: prompts have names as long as they like."""
SENTENCE = 1000
"""Of one of our own sentences, in which such a text may stand."""
MOST_ROWS, MOST_REASONS = 300, 20
"""Of one table, and of what a section left out."""
LONG_NAME = 12
"""Letters from which a name may be broken."""
BREAK, NONE = "⏎", "\N{EN DASH}"
"""The end of a line within a text, and a figure that has no value."""


def clean(value: Any, most: int = MOST_LETTERS) -> str:
    """What a model or a person wrote, in one line, without letters that nobody sees."""
    line = "".join(BREAK if c in "\n\r" else c for c in str(value) if c.isprintable() or c in "\n\r")
    return line if len(line) <= most else f"{line[: most - 1]}…"


def text(value: Any, most: int = MOST_LETTERS) -> str:
    """The same as HTML."""
    return escape(clean(value, most))


def short(value: float) -> str:
    """Four digits of a number that is not whole."""
    return short_or_text(value)


def number(value: float | None, unit: str = "") -> str:
    """A figure of `report.json`; a dash for one that has no value."""
    return NONE if value is None else exactly(value, short(value) + unit)


def percent(value: float | None) -> str:
    """A share."""
    return NONE if value is None else exactly(value, f"{short(round(100 * value, 4))} %")


def megabytes(value: int | None) -> str:
    return NONE if value is None else exactly(value, short(value / 1e6))


def exactly(value: float, shown: str, kind: str = "") -> str:
    """A figure as `report.json` has it, shown as something shorter.  kind: its class."""
    named = f' class="{kind}"' if kind else ""
    return f'<data value="{value!r}"{named}>{escape(shown)}</data>'


def numbers(values: Iterable[float | None]) -> str:
    return " ".join(map(number, values)) or NONE


def cell(value: Any) -> str:
    """Whatever `report.json` may hold that is no list and no object."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if value is None or isinstance(value, int | float) else text(value)


def table(header: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """header: plain text.  rows: HTML.  Of very many rows the first."""
    rows = list(rows)
    if not rows:
        return ""
    right = [place > 0 and all(_is_number(row[place]) for row in rows) for place in range(len(header))]
    head = "".join(_cell("th", text(name), number) for name, number in zip(header, right, strict=True))
    body = "".join(
        f"<tr>{''.join(_cell('td', content, number) for content, number in zip(row, right, strict=True))}</tr>"
        for row in rows[:MOST_ROWS]
    )
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    more = "" if len(rows) <= MOST_ROWS else paragraph("The other rows are in <code>report.json</code>.", "faint")
    return f'<div class="{f"table {kind}".strip()}" tabindex="0"><table>{top}<tbody>{body}</tbody></table></div>{more}'


def _is_number(content: str) -> bool:
    return content in ("", NONE) or (content.startswith("<data") and content.endswith("</data>"))


def _cell(tag: str, content: str, right: bool) -> str:
    return f'<{tag} class="n">{content}</{tag}>' if right else f"<{tag}>{content}</{tag}>"


def pairs(rows: Iterable[tuple[str, str]]) -> str:
    """A table of names and what they are.  names: plain text; the others: HTML."""
    return table(["", ""], [(f"<b>{text(name)}</b>", value) for name, value in rows], "pairs")


def paragraph(content: str, kind: str = "") -> str:
    return f'<p class="{kind}">{content}</p>' if kind else f"<p>{content}</p>"


def tinted(name: str) -> str:
    """With the colour of its mode; a long name may go on in the next line."""
    broken = text(name).replace("_", "_<wbr>") if len(name) > LONG_NAME else text(name)
    return f'<span class="way" style="--way: var(--{colour(name)})">{broken}</span>'


def where(cell: Data) -> list[str]:
    """Tokens before the output, and temperature."""
    return [number(cell[key]) for key in ("context_tokens", "temperature")]


def left_out(skipped: Sequence[Data]) -> str:
    """What a section had to leave out, each with its reason."""
    said = [f"{_what(one)}: {text(one.get('reason', one.get('why')))}" for one in skipped[:MOST_REASONS]]
    return paragraph(f"Left out: {'; '.join(said)}.", "faint") if said else ""


def _what(one: Data) -> str:
    if "what" in one:
        return text(one["what"])
    return ", ".join(f"{text(named(key))} {cell(value)}" for key, value in one.items() if key != "reason")


def named(key: str) -> str:
    """A key of `report.json` as a word."""
    return key.replace("_", " ")


def figure(title: str, said: str, picture: str) -> str:
    """A picture under its title and a sentence; nothing where there is no picture.  title, said: plain text."""
    if not picture:
        return ""
    return f"<figure><figcaption><b>{text(title)}</b> {escape(said)}</figcaption>{picture}</figure>"


def figures(*drawn: str) -> str:
    """Pictures beside each other where there is room."""
    some = "".join(drawn)
    return f'<div class="figures">{some}</div>' if some else ""


def drawing(title: str, said: str, draw: Callable[..., str], *drawn: Any, **options: Any) -> str:
    """The figure that `draw` makes, to which title and sentence are what it is called where it is not seen."""
    return figure(title, said, draw(*drawn, f"{title}. {said}", **options))
