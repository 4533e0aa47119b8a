"""The adapter on the draft rows of a draft forward, over the projections of a vLLM model.

vLLM fuses projections (q, k and v in one, gate and up in one); an update adds to the columns of its part.  It stands in
a module only while a draft forward runs: what vLLM runs, compiles and records of the model never has it, and a base row
is no operand of anything that involves the adapter.  Not here: several GPUs, each of which would hold a part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from retrofit.errors import ArtifactError

PREFIX, DOWN, UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
"""How PEFT names the tensors of a LoRA."""


@dataclass(frozen=True)
class Part:
    """What is added to some columns of a projection's output: scale * x down^T up^T."""

    columns: slice
    down: Tensor
    """[rank, in]."""
    up_scaled: Tensor
    """[columns, rank], times the scale."""


@dataclass(frozen=True)
class Update:
    """The parts of one module."""

    module: nn.Module
    parts: tuple[Part, ...]


def updates(
    model: nn.Module,
    fused: Mapping[str, Sequence[str]],
    adapter_state: Mapping[str, Tensor],
    scale: float,
    dtype: torch.dtype,
    device: torch.device,
) -> list[Update]:
    """What an adapter adds, by module.

    fused: name of a projection -> names of those it holds, in their order, as `packed_modules_mapping` of a vLLM model.
    adapter_state: tensors of `adapter_model.safetensors`; they are held in dtype on device.
    Raises ArtifactError for a tensor that has no place in the model.
    """
    modules = dict(model.named_modules())
    parts: dict[str, list[Part]] = {}
    for key in sorted(key for key in adapter_state if key.endswith(DOWN)):
        name = key.removeprefix(PREFIX).removesuffix(DOWN)
        down, up = adapter_state[key], adapter_state[key.removesuffix(DOWN) + UP]
        place = _place(modules, fused, name)
        if place is None or place[1].stop - place[1].start != len(up):
            raise ArtifactError(
                f"adapter_model.safetensors does not fit the model: {name} is not there, or of another size",
                "the artifact belongs to another base; check `retrofit inspect`",
            )
        held = (down.to(device, dtype), (up.float() * scale).to(device, dtype))
        parts.setdefault(place[0], []).append(Part(place[1], *held))
    return [Update(modules[name], tuple(found)) for name, found in parts.items()]


def _place(modules: Mapping[str, nn.Module], fused: Mapping[str, Sequence[str]], name: str) -> tuple[str, slice] | None:
    """The module that computes a projection, and in which columns of its output; None where none does."""
    if name in modules:
        return name, slice(0, int(getattr(modules[name], "output_size", 0)))
    stem, _, own = name.rpartition(".")
    for whole, held in fused.items():
        module = modules.get(f"{stem}.{whole}")
        if own in held and module is not None:
            sizes = [int(size) for size in getattr(module, "output_sizes", ())]
            number = list(held).index(own)
            if len(sizes) == len(held):
                return f"{stem}.{whole}", slice(sum(sizes[:number]), sum(sizes[: number + 1]))
    return None


@contextmanager
def applied(found: Sequence[Update], first: int) -> Iterator[None]:
    """While it lasts, the modules add their updates to row `first` and those after it."""
    before = [update.module.__dict__.get("forward") for update in found]
    try:
        for update in found:
            update.module.__dict__["forward"] = partial(_forward, update.module.forward, update.parts, first)
        yield
    finally:
        for update, forward in zip(found, before, strict=True):
            update.module.__dict__.pop("forward", None)
            if forward is not None:
                update.module.__dict__["forward"] = forward


def _forward(plain: Callable[..., Any], parts: Sequence[Part], first: int, x: Tensor, *rest: Any, **more: Any) -> Any:
    """x [N, in]; what a linear layer of vLLM returns, its output [N, out] alone or first of a tuple."""
    found = plain(x, *rest, **more)
    out, rows = (found[0] if isinstance(found, tuple) else found), x[first:]
    for part in parts:
        out[first:, part.columns] += rows @ part.down.T @ part.up_scaled.T
    return found
