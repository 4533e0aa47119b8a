"""The figures of mode `diffusion` as tables, for the terminal and for docs/numbers.md.  Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

CURVE, INFILLING = "diffusion, curve", "diffusion, infilling"
HEAD = ["mode", "tolerance", "threshold", "TPF", "rows per token", "agreement, %", "tokens right in a row"]


def rows_of(title: str, found: Mapping[str, Any]) -> list[list[str]]:
    """A head and the rows of one section's figures."""
    if title == CURVE:
        keys = ("tpf", "rows_per_token", "agreement_percent", "right_in_a_row")
        return [
            HEAD,
            *(
                [p["mode"], _shown(p["tolerance"]), _shown(p["threshold"]), *(f"{p[key]:.2f}" for key in keys)]
                for p in found["points"]
            ),
        ]
    ways = list(found["exact_percent"])
    rows = [[n, *(f"{of[way]:.1f}" for way in ways)] for n, of in found["by_length"].items()]
    return [["tokens hidden", *ways], *rows, ["all", *(f"{found['exact_percent'][way]:.1f}" for way in ways)]]


def markdown(sections: Mapping[str, Any]) -> str:
    """The tables of the sections of results/diffusion.json, one below the other."""
    parts = []
    for title in (CURVE, INFILLING):
        if title not in sections:
            continue
        figures = sections[title]["figures"]
        head, *rows = rows_of(title, figures)
        lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
        if title == CURVE:
            count = f"{figures['prompts']} prompts, {figures['max_new_tokens']} new tokens each, greedy"
        else:
            around = f"{figures['prefix']} tokens before and {figures['suffix']} behind"
            count = f"{figures['spans']} spans, {around}; exact matches, %"
        parts.append("\n".join([f"{count}:", "", *(f"| {' | '.join(line)} |" for line in lines)]))
    return "\n\n".join(parts)


def _shown(value: float | str | None) -> str:
    return "-" if value is None else str(value)
