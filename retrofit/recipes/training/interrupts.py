"""Ctrl-C and SIGTERM during a conversion: at once, except where something would be left half-done.

A signal raises KeyboardInterrupt or SystemExit(143) where the program stands, so that a step of minutes does not
delay it.  In a `held` block (weights move, a checkpoint or an artifact is written) it waits for the end of the
block.  A second signal waits for nothing, if it comes INSIST_SECONDS after the first or later: launchers such as
torchrun, and terminals, send the same wish twice at once.
Not here: what is saved.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INSIST_SECONDS = 2.0
"""Seconds from which a second signal is meant as one."""


class Interrupts:
    """Context manager: signal handlers inside it are ours.  Other threads than the main one get no signals."""

    def __init__(self) -> None:
        self.second_signal = False
        """Whether there was a second signal that meant it."""
        self._first: int | None = None
        self._since = 0.0
        self._depth = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only that one may set signal handlers
            # one that is ignored, as Ctrl-C is by jobs in the background, stays so
            numbers = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    @contextmanager
    def held(self) -> Iterator[None]:
        """A block that the first signal does not cut short."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0:
            self.check()

    def check(self) -> None:
        """Raise for a signal that came meanwhile, or whose exception a library swallowed."""
        if self._first is not None:
            _raise_for(self._first)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._first is None:
            self._first, self._since = number, time.monotonic()
            if self._depth == 0:
                _raise_for(number)
        elif time.monotonic() - self._since >= INSIST_SECONDS:
            self.second_signal = True
            _raise_for(number)


def _raise_for(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)
