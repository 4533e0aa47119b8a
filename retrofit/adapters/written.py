"""Whether somebody has changed the weights of a live model: K/V that they made are then of no use any more.

What goes through torch is seen: another tensor, another type, writing in place; not what is written by `.data`, in
inference mode to a tensor made in it, or by an optimizer with fused=True, which counts no write.
"""

from __future__ import annotations

from collections.abc import Hashable

from torch import Tensor, nn


def written(model: nn.Module) -> Hashable:
    """Where the weights of the base are, and how often they were written to."""
    return tuple(state(parameter) for name, parameter in model.named_parameters() if ".lora_" not in name)


def state(weight: Tensor) -> Hashable:
    """Where one is, and how often it was written to."""
    return weight.data_ptr(), weight.dtype, 0 if weight.is_inference() else weight._version
