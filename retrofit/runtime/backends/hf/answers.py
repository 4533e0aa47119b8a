"""What a model's configuration answers to the thread that runs a forward of ours, and to no other.

Transformers' modules ask their configuration at every call which attention and which experts to run.  Setting it for
the duration of a forward would set it for a forward of the user's in another thread too.  So, while a backend is open,
two properties of the configuration's class look first at what this thread runs; what the configuration holds is never
touched.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

ANSWERS = {"_attn_implementation": "attention", "_experts_implementation": "experts"}
"""Property of a transformers configuration -> field of `_Asked`."""


class _Asked(threading.local):
    """The configuration that this thread's forward of ours runs under, and its answers; None outside of one."""

    config: Any = None
    attention: str | None = None
    experts: str | None = None
    rows: Any = None
    """The forward's `ForwardContext`, for attention that is not handed its keyword arguments."""


_ASKED = _Asked()
_LOCK = threading.Lock()
_OPEN: dict[type, int] = {}
"""Class of configuration -> how many backends are open on models that have one."""
_BEFORE: dict[type, dict[str, Any]] = {}
"""Class of configuration -> the properties that it had of its own."""


@contextmanager
def answering(config: Any, attention: str, experts: str | None, rows: Any) -> Iterator[None]:
    """Let this configuration answer so, to this thread, until the end of the block.  `by_thread` must be in force.

    rows: what `rows_now` says meanwhile.
    """
    asked = _ASKED
    before = (asked.config, asked.attention, asked.experts, asked.rows)
    try:
        asked.config, asked.attention, asked.experts, asked.rows = config, attention, experts, rows
        yield
    finally:
        asked.config, asked.attention, asked.experts, asked.rows = before


def rows_now() -> Any:
    """The `ForwardContext` of the forward of ours that this thread runs; None: it runs none."""
    return _ASKED.rows


def by_thread(config: Any) -> Callable[[], None]:
    """Make configurations of this class answer by thread; returns the undo, which counts: the last one takes it off."""
    kind = type(config)
    with _LOCK:
        _OPEN[kind] = _OPEN.get(kind, 0) + 1
        if _OPEN[kind] == 1:
            _BEFORE[kind] = {name: kind.__dict__[name] for name in ANSWERS if name in kind.__dict__}
            for name, answer in ANSWERS.items():
                setattr(kind, name, _property(getattr(kind, name), answer))

    def undo() -> None:
        with _LOCK:
            _OPEN[kind] -= 1
            if _OPEN[kind]:
                return
            del _OPEN[kind]
            before = _BEFORE.pop(kind)
            for name in ANSWERS:
                delattr(kind, name)
            for name, own in before.items():
                setattr(kind, name, own)

    return undo


def _property(held: property, answer: str) -> property:
    """The property with this thread's answer before what the configuration holds."""
    holds = held.fget
    assert holds is not None

    def attention(config: Any) -> Any:
        return _ASKED.attention if _ASKED.config is config else holds(config)

    def experts(config: Any) -> Any:
        return _ASKED.experts if _ASKED.config is config else holds(config)

    return property({"attention": attention, "experts": experts}[answer], held.fset)
