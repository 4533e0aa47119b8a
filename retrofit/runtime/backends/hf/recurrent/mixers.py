"""Which layers of a model are recurrent, and how rows get through them.

Their own `forward` runs, over all rows of a forward of ours at once: projections, gates, norms and all that it does row
by row.  What it calls to look from one row to another are functions of its module; in our forwards it runs with ours in
their place, which know its rows.  The module itself and other threads' forwards keep what they have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

from torch import nn

from retrofit.runtime.backends.hf.answers import rows_now
from retrofit.runtime.backends.hf.instead import instead, unbound
from retrofit.runtime.backends.hf.recurrent.convolution import causal_conv1d_fn
from retrofit.runtime.backends.hf.recurrent.layer_rows import LayerRows
from retrofit.runtime.backends.hf.recurrent.own_layers import lightning_attention, recurrent_block
from retrofit.runtime.backends.hf.recurrent.rules import (
    mamba2_chunk_scan,
    mamba_selective_scan,
    torch_chunk_gated_delta_rule,
)

OURS: dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "torch_chunk_gated_delta_rule": torch_chunk_gated_delta_rule,
    "chunk_kimi_delta_attention": torch_chunk_gated_delta_rule,
    "mamba_selective_scan": mamba_selective_scan,
    "mamba2_chunk_scan": mamba2_chunk_scan,
}
"""Functions of transformers' modules that look across rows, by name -> what makes ours of them."""
OWN_LAYERS: dict[str, Callable[..., Any]] = {
    "MiniMaxLightningAttention": lightning_attention,
    "RecurrentGemmaRecurrentBlock": recurrent_block,
}
"""Class of a layer whose recurrence is in its `forward` -> what runs in its place: (layer, hidden states, rows, ..)."""
UNUSED = (
    "causal_conv1d_update", "torch_recurrent_gated_delta_rule", "recurrent_kimi_delta_attention",
    "mamba_selective_state_update", "mamba_inner_fn", "mamba2_selective_state_update",
    "mamba2_split_conv1d_scan_combined",
)  # fmt: skip
"""Others that they call with a cache of theirs, or in training mode, which forwards of ours have not."""
ACROSS = ("conv1d", "chunk", "recurrent", "scan", "selective")
"""What the names of functions say that look across rows."""


def mixers_of(trunk: nn.Module) -> dict[int, nn.Module]:
    """Layer -> its recurrent module, of those that rows get through.

    A layer has one state, so none that has several such modules (Inkling's four short convolutions) is among them.
    """
    found: dict[int | None, list[nn.Module]] = {}
    for name, module in trunk.named_modules():
        if _known(module):
            found.setdefault(_layer_of(name, module), []).append(module)
    return {layer: modules[0] for layer, modules in found.items() if layer is not None and len(modules) == 1}


def _layer_of(name: str, module: nn.Module) -> int | None:
    """The number that the module has, or the last one in its name."""
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    known = getattr(module, "layer_idx", numbers[-1] if numbers else None)
    return None if known is None else int(known)


def install(trunk: nn.Module) -> Callable[[], None]:
    """Let rows of ours through a model's recurrent layers; returns the undo."""
    undone = [instead(module, _through(module, layer)) for layer, module in mixers_of(trunk).items()]

    def undo() -> None:
        for one in undone:
            one()

    return undo


def _known(module: nn.Module) -> bool:
    """Whether a module looks across rows by functions that are known here, and by no others."""
    if type(module).__name__ in OWN_LAYERS:
        return True
    written = inspect.unwrap(type(module).forward)
    if not inspect.isfunction(written) or getattr(module, "n_mamba_heads", 1) > 1:  # Zamba scans head by head
        return False
    called = [name for name in written.__code__.co_names if callable(written.__globals__.get(name))]
    across = {name for name in called if any(word in name for word in ACROSS)}
    return "causal_conv1d_fn" in across and across <= {*OURS, *UNUSED}


def _through(module: nn.Module, layer: int) -> Callable[..., Any]:
    """The module's `forward`, and in forwards of ours the same code with our functions, bound to the rows."""
    forward, own = unbound(module), OWN_LAYERS.get(type(module).__name__)
    if own is not None:
        return MethodType(_own_layer(forward, own, layer), module)
    written = inspect.unwrap(type(module).forward)
    made = {name: make(written.__globals__[name]) for name, make in OURS.items() if name in written.__globals__}

    def run(self: nn.Module, *arguments: Any, **named: Any) -> Any:
        context = rows_now()
        if context is None:
            return forward(self, *arguments, **named)
        context.recurrent.append(layer)
        rows = LayerRows(context, layer)
        ours = {name: partial(function, retrofit_rows=rows) for name, function in made.items()}
        with_ours = FunctionType(written.__code__, {**written.__globals__, **ours}, written.__name__,
                                 written.__defaults__, written.__closure__)  # fmt: skip
        with_ours.__kwdefaults__ = written.__kwdefaults__
        named.pop("retrofit_rows", None)
        return with_ours(self, *arguments, **named)

    return MethodType(run, module)


def _own_layer(forward: Callable[..., Any], own: Callable[..., Any], layer: int) -> Callable[..., Any]:
    """A method: the layer's `forward`, and in forwards of ours what runs in its place."""

    def run(self: nn.Module, hidden_states: Any = None, **named: Any) -> Any:
        context = rows_now()
        if context is None:
            return forward(self, hidden_states, **named)
        context.recurrent.append(layer)
        named.pop("retrofit_rows", None)
        return own(self, hidden_states, LayerRows(context, layer), **named)

    return run
