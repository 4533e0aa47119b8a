"""Tables for people: at a terminal fitted to its width and coloured, elsewhere plain lines."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import click

GOOD = {"passed", "equal", "yes"}
BAD = {"failed", "DIFFER", "no", "skipped"}


def print_table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = ()) -> None:
    """Print rows of cells on stdout, in columns two spaces apart."""
    if sys.stdout.isatty():
        _print_rich(rows, header)
    else:
        click.echo(aligned([*([header] if header else []), *rows]))


def _print_rich(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=bool(header), header_style="bold")
    for name in header or rows[0]:
        table.add_column(name.strip(), overflow="fold")
    for row in rows:
        styles = ["green" if cell.strip() in GOOD else "red" if cell.strip() in BAD else "" for cell in row]
        table.add_row(*(Text(cell, style) for cell, style in zip(row, styles, strict=True)))
    Console().print(table)


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
