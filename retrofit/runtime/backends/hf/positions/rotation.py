"""Rotations that depend on the longest position of a call, computed by one thread at a time.

Not here: which positions may share a forward (`runtime/backends/context.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import nn

from retrofit.runtime.backends.hf.instead import instead, unbound


def lock_rotation(trunk: nn.Module) -> Callable[[], None]:
    """Let one thread at a time compute rotations that depend on the longest position of the call; returns the undo.

    Those modules keep in themselves the frequencies they picked, and read them again to use them.
    """
    undone: list[Callable[[], None]] = []
    for module in trunk.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        if any(kind == "longrope" or "dynamic" in (kind or "") for kind in kinds):
            undone.append(instead(module, _one_thread_at_a_time(module)))

    def undo() -> None:
        for one in undone:
            one()

    return undo


def _one_thread_at_a_time(module: nn.Module) -> Callable[..., Any]:
    forward, lock = unbound(module), threading.Lock()

    def locked(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return forward(self, *arguments, **named)
        with lock:
            return forward(self, *arguments, **named)

    return MethodType(locked, module)
