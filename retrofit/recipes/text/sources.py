"""What a source of training text is: rows that say where they lie, read one by one, in two parts.

Held out is what is measured on; training never sees it.
Not here: where rows come from (`library.py`, `local.py`, `documents.py`).
"""

from __future__ import annotations

import hashlib
import heapq
import random
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Literal, NamedTuple, Protocol

import numpy as np

from retrofit.errors import DataError
from retrofit.recipes.text.formats import Content

Part = Literal["train", "held_out", "all"]
"""`all`: both, in the order of the source."""

SHUFFLE_BUFFER = 1000
"""Rows of a stream held for shuffling."""


class Row(NamedTuple):
    """One row, not yet read.  `read()` is None for one the source leaves out; `where` is its place, `file:line`."""

    id: str
    where: str
    read: Callable[[], Content | None]


class Source(Protocol):
    """Rows of a part; with `rng` in an order drawn from it."""

    def rows(self, part: Part, rng: random.Random | None = None) -> Iterator[Row]: ...


@dataclass(frozen=True)
class Indexed:
    """Rows that can be read in any order; only their ids are kept."""

    ids: Sequence[str]
    held_out: Sequence[int]
    read: Callable[[int], Content | None]
    where: Callable[[int], str]

    def rows(self, part: Part, rng: random.Random | None = None) -> Iterator[Row]:
        held = set(self.held_out)
        if part == "held_out":
            order = list(self.held_out)
        else:
            order = [index for index in range(len(self.ids)) if part == "all" or index not in held]
        if rng is not None:
            rng.shuffle(order)
        return (self._row(index) for index in order)

    def _row(self, index: int) -> Row:
        return Row(self.ids[index], self.where(index), lambda: self.read(index))


@dataclass(frozen=True)
class Streamed:
    """Rows that come one after the other, as from a network; the first `held_out` are held out."""

    open: Callable[[], Iterator[Row]]
    held_out: int

    def rows(self, part: Part, rng: random.Random | None = None) -> Iterator[Row]:
        if part == "held_out":
            return islice(self.open(), self.held_out)
        rows = islice(self.open(), self.held_out if part == "train" else 0, None)
        return rows if rng is None else _shuffled(rows, rng)


def _shuffled(rows: Iterator[Row], rng: random.Random) -> Iterator[Row]:
    buffer = list(islice(rows, SHUFFLE_BUFFER))
    for row in rows:
        pick = rng.randrange(len(buffer))
        buffer[pick], row = row, buffer[pick]
        yield row
    rng.shuffle(buffer)
    yield from buffer


def first_by_hash(ids: Sequence[str], name: str, count: int) -> list[int]:
    """Which rows are held out: `count` of them, never more than half.  Raises DataError where there is only one."""
    if count and len(ids) == 1:
        raise DataError(
            f"data.source {name}: one document cannot be both trained on and held out",
            "give more documents, or set data.held_out=0",
        )
    return heapq.nsmallest(min(count, len(ids) // 2), range(len(ids)), key=lambda index: stable_hash(ids[index]))


def document_rng(seed: int, epoch: int, document: str) -> np.random.Generator:
    """Generator keyed by (seed, epoch, document id)."""
    return np.random.default_rng([seed, epoch, zlib.crc32(document.encode())])


def stable_hash(text: str) -> int:
    """64 bits that are the same in every process, unlike `hash`."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
