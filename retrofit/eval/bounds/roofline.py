"""What this machine can do at best, measured: bytes read and numbers multiplied a second, and what a step needs.

A step of n rows takes at least the longer of two times (the roofline of Williams, Waterman and Patterson, 2009):

    reading       bytes of the weights / bytes a second
    multiplying   n rows x 2 x numbers of the weights / operations a second

Weights are counted as they lie in memory, once each; of a table of embeddings that is no vocabulary projection as well
only a row is read.  Of experts all are counted, of K/V nothing: contexts are short where steps are timed.  On the fused
backend what of the adapter lies beside the base's weights is read with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from retrofit.adapters.attach import count
from retrofit.runtime.backends.threads import thread_limit

if TYPE_CHECKING:
    from retrofit.runtime.engine import Engine

LEAST_BYTES, MOST_BYTES = 1 << 20, 1 << 29
"""Of the buffer that is read: as large as the weights, since small ones stay in the processor's caches."""
SIDE = {"cpu": 512, "cuda": 4096}
"""Of the square matrices that are multiplied."""
TIMES = 7


@dataclass(frozen=True)
class Speeds:
    """read: bytes a second.  multiply: floating-point operations a second."""

    read: float
    multiply: float


@dataclass(frozen=True)
class Need:
    """Of a step of one row.  numbers: of the weights that it multiplies.  bytes: of them, as they lie in memory."""

    numbers: int
    bytes: int

    def flop(self, rows: float) -> float:
        return 2.0 * self.numbers * rows


def needed(engine: Engine) -> Need:
    """What a step of this engine's base reads and multiplies."""
    backend = engine.backend
    if backend.name == "fused":
        numbers = int(backend.work_per_row / 2)
    else:
        model = engine.attached.model
        numbers = count(engine.attached.base_parameters())
        inputs, outputs = model.get_input_embeddings(), model.get_output_embeddings()
        if outputs is not None and inputs.weight is not outputs.weight:
            numbers -= inputs.weight.numel()
    return Need(numbers, numbers * backend.dtype.itemsize)


def least_seconds(need: Need, speeds: Speeds, rows: float) -> float:
    """That a step of so many rows takes at best."""
    return max(need.bytes / speeds.read, need.flop(rows) / speeds.multiply)


def measured(need: Need, dtype: torch.dtype, device: torch.device) -> Speeds:
    """The machine's, with the threads that a step of one row reads with, and one of many multiplies with."""
    with thread_limit(device, need.flop(1)):
        read = read_speed(min(max(need.bytes, LEAST_BYTES), MOST_BYTES), device)
    with thread_limit(device):
        return Speeds(read, multiply_speed(dtype, device))


def read_speed(size: int, device: torch.device) -> float:
    """Bytes a second of a sum over a buffer of so many bytes, the fastest of some times."""
    buffer = torch.ones(size // 4, device=device)  # of zeros the system may hold one page for all
    return 4 * buffer.numel() / _fastest(buffer.sum, device)


def multiply_speed(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of a product of square matrices, the fastest of some times."""
    side = SIDE["cpu" if device.type == "cpu" else "cuda"]
    one, other = (torch.ones((side, side), dtype=dtype, device=device) for _ in range(2))
    return 2.0 * side**3 / _fastest(lambda: one @ other, device)


def _fastest(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls; results are waited for."""

    def once() -> float:
        begin = time.perf_counter()
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - begin

    return min(once() for _ in range(TIMES))
