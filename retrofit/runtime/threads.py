"""How many CPU threads a small forward is worth.

Waking a second thread costs tens of microseconds an operation, and a decode step of a small model is hundreds of
operations of a few microseconds each.  The rule is a function of sizes only: choosing by measured time could give one
request different rounding on different runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

LEAST_WORK = 6e7
"""Multiply-adds x 2 of a step from which more than one thread pays: about a millisecond of one core."""


@contextmanager
def thread_limit(device: torch.device, work: float) -> Iterator[None]:
    """Run with one thread where `work` (floating-point operations of the forward) is too little to share.

    The number of threads is set back at the end, also on an error.  Nothing happens off the CPU.
    """
    before = torch.get_num_threads()
    if device.type != "cpu" or work >= LEAST_WORK or before == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
