"""What drafts come to after so much training: tokens a verify cycle yields, against the draft rows trained on.

    tau(rows) = ceiling - gap * (rows / 10,000) ** -power

Fitted to conversions of one base, each with a schedule of its own length, since a run that is stopped half way is not
one of half the length.  A base that nobody has measured has no curve: nothing is foretold of it.
`curves.json` is written by `python -m benchmarks.drafts.scaling`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("curves.json")
UNIT = 10_000
"""Draft rows."""
POWERS = np.linspace(0.05, 1.5, 146)
"""Candidates for the power; the other two follow by least squares."""
FEWEST = 3
"""Runs that a curve is fitted to, at least."""


@dataclass(frozen=True)
class Curve:
    """least, most: draft rows of the shortest and the longest run it was fitted to."""

    ceiling: float
    gap: float
    power: float
    least: int
    most: int

    def tau(self, rows: float) -> float:
        """Tokens per verify cycle of a chain, drawn at T = 1, on held-out text; at least 1."""
        return max(1.0, self.ceiling - self.gap * (rows / UNIT) ** -self.power)


def fitted(points: Sequence[tuple[int, float]]) -> Curve:
    """points: (draft rows, tau), FEWEST or more.  Of all powers the one with the least squared error."""
    assert len(points) >= FEWEST
    rows, tau = np.array([point[0] for point in points], float), np.array([point[1] for point in points])

    def at(power: float) -> tuple[float, np.ndarray]:
        features = np.stack([np.ones_like(rows), -((rows / UNIT) ** -power)], 1)
        found = np.linalg.lstsq(features, tau, rcond=None)[0]
        return float(((features @ found - tau) ** 2).sum()), found

    power = min(POWERS, key=lambda one: at(one)[0])
    ceiling, gap = at(power)[1]
    return Curve(
        round(float(ceiling), 4), round(float(gap), 4), round(float(power), 3), int(rows.min()), int(rows.max())
    )


@cache
def curves() -> dict[str, Curve]:
    """By the base's name."""
    return {name: Curve(**values) for name, values in json.loads(FILE.read_text(encoding="utf-8")).items()}
