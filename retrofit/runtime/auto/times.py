"""How long steps take here: learned from the steps themselves, by rows, by whether they draft, and by context.

    seconds(rows, drafts, context) = shape(rows, drafts) * ratio

The shape is what forwards usually cost, in a unit of no meaning; the ratio is measured / shape at the rows that have
been run, interpolated between them.  So the first step of a kind says something about all of them.  A figure is the
median of the last few, so that what has changed since (load, clock rate, another program) is forgotten.
Contexts are told apart by doublings; what was not run in one is carried over from the nearest, by what plain decoding
costs in both.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median

LAST = 9
"""Steps of a kind that its figure is the median of."""
PER_ROW, DRAFTING = 0.03, 0.4
"""The shape: what a row more, and drafting, cost of a step of one row; medians of models and machines measured here."""
STALE = 256
"""Steps after which a kind is forgotten that was run fewer than LAST times: the machine may have been slow then."""
SHORT = 256
"""Contexts up to here are one."""

Kind = tuple[bool, int, int]
"""drafts?, rows, doublings of the context."""


def doublings(context: int) -> int:
    return (context // SHORT).bit_length()


def shape(rows: int, drafts: bool) -> float:
    return 1 + PER_ROW * (rows - 1) + DRAFTING * drafts


@dataclass
class StepTimes:
    """What steps took.  Not safe to share between threads by itself."""

    seen: dict[Kind, deque[float]] = field(default_factory=dict)
    curves: dict[tuple[bool, int], list[tuple[int, float]]] = field(default_factory=dict)
    """What has been made of it since the last step."""
    taken: int = 0
    """Steps so far."""
    newest: dict[Kind, int] = field(default_factory=dict)
    """The last step of each kind."""

    def observe(self, rows: int, drafts: bool, seconds: float, context: int = 0) -> None:
        kind = drafts, rows, doublings(context)
        self.seen.setdefault(kind, deque(maxlen=LAST)).append(seconds)
        self.taken, self.newest[kind] = self.taken + 1, self.taken
        if self.taken % STALE == 0:
            self._forget_few()
        self.curves.clear()

    def _forget_few(self) -> None:
        """Not of the fewest rows without drafts: everything is held against `ar`."""
        fewest = min(self.rows(False), default=0)
        self.seen = {
            kind: some
            for kind, some in self.seen.items()
            if len(some) == LAST or self.taken - self.newest[kind] <= STALE or kind[:2] == (False, fewest)
        }

    def forget_drafting(self) -> None:
        self.seen = {kind: some for kind, some in self.seen.items() if not kind[0]}
        self.curves.clear()

    def rows(self, drafts: bool) -> list[int]:
        """Row counts of which anything is known."""
        return sorted({rows for kind, rows, _ in self.seen if kind == drafts})

    def steps(self, rows: int, drafts: bool) -> int:
        """How many steps of so many rows are known, of any context."""
        return sum(len(some) for (kind, n, _), some in self.seen.items() if (kind, n) == (drafts, rows))

    def typical(self, rows: int, drafts: bool, context: int) -> float | None:
        """Of a step just like this; None: there was none."""
        some = self.seen.get((drafts, rows, doublings(context)))
        return median(some) if some else None

    def seconds(self, rows: int, drafts: bool, context: int = 0) -> float:
        """Of a step; where nothing at all is known, in the unit of the shape."""
        curve = self._curve(drafts, doublings(context)) or self._curve(not drafts, doublings(context))
        return shape(rows, drafts) * _between(curve, rows)

    def figures(self) -> Iterator[tuple[int, bool, float, int]]:
        """What is known: rows, whether they draft, median seconds, and the context from which on that holds."""
        for (drafts, rows, doubled), some in self.seen.items():
            yield rows, drafts, median(some), SHORT << doubled >> 1 if doubled else 0

    def _curve(self, drafts: bool, at: int) -> list[tuple[int, float]]:
        """(rows, measured / shape) in rising order, at a context of so many doublings."""
        if (drafts, at) in self.curves:
            return self.curves[drafts, at]
        nearest: dict[int, int] = {}
        for kind, rows, there in self.seen:
            if kind == drafts and abs(there - at) < abs(nearest.get(rows, 1 << 30) - at):
                nearest[rows] = there
        found = []
        for rows, there in sorted(nearest.items()):
            carried = median(self.seen[drafts, rows, there]) * self._longer(there, at)
            found.append((rows, carried / shape(rows, drafts)))
        self.curves[drafts, at] = found
        return found

    def _longer(self, there: int, at: int) -> float:
        """What a step costs at one context to what it costs at another, by the fewest rows known at both."""
        if there == at:
            return 1.0
        both = [n for drafts, n, where in self.seen if not drafts and where == at and (False, n, there) in self.seen]
        if not both:
            return 1.0
        return median(self.seen[False, min(both), at]) / median(self.seen[False, min(both), there])


def _between(curve: list[tuple[int, float]], rows: int) -> float:
    """The ratio at so many rows; beyond the ends that of the end, and 1 where there is none."""
    if not curve:
        return 1.0
    at = bisect_left([n for n, _ in curve], rows)
    if at == 0 or at == len(curve):
        return curve[min(at, len(curve) - 1)][1]
    (n0, r0), (n1, r1) = curve[at - 1], curve[at]
    return r0 + (r1 - r0) * (rows - n0) / (n1 - n0)
