"""Let a module of a live model run something else than its own `forward`, and give it back.

Not here: what it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from torch import nn


def instead(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Let a module run another `forward`; returns the undo, which gives back one that was the module's own."""
    before = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before

    return undo


def unbound(module: nn.Module) -> Callable[..., Any]:
    """The module's `forward` as a function of the module, so that a copy of the model runs the copy's."""
    forward = module.forward
    if isinstance(forward, MethodType) and forward.__self__ is module:
        return forward.__func__
    return lambda _, *arguments, **named: forward(*arguments, **named)
