"""Draw docs/run.svg: one recorded run, a line for every forward, kept drafts and the base's own tokens in two colours.

Pure: from results/run-cpu.json (`scripts/record_run.py`) to the text of an SVG.  `scripts/draw_docs.py` writes it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

WIDTH = 800
COLUMNS = 2
LINE, TOP, BOTTOM, LEFT = 26, 92, 64, 24
"""Height of a forward's line, and the margins.  Unit: pixels."""
LETTER, PAD, GAP = 7.8, 5, 4
"""Width of a letter at 13 pixels in a monospaced font, room within a token's box, and between boxes."""
DRAFT, BASE, INK, FAINT, PAPER = "#bfe3c8", "#c9dcf5", "#1f2328", "#667079", "#ffffff"
VISIBLE = {"\n": "\\n", "\t": "\\t", " ": "\u00b7"}
"""How white space is shown."""


def recorded(results: Path) -> dict[str, Any]:
    """The recorded run."""
    sections = json.loads((results / "run-cpu.json").read_text(encoding="utf-8"))["sections"]
    run: dict[str, Any] = sections["forwards"]["figures"]
    return run


def svg(run: dict[str, Any]) -> str:
    """The picture."""
    prompt, *decoded = run["forwards"]
    tokens = sum(map(len, decoded))
    rows = -(-len(run["forwards"]) // COLUMNS)
    height = TOP + rows * LINE + BOTTOM
    title = f"{tokens} tokens in {len(decoded)} forwards after the prompt; token by token it takes {tokens}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="DejaVu Sans Mono, Menlo, Consolas, monospace" font-size="13" fill="{INK}">',
        f"<title>{escape(title)}</title>",
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="{PAPER}"/>',
        text(LEFT, 32, title, size=15, weight="bold"),
        text(LEFT, 56, f"prompt {run['prompt']!r}, temperature {run['temperature']}, seed {run['seed']}", fill=FAINT),
    ]
    for number, pieces in enumerate([prompt, *decoded]):
        column, row = divmod(number, rows)
        parts += line(number, pieces, LEFT + column * (WIDTH - LEFT) / COLUMNS, TOP + row * LINE)
    foot = height - 40
    parts += [
        *box(LEFT, foot, "a", DRAFT),
        text(LEFT + 26, foot + 14, "drafted by the adapter, kept: it is what the base says"),
        *box(LEFT + 476, foot, "a", BASE),
        text(LEFT + 502, foot + 14, "the base\u2019s own next token"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def line(number: int, pieces: list[str], x: float, y: float) -> list[str]:
    """One forward: its number, the drafts that were kept, and last the base's own token."""
    parts = [text(x + 22, y + 14, "prompt" if number == 0 else str(number), fill=FAINT, anchor="end", size=11)]
    if number == 0:
        parts = [text(x, y + 14, "prompt", fill=FAINT, size=11)]
    x += 30 if number else 48
    for place, piece in enumerate(pieces):
        last = place == len(pieces) - 1
        parts += box(x, y, shown(piece), BASE if last else DRAFT)
        x += width_of(shown(piece)) + GAP
    return parts


def shown(piece: str) -> str:
    """A token's text with its white space to be seen; of several blanks, how many."""
    blanks = len(piece) - len(piece.lstrip(" "))
    if blanks > 3:
        piece = f"{VISIBLE[' ']}\u00d7{blanks}{piece[blanks:]}"
    return "".join(VISIBLE.get(letter, letter) for letter in piece)


def width_of(label: str) -> float:
    return len(label) * LETTER + 2 * PAD


def box(x: float, y: float, label: str, fill: str) -> list[str]:
    width = width_of(label)
    return [
        f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="20" rx="3" fill="{fill}"/>',
        text(x + PAD, y + 14, label, length=len(label) * LETTER),
    ]


def text(
    x: float,
    y: float,
    content: str,
    *,
    fill: str = INK,
    size: int = 13,
    weight: str = "normal",
    anchor: str = "start",
    length: float | None = None,
) -> str:
    """length: how wide the letters are made, so that boxes fit in whatever font there is."""
    fitted = "" if length is None else f' textLength="{length:.1f}" lengthAdjust="spacingAndGlyphs"'
    return (
        f'<text x="{x:.1f}" y="{y}" fill="{fill}" font-size="{size}" font-weight="{weight}" '
        f'text-anchor="{anchor}" xml:space="preserve"{fitted}>{escape(content)}</text>'
    )
