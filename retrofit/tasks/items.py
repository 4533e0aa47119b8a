"""Items of a quality task: what is asked and by what it is scored; those that come with the package.

    kind     fields besides id, category, level and kind                 scored by
    choice   prompt, options, answer (number of the right option)        the likeliest option
    text     text                                                        loss per token
    number   prompt, answer, take (first or last), stop                  the number in what is written
    format   prompt, rules, stop                                         every rule kept
    code     prompt, tests, stop                                         parsing, and running the tests

All were written for this project; levels go from 1 (a model of a few million parameters has a chance) to 3.
Not here: items of other people's benchmarks (`packaged.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retrofit.errors import UsageError
from retrofit.recipes.problems import did_you_mean

FOLDER = Path(__file__).with_name("embedded")
CATEGORIES = ("arithmetic", "cloze", "code", "format", "text")
"""One file each in FOLDER."""
SIZES: dict[str, int | None] = {"quick": 12, "standard": 30, "full": None}
"""Items of a category in a run of each size; None: all."""
LONGEST = {"number": 24, "format": 64, "code": 128}
"""Tokens that may be written for an item, by kind, where the item does not say."""


@dataclass(frozen=True)
class Item:
    """One thing asked.  fields: those of its kind, as in the table above."""

    id: str
    category: str
    level: int
    kind: str
    fields: Mapping[str, Any]

    @property
    def stop(self) -> tuple[str, ...]:
        """Texts that end what is written."""
        return tuple(self.fields.get("stop", ()))

    @property
    def max_new_tokens(self) -> int:
        """Tokens that may be written; 0 for a kind that is scored by likelihood."""
        return int(self.fields.get("max_new_tokens", LONGEST.get(self.kind, 0)))


def embedded(size: str = "quick", categories: Sequence[str] = CATEGORIES, limit: int | None = None) -> list[Item]:
    """The items of a run, those of a category spread evenly over its file, where they get harder.

    limit: at most so many of a category.  Raises UsageError for an unknown size or category, and a limit below 1.
    """
    if size not in SIZES:
        raise UsageError(f"suite is `{size}`{did_you_mean(size, list(SIZES))}", f"one of {', '.join(SIZES)}")
    unknown = next((name for name in categories if name not in CATEGORIES), None)
    if unknown is not None:
        raise UsageError(
            f"no category `{unknown}` of the embedded suite{did_you_mean(unknown, CATEGORIES)}",
            f"it has {', '.join(CATEGORIES)}",
        )
    return [item for name in categories for item in spread(read(name), fewest(SIZES[size], limit))]


def fewest(*limits: int | None) -> int | None:
    """The lowest of some limits, None being no limit.  Raises UsageError below 1."""
    given = [limit for limit in limits if limit is not None]
    if given and min(given) < 1:
        raise UsageError(f"limit is {min(given)}; it must be at least 1")
    return min(given, default=None)


def spread(items: Sequence[Item], count: int | None) -> list[Item]:
    """So many of the items, evenly over the list, the first among them; all where there are no more."""
    if count is None or count >= len(items):
        return list(items)
    return [items[number * len(items) // count] for number in range(count)]


def read(category: str) -> list[Item]:
    """All items of a category of the embedded suite, in the order of its file."""
    lines = (FOLDER / f"{category}.jsonl").read_text(encoding="utf-8").splitlines()
    return [item_of(json.loads(line), category) for line in lines]


def item_of(row: Mapping[str, Any], category: str) -> Item:
    """The item in a row of a file."""
    fields = {name: value for name, value in row.items() if name not in ("id", "level", "kind")}
    return Item(row["id"], category, row["level"], row["kind"], fields)


def digest(items: Sequence[Item]) -> str:
    """SHA-256 of the items, ids and order included: equal in two reports that asked the same."""
    rows = [[item.id, item.kind, dict(item.fields)] for item in items]
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
