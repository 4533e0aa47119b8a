"""How figures are made of times: runs in turn, medians, ratios within a turn, the floor that memory sets.

Not here: what is timed.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from statistics import median
from typing import Any

import torch

from retrofit.eval.speed import in_turn

BUFFER_BYTES = 2 << 30
"""Read to measure the memory's bandwidth: several times what the largest caches hold."""

Turn = dict[str, float]


def interleaved(ways: Mapping[str, Callable[[], float]], turns: int) -> list[Turn]:
    """One figure of every way in each turn; who begins changes, so that a slow moment of the machine hits all alike."""
    return [{name: ways[name]() for name in in_turn(list(ways), turn)} for turn in range(turns)]


def medians(turns: Sequence[Turn]) -> Turn:
    """Of each way, over the turns."""
    return {name: median(turn[name] for turn in turns) for name in turns[0]}


def seconds(function: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    function()
    return time.perf_counter() - begin


def bandwidth(buffer_bytes: int = BUFFER_BYTES, repeats: int = 5) -> float:
    """Bytes a second that torch's threads read of a buffer, the fastest of some times."""
    buffer = torch.zeros(buffer_bytes // 4)
    return buffer_bytes / min(seconds(buffer.sum) for _ in range(repeats))


def floor_ms(weight_bytes: int, kv_bytes: int, bytes_per_second: float) -> float:
    """Milliseconds that reading the weights and the K/V once takes at least."""
    return 1000 * (weight_bytes + kv_bytes) / bytes_per_second


class Clock:
    """Exclusive times: what a section spends, less what the sections inside it do."""

    def __init__(self, now: Callable[[], float] = time.perf_counter, whole: Sequence[str] = ()):
        """whole: sections that keep what runs inside them."""
        self.spent: dict[str, float] = defaultdict(float)
        self._now, self._whole = now, set(whole)
        self._open: list[str] = []
        self._since = 0.0

    def enter(self, name: str) -> None:
        self._count()
        self._open.append(self._open[-1] if self._open and self._open[-1] in self._whole else name)

    def leave(self) -> None:
        self._count()
        self._open.pop()

    def _count(self) -> None:
        now = self._now()
        if self._open:
            self.spent[self._open[-1]] += now - self._since
        self._since = now

    @contextmanager
    def section(self, name: str) -> Iterator[None]:
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as a section."""

        @wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            with self.section(name):
                return function(*arguments, **options)

        return run
