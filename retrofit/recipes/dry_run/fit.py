"""Whether a conversion fits into so much memory, and what to change so that it does.

Changes are tried from those that leave the result of training as it is to those that cost quality.
Not here: the estimate itself (`estimate.py`), how it is shown (`report.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from retrofit.errors import UsageError
from retrofit.recipes.schema import FIELDS, Recipe, by_key
from retrofit.runtime.options import bytes_of

LEAST_LENGTH, LEAST_ANCHORS, LEAST_RANK = 128, 8, 8
"""Below these no change is proposed: what is left would not be worth training."""

Change = dict[str, Any]
"""Overrides by dotted key."""


@dataclass(frozen=True)
class Suggestion:
    """Overrides that make it fit, and the peak they lead to, in bytes."""

    overrides: tuple[str, ...]
    peak: int


def parse_size(text: str) -> int:
    """Bytes of `24GB`, `22.5GiB`, `800MB` or a plain number.  Raises UsageError."""
    found = bytes_of("--fit", text)
    if found < 1:
        raise UsageError(f"--fit {text}: nothing fits into that", "write a number above 0")
    return found


def short(size: float) -> str:
    """`1.66 GB`."""
    for unit, one in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= one:
            return f"{size / one:.3g} {unit}" if size < 1000 * one else f"{size / one:,.0f} {unit}"
    return f"{size:.0f} bytes"


def steps_down(plan: Recipe) -> list[list[Change]]:
    """What can be changed, in the order in which to try: of each kind of change the mildest first."""
    train, floor = plan.train, max(LEAST_LENGTH, plan.draft.block + 1)
    documents = train.batch_size * train.accumulation
    kinds: list[list[Change]] = [
        [
            {"train.batch_size": size, "train.accumulation": documents // size}
            for size in range(train.batch_size - 1, 0, -1)
            if documents % size == 0
        ],
        [{"train.checkpointing": True}] if by_key(plan).get("train.checkpointing") is False else [],
        [_bfloat16(plan)] if _bfloat16(plan) else [],
        [_shorter(plan, n) for n in _halves(plan.data.max_length, floor)],
        [{"train.anchors": n} for n in _halves(train.anchors, LEAST_ANCHORS)],
        _ranks(plan),
        [{"adapter.markov_init": "zero"}] if plan.adapter.markov_rank and plan.adapter.markov_init == "base" else [],
    ]
    return [kind for kind in kinds if kind]


def changed(plan: Recipe, change: Mapping[str, Any]) -> Recipe:
    """The recipe with other values; those of `steps_down` are valid."""
    content = plan.model_dump()
    for key, value in change.items():
        section, _, name = key.partition(".")
        content[section][name] = value
    return Recipe.model_validate(content)


def suggestions(plan: Recipe, limit: int, peak: Callable[[Recipe], int]) -> tuple[list[Suggestion], Suggestion]:
    """(changes that make it fit, and the smallest peak that was found).

    Each kind of change by itself, as mild as it can be, in the order of `steps_down`; where none is enough, one of
    several together: each kind at its strongest, until one is enough at its mildest, and no kind that is not needed.
    """
    kinds = steps_down(plan)
    known: dict[tuple[str, ...], int] = {}

    def needs(change: Change) -> int:
        key = _written(change)
        if key not in known:
            known[key] = peak(changed(plan, change))
        return known[key]

    def mildest(kind: list[Change], others: Change) -> Change | None:
        """The first that fits; a stronger one takes less."""
        if needs({**others, **kind[-1]}) > limit:
            return None
        low, high = 0, len(kind) - 1
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if needs({**others, **kind[middle]}) <= limit else (middle + 1, high)
        return {**others, **kind[low]}

    found = [change for kind in kinds if (change := mildest(kind, {})) is not None]
    if not found:
        combined: Change = {}
        for number, kind in enumerate(kinds):
            change = mildest(kind, combined)
            if change is not None:
                for earlier in kinds[:number]:
                    less = {key: value for key, value in change.items() if key not in earlier[0]}
                    if needs(less) <= limit:
                        change = less
                found.append(change)
                break
            combined |= kind[-1]
    fitting = [Suggestion(_written(change), needs(change)) for change in found]
    least = min(known, key=lambda key: known[key], default=())
    return fitting, Suggestion(least, known.get(least, 0))


def _shorter(plan: Recipe, length: int) -> Change:
    """No window longer than this."""
    mixed = plan.data.lengths
    if max(mixed, default=0) <= length:
        return {"data.max_length": length}
    return {"data.max_length": length, "data.lengths": [min(length, one) for one in mixed]}


def _bfloat16(plan: Recipe) -> Change:
    if plan.base.dtype != "auto":
        return {"base.dtype": "bfloat16"} if plan.base.dtype == "float32" else {}
    return {"train.precision": "bfloat16"} if plan.train.precision == "float32" else {}


def _ranks(plan: Recipe) -> list[Change]:
    """LoRA and Markov head get smaller together."""
    lora = [plan.adapter.rank, *_halves(plan.adapter.rank, LEAST_RANK)]
    markov = [plan.adapter.markov_rank, *_halves(plan.adapter.markov_rank, LEAST_RANK)]
    changes = []
    for number in range(1, max(len(lora), len(markov))):
        rank, head = lora[min(number, len(lora) - 1)], markov[min(number, len(markov) - 1)]
        changes.append({"adapter.rank": rank, "adapter.markov_rank": head})
    return changes


def _halves(value: int, least: int) -> list[int]:
    found = []
    while value // 2 >= least:
        value //= 2
        found.append(value)
    return found


def _written(change: Mapping[str, Any]) -> tuple[str, ...]:
    """As it is given on the command line."""
    assert change.keys() <= FIELDS.keys()
    return tuple(f"{key}={str(value).lower()}" for key, value in change.items())
