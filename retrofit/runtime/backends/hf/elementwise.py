"""Activations by one thread, so that their bits do not depend on how many rows there are.

Threads share the numbers of a tensor out evenly, wherever that cuts; the last few of each share fill no vector, and
torch computes those by another function, whose last bit may differ (`silu` in fp32 on three threads: of 4,864 numbers a
row, some in 18 rows are not those of one row alone).  One thread has one such end, behind the last row.  So too where
the rows are always as many, at `bucket`: there a row may stand at any place among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retrofit.adapters.one_call import one_call
from retrofit.runtime.backends.hf.instead import instead
from retrofit.runtime.backends.threads import thread_limit

if TYPE_CHECKING:
    from retrofit.runtime.backends.hf.backend import HFBackend

SHARED = 32768
"""Numbers from which torch lets a second thread help (at::internal::GRAIN_SIZE)."""
LANES = 32
"""Numbers that torch computes together on any CPU, at most."""
HOMES = ("torch.nn.modules.activation", "transformers.activations")
"""Where the classes of activations are."""


def by_one_thread(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function of x; alike however many rows x has."""
    if x.device.type != "cpu" or x.numel() <= SHARED:
        return function(x)
    return _alone(function, x)


@one_call
def _alone(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with thread_limit(x.device, 0.0):
        return function(x)


def in_lanes(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """An elementwise function of x [.., n]; alike whatever stands beside those n: on a CPU they fill whole vectors."""
    if x.device.type != "cpu":
        return function(x)
    n = x.shape[-1]
    return by_one_thread(function, F.pad(x, (0, -n % LANES)).contiguous())[..., :n]


def install(backend: HFBackend) -> None:
    """Let the trunk's activations run so in our forwards, until the backend is closed.  A second call does nothing."""
    for module in activations(backend.trunk):
        if "forward" not in module.__dict__:
            backend.until_closed(instead(module, _in_ours(backend, module)))


def activations(trunk: nn.Module) -> list[nn.Module]:
    """Modules that are a function of each number alone."""
    return [m for m in trunk.modules() if type(m).__module__ in HOMES and not any(True for _ in m.parameters())]


def _in_ours(backend: HFBackend, module: nn.Module) -> Callable[..., Any]:
    own, gate = module.forward, backend.gate

    def forward(x: Tensor, *rest: Any, **named: Any) -> Any:
        ours = gate.base_rows is not None and backend.exact != "off" and not torch.is_grad_enabled()
        if rest or named or not ours:
            return own(x, *rest, **named)
        return by_one_thread(own, x)

    return forward
