"""The levels of exactness, and what a self-test says of them; the same words for every backend.

    off         nothing is promised beyond rounding
    bucket      every decoding forward has one row count, so that products have one shape
    invariant   a row keeps its bits at any number of rows

Not here: the tests themselves (`exact.py` for our kernels, `exact_rows.py` for a model's own modules).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from retrofit.errors import GateError

EXACT = ("off", "bucket", "invariant")
HALF = (torch.bfloat16, torch.float16)
"""Types in which the order of addition parts texts."""


@dataclass(frozen=True)
class Check:
    """One line of a self-test's table."""

    what: str
    shape: str
    kernel: str
    """`ours`, or `library` where products of the library take part, as it is from now on."""
    rows: str
    """What was compared; where it is not equal, the first arrangement that differs."""
    equal: bool


def require_equal(checks: Iterable[Check], hint: str) -> None:
    """Raises GateError that names the first check which is not equal."""
    for check in checks:
        if not check.equal:
            raise GateError(
                f"{check.what} {check.shape}: on this machine a row's bits depend on the rows beside it "
                f"(kernel: {check.kernel}; seen with: {check.rows})",
                hint,
            )
