"""Facts as text for people: what several commands show alike."""

from __future__ import annotations

from typing import Any


def facts(values: dict[str, Any], prefix: str = "") -> str:
    """`steps 600, loss.total 1.2`: nested keys by dotted path, numbers short."""
    parts = []
    for key, value in values.items():
        if isinstance(value, dict):
            parts.append(facts(value, f"{prefix}{key}."))
        else:
            parts.append(f"{prefix}{key} {_short(value)}")
    return ", ".join(part for part in parts if part)


def _short(value: Any) -> str:
    if isinstance(value, list):
        return f"[{' '.join(_short(item) for item in value)}]"
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def aligned(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
