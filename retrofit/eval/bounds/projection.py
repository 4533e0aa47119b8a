"""Step times of another machine, from those measured here and what is published of its memory and its products.

    here     seconds(rows) = overhead + bytes / read + rows x row         row and the sum of the first two: fitted
    there    overhead + bytes there / read there + rows x row x multiply here / multiply there

Overhead (Python, launches) is kept as it is here, and so is the share of the machine's products that steps make use of:
no such thing is published.  A projection is as good as its check against a second setting that was measured.
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


@dataclass(frozen=True)
class Parts:
    """Seconds of a step besides reading.  overhead: of any.  row: of a row more."""

    overhead: float
    row: float


def fitted(costs: Sequence[Cost], need: Need, here: Speeds) -> Parts:
    """The line through the steps whose relative errors are smallest, no part of it below 0.

    Raises ValueError for fewer than two different numbers of rows.
    """
    rows, times = (np.array([getattr(cost, name) for cost in costs]) for name in ("rows", "seconds"))
    if len(set(rows.tolist())) < 2:
        raise ValueError("a line needs steps of two different numbers of rows")
    (fixed, row), *_ = np.linalg.lstsq(np.stack([1 / times, rows / times], axis=1), np.ones(len(rows)), rcond=None)
    if row < 0:
        fixed, row = 1 / float(np.mean(1 / times)), 0.0
    return Parts(max(0.0, float(fixed) - need.bytes / here.read), float(row))


def projected(parts: Parts, here: Speeds, there: Speeds, bytes_there: int, rows: float) -> float:
    """Seconds of a step of so many rows there."""
    return parts.overhead + bytes_there / there.read + rows * parts.row * here.multiply / there.multiply


def errors(expected: Sequence[float], found: Sequence[float]) -> tuple[float, float]:
    """(median, worst) error of what was expected of some steps, in percent of what they took."""
    off = [100 * abs(a - b) / b for a, b in zip(expected, found, strict=True)]
    return median(off), max(off)
