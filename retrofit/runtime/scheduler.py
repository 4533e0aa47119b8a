"""Which requests run together: a queue, and slots of the K/V cache.  Knows no mode and no token value."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from retrofit.runtime.request import Request


class Scheduler:
    """Continuous batching: a request takes a slot when one is free and gives it back when it is done."""

    def __init__(self, requests: Iterable[Request], batch_size: int):
        self.waiting: deque[Request] = deque(requests)
        self.running: list[Request] = []
        self.free = list(range(batch_size))

    def __bool__(self) -> bool:
        return bool(self.waiting or self.running)

    def admit(self) -> list[Request]:
        """Give free slots to waiting requests, first come first served; returns the newly running ones."""
        admitted = []
        while self.waiting and self.free:
            request = self.waiting.popleft()
            request.slot = self.free.pop(0)
            admitted.append(request)
        # Neighbouring slots in order let the cache be read as a view.
        self.running = sorted([*self.running, *admitted], key=lambda r: r.slot)
        return admitted

    def retire(self) -> list[Request]:
        """Take out the requests that are done and free their slots."""
        done = [r for r in self.running if r.done]
        for request in done:
            self.free.append(request.slot)
        self.free.sort()
        self.running = [r for r in self.running if not r.done]
        return done
