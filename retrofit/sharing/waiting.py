"""Patience with the Hub, and an end to it: what may pass is tried again, and nothing waits for longer than a minute.

The Hub's library waits for an answer for ever, and sleeps for as long as a server asks.  Within `retried` both are
bounded, by hooks on the HTTP client that it shares with the rest of the process.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from retrofit.errors import RetrofitError
from retrofit.sharing.faults import LATER, PASSING, UnreachableError, causes, is_passing, refused

ANSWER = 15.0
"""Seconds without a byte after which a request is lost."""
COMMIT_ANSWER = 45.0
"""The same of a commit, which the Hub works at before it answers."""
GIVE_UP = 40.0
"""Seconds after its first try from which a request is not tried again."""
TRIES = 20
PAUSES = (1.0, 2.0, 4.0)
"""Seconds between tries of ours; requests that the library repeats by itself come before them."""
Found = TypeVar("Found")


class _Watch:
    """Since when, and how often, each request has gone unanswered."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.began = time.monotonic()
        self.first: dict[tuple[str, ...], float] = {}
        self.tries: Counter[tuple[str, ...]] = Counter()

    def asked(self, request: Any) -> None:
        key, now = _key(request), time.monotonic()
        self.tries[key] += 1
        if now - self.first.setdefault(key, now) > GIVE_UP or self.tries[key] > TRIES:
            problem = f"{self.name}: the Hub does not answer as it should, after {self.tries[key] - 1} tries"
            raise UnreachableError(problem, LATER)
        longest = COMMIT_ANSWER if _commits(request) else ANSWER
        limits = request.extensions.setdefault("timeout", {})
        for phase in ("connect", "read", "write", "pool"):
            limits[phase] = longest if limits.get(phase) is None else min(limits[phase], longest)

    def answered(self, response: Any) -> None:
        key = _key(response.request)
        wait = response.headers.get("Retry-After", "")
        if response.status_code in PASSING and wait.isdigit():
            if time.monotonic() - self.first.get(key, self.began) + int(wait) > GIVE_UP:
                raise UnreachableError(
                    f"{self.name}: the Hub asks to wait for {int(wait):,} s", "run it again after that"
                )
        elif response.status_code not in (*PASSING, 409) and not _streams(response.request):
            self.first.pop(key, None)
            self.tries.pop(key, None)


def retried(name: str, doing: str, call: Callable[[], Found], let: tuple[type[Exception], ...] = ()) -> Found:
    """What `call` returns.  It may be called several times, so whatever it does must be harmless when repeated.

    name, doing: see `refused`.  let: errors that the caller understands itself.  Raises one RetrofitError for all
    others.
    """
    watch, pauses = _Watch(name), iter(PAUSES)
    while True:
        try:
            with _watched(watch):
                return call()
        except let:
            raise
        except Exception as error:
            known = next((one for one in causes(error) if isinstance(one, RetrofitError)), None)
            if known is not None:
                raise known from None
            pause = next(pauses, None)
            if pause is None or not is_passing(error) or time.monotonic() - watch.began + pause > GIVE_UP:
                raise refused(error, name, doing) from error
            time.sleep(pause)


@contextmanager
def _watched(watch: _Watch) -> Iterator[None]:
    from huggingface_hub import get_session

    session = get_session()
    before = session.event_hooks
    session.event_hooks = {
        "request": [*before["request"], watch.asked],
        "response": [*before["response"], watch.answered],
    }
    try:
        yield
    finally:
        session.event_hooks = before


def _key(request: Any) -> tuple[str, ...]:
    return request.method, str(request.url), request.headers.get("Range", "")


def _commits(request: Any) -> bool:
    return request.method == "POST" and "/commit/" in request.url.path


def _streams(request: Any) -> bool:
    """Whether a good answer is only the beginning of a body that may break off, time and again at the same place."""
    return request.method == "GET" and "/resolve/" in request.url.path
