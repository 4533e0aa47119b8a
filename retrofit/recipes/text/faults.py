"""Rows of training text that cannot be used: what is wrong with one, and the count of those left out.

A bad row stops whoever reads it, unless a `Skipped` is handed along; then it is counted and left out.
Not here: finding the faults, which is the work of those who read (`local.py`, `documents.py`, `formats.py`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from retrofit.errors import DataError

Made = TypeVar("Made")

KINDS = {
    "json": "not a JSON object",
    "field": "field missing or of another type",
    "encoding": "not UTF-8",
    "empty": "empty",
    "long": "line too long",
    "template": "refused by the chat template",
    "vocabulary": "token outside the model's vocabulary",
    "no_response": "no response token",
}


class RowError(DataError):
    """One row that cannot be used.  kind: a key of KINDS; where: `file:line`, with which the message begins."""

    def __init__(self, kind: str, where: str, problem: str, hint: str) -> None:
        super().__init__(f"{where}: {problem}", f"{hint}; or leave such rows out with --skip-bad")
        self.kind, self.where, self.problem, self.advice = kind, where, problem, hint


class Skipped:
    """Bad rows that were left out; a row is counted once, however often it is met."""

    def __init__(self) -> None:
        self.rows: dict[str, RowError] = {}
        """By place."""

    def add(self, error: RowError) -> None:
        self.rows.setdefault(error.where, error)

    def pack(self) -> list[list[str]]:
        """As JSON."""
        return [[row.kind, row.where, row.problem, row.advice] for row in self.rows.values()]

    def restore(self, packed: Iterable[Sequence[str]]) -> None:
        """Add what `pack` gave in an earlier run: rows are met again only from the epoch on that is gone on with."""
        for row in packed:
            self.add(RowError(*row))

    def counts(self) -> dict[str, int]:
        """Rows by kind of fault, in the order of KINDS, without those that did not occur."""
        met = Counter(error.kind for error in self.rows.values())
        return {kind: met[kind] for kind in KINDS if met[kind]}

    def sorted(self) -> list[RowError]:
        """By place, line 9 before line 10."""

        def place(error: RowError) -> list[tuple[int, str]]:
            return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", error.where)]

        return sorted(self.rows.values(), key=place)

    def line(self) -> str:
        """`skipped 3 bad rows (2 not a JSON object, 1 empty)`."""
        parts = ", ".join(f"{count} {KINDS[kind]}" for kind, count in self.counts().items())
        total = len(self.rows)
        return f"skipped {total} bad row{'' if total == 1 else 's'}" + (f" ({parts})" if parts else "")


def read_or_skip(skipped: Skipped | None, make: Callable[..., Made], *arguments: Any) -> Made | None:
    """What `make(*arguments)` returns; None for a bad row where those are skipped, else its RowError is raised."""
    try:
        return make(*arguments)
    except RowError as error:
        if skipped is None:
            raise
        skipped.add(error)
        return None
