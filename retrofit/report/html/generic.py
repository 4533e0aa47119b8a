"""Whatever a section holds, as tables: for sections that have no page of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from retrofit.report.html.words import cell, named, pairs, table, text

UNSHOWN = ("trace",)
"""Raw counts that figures are computed from."""
WIDEST = 12
"""Columns of a table."""
SHORT = 8
"""Values that a list may have and stand in one cell."""


def generic(data: Any, level: int = 3) -> str:
    """Objects become pairs, lists of objects tables; what lies deeper comes below, under its name."""
    if isinstance(data, Mapping):
        return _object(data, level)
    if _is_rows(data):
        return _rows(data, level)
    return table([""], [[_short(value)] for value in data]) if isinstance(data, list) else f"<p>{cell(data)}</p>"


def _object(data: Mapping[str, Any], level: int) -> str:
    shown = {key: value for key, value in data.items() if key not in UNSHOWN}
    flat = {key: value for key, value in shown.items() if _is_short(value)}
    parts = [pairs((named(key), _short(value)) for key, value in flat.items())]
    if len(shown) > 1 and not flat and all(_is_flat(value) for value in shown.values()):
        return _rows([{"": key, **value} for key, value in shown.items()], level)
    for key, value in shown.items():
        if key not in flat and value:
            parts += [f"<h{level}>{text(named(key))}</h{level}>", generic(value, min(level + 1, 6))]
    return "".join(parts)


def _rows(rows: Sequence[Mapping[str, Any]], level: int) -> str:
    """A table of what is short in every row; where an object lies in a row, its parts are columns too."""
    flat = [dict(_flattened(row)) for row in rows]
    columns = list(dict.fromkeys(key for row in flat for key in row))[:WIDEST]
    cells = [[_short(row[key]) if key in row else "" for key in columns] for row in flat]
    deeper = [{key: value for key, value in row.items() if _is_rows(value)} for row in rows]
    below = "".join(generic(row, level) for row in deeper if row)
    return table([named(key) for key in columns], cells) + below


def _flattened(row: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in row.items():
        if key in UNSHOWN:
            continue
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{before}{key} ")
        elif _is_short(value):
            yield f"{before}{key}", value


def _is_short(value: Any) -> bool:
    """A number or a text, or a list of a few."""
    if isinstance(value, list):
        return len(value) <= SHORT and not any(isinstance(one, list | Mapping) for one in value)
    return not isinstance(value, Mapping)


def _is_flat(value: Any) -> bool:
    return isinstance(value, Mapping) and all(_is_short(one) for one in value.values())


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, Mapping) for one in value)


def _short(value: Any) -> str:
    return ", ".join(map(cell, value)) or "none" if isinstance(value, list) else cell(value)
