"""Who decodes with a backend now, and whether it is still open.

A turn is one step of one call: admit, prefill, forward, retire.  Between two turns a call holds nothing, so a stream
that is never read to its end stands in nobody's way.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from retrofit.errors import UsageError


class Turns:
    """Turns of one backend: several threads at once, or, with a line to stand in, one after another."""

    def __init__(self, line: Line | None = None):
        self.line = line
        self.closed = False
        self._changed = threading.Condition()
        self._running: list[int] = []
        """Threads that are in a turn; one that runs a call within a call is here twice."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Run one step.  Raises UsageError when the backend has been closed."""
        if self.line is None:
            with self._counted():
                yield
            return
        with self.line.first(), self._counted():
            yield

    @contextmanager
    def _counted(self) -> Iterator[None]:
        me = threading.get_ident()
        with self._changed:
            self.check_open()
            self._running.append(me)
        try:
            yield
        finally:
            with self._changed:
                self._running.remove(me)
                self._changed.notify_all()

    def check_open(self) -> None:
        """Raises UsageError when the backend has been closed."""
        if self.closed:
            raise UsageError(
                "this engine is closed, and its model given back", "open another with Engine.load or Engine.from_model"
            )

    def end(self) -> bool:
        """Let no other turn begin, and wait for those that run; False: that was done before.

        Raises UsageError from inside a turn, which would wait for itself.
        """
        with self._changed:
            if threading.get_ident() in self._running:
                raise UsageError("close() was called by a step of this very engine", "call it after the step")
            if self.closed:
                return False
            self.closed = True
            while self._running:
                self._changed.wait()
            return True


class Line:
    """First come, first served: a lock that the threads waiting for it get in turn."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[int] = []

    @contextmanager
    def first(self) -> Iterator[None]:
        """Wait until everybody who came before has left.  Raises UsageError for a thread that is first already."""
        me = threading.get_ident()
        with self._changed:
            if me in self._waiting:
                raise UsageError(
                    "a step on the device was asked to run another one inside it",
                    "call the engine after the step; the fused backend runs one at a time",
                )
            self._waiting.append(me)
            try:
                while self._waiting[0] != me:
                    self._changed.wait()
            except BaseException:
                self._leave(me)
                raise
        try:
            yield
        finally:
            with self._changed:
                self._leave(me)

    def _leave(self, me: int) -> None:
        self._waiting.remove(me)
        self._changed.notify_all()
