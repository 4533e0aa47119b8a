"""How large the pieces are that work is cut into: a GPU wants larger ones than a CPU.

Each piece of code keeps its own sizes, as `{"cpu": .., "cuda": ..}`; here is how one of them is looked up.
Not here: the sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

_stand_in: str | None = None
"""The kind of device that tensors without memory stand in for."""


def size_for(sizes: Mapping[str, int], device: torch.device) -> int:
    """The size for a device; every other kind than the CPU is cut up as a GPU."""
    kind = _stand_in or device.type
    return sizes["cpu" if kind == "cpu" else "cuda"]


@contextmanager
def standing_in(kind: str) -> Iterator[None]:
    """Inside, whatever the device, sizes are those of this kind."""
    global _stand_in
    before, _stand_in = _stand_in, kind
    try:
        yield
    finally:
        _stand_in = before
