"""Gradient checkpointing: the backward pass computes a layer's activations again instead of finding them kept.

Transformers' own switch does nothing in eval mode, which the base is always in, and knows nothing of what the backend
sets for a forward: how many base rows there are, which attention and which experts run.  Here the second computation
runs under the same settings as the first, so its bits are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from retrofit.errors import UnsupportedModelError
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.instead import instead


def decoder_layers(backend: HFBackend) -> list[nn.Module]:
    """The layers of the trunk, in order.  Raises UnsupportedModelError where they cannot be found."""
    layers = getattr(backend.trunk, "layers", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) != backend.config.num_hidden_layers:
        raise UnsupportedModelError(
            f"{type(backend.model).__name__} keeps its layers elsewhere than in `layers`",
            "leave train.checkpointing and FSDP off",
        )
    return list(layers)


def recompute_layers(backend: HFBackend) -> Callable[[], None]:
    """Let every layer forget its activations between forward and backward; returns the undo."""
    layers = decoder_layers(backend)
    # `forward` and not the call: hooks on the layer, FSDP's among them, run once.
    undone = [instead(layer, _recomputed(layer.forward, backend)) for layer in layers]

    def undo() -> None:
        for one in undone:
            one()

    return undo


def _recomputed(forward: Callable[..., Any], backend: HFBackend) -> Callable[..., Any]:
    def run(*arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*arguments, **named)
        context = named["retrofit_rows"]

        def again(*arguments: Any, **named: Any) -> Any:
            with backend.switched(context):
                return forward(*arguments, **named)

        return checkpoint(again, *arguments, use_reentrant=False, preserve_rng_state=False, **named)

    return run
