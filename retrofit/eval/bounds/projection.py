"""Step times of another machine, from those measured here and what is published of its memory and its products.

A step takes `fixed + rows x row` seconds: the line that fits those measured here.  At the speeds of this machine
reading the weights explains a part of `fixed`, and multiplying a part of `row`.  There, reading and multiplying take
what is published; of the rest nobody knows, so it is taken in two ways:

    kept      as many seconds as here: right for what is Python and launches
    scaled    in proportion to what it stands beside: right for reading and multiplying below full speed

A projection is as good as its check against a second setting that was measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from retrofit.eval.bounds.roofline import Need, Speeds
from retrofit.eval.bounds.rowcost import Cost


class Device(NamedTuple):
    """Published of one device: bytes a second of its memory; operations a second of dense bfloat16 products."""

    name: str
    speeds: Speeds
    source: str


DEVICES = (
    Device("NVIDIA H200 SXM", Speeds(4.8e12, 989e12), "NVIDIA H200 Tensor Core GPU data sheet"),
    Device("NVIDIA H100 SXM", Speeds(3.35e12, 989e12), "NVIDIA H100 Tensor Core GPU data sheet"),
    Device("NVIDIA A100 SXM 80 GB", Speeds(2.039e12, 312e12), "NVIDIA A100 Tensor Core GPU data sheet"),
    Device("AMD MI300X", Speeds(5.3e12, 1307e12), "AMD Instinct MI300X data sheet"),
    Device("NVIDIA RTX 4090", Speeds(1.008e12, 165.2e12), "NVIDIA Ada GPU architecture paper"),
    Device("NVIDIA L4", Speeds(0.3e12, 121e12), "NVIDIA L4 Tensor Core GPU data sheet"),
)
"""Half the products of a data sheet's figure with sparsity."""
ITEMSIZE = 2
"""Bytes of a weight there: bfloat16, which the products are published for."""


class Place(NamedTuple):
    """Seconds that a step's reading, and a row's multiplying, take somewhere at full speed."""

    reading: float
    multiplying: float

    @classmethod
    def of(cls, need: Need, speeds: Speeds) -> Place:
        return cls(need.bytes / speeds.read, need.flop(1) / speeds.multiply)


@dataclass(frozen=True)
class Line:
    """Seconds of a step here.  fixed: of any.  row: of a row more."""

    fixed: float
    row: float


def fitted(costs: Sequence[Cost]) -> Line:
    """The line through the steps whose relative errors are smallest, no part of it below 0.

    Raises ValueError for fewer than two different numbers of rows.
    """
    rows, times = (np.array([getattr(cost, name) for cost in costs]) for name in ("rows", "seconds"))
    if len(set(rows.tolist())) < 2:
        raise ValueError("a line needs steps of two different numbers of rows")
    (fixed, row), *_ = np.linalg.lstsq(np.stack([1 / times, rows / times], axis=1), np.ones(len(rows)), rcond=None)
    if row < 0:  # the best constant
        return Line(float(np.sum(1 / times) / np.sum(1 / times**2)), 0.0)
    if fixed < 0:  # the best line through nothing
        return Line(0.0, float(np.sum(rows / times) / np.sum((rows / times) ** 2)))
    return Line(float(fixed), float(row))


def kept(line: Line, here: Place, there: Place, rows: float) -> float:
    """Seconds of a step there, what is not explained being as long as here."""
    fixed = max(0.0, line.fixed - here.reading) + there.reading
    return fixed + rows * (max(0.0, line.row - here.multiplying) + there.multiplying)


def scaled(line: Line, here: Place, there: Place, rows: float) -> float:
    """Seconds of a step there, what is not explained growing and shrinking with what is."""
    fixed = line.fixed * there.reading / here.reading
    return fixed + rows * line.row * there.multiplying / here.multiplying


def errors(expected: Sequence[float], found: Sequence[float]) -> tuple[float, float]:
    """(median, worst) error of what was expected of some steps, in percent of what they took."""
    off = [100 * abs(a - b) / b for a, b in zip(expected, found, strict=True)]
    return median(off), max(off)
