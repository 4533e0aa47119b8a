"""Whether modules are still what they were when they were written down.

All that they hold is compared: which modules and weights, hooks, training mode, a `forward` of an instance, settings.
Values of weights are read where they are at every run, and may change.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from retrofit.adapters.gated_lora import GatedLoraLinear

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
HELD = ("_parameters", "_buffers", "_modules")


class Watch:
    """A trunk as it is now, and whether it has changed since; asked at every step, so in as few operations as it takes.

    A layer of the adapter is one call, which looks after itself: of it only hooks count, and attributes that are new.
    """

    def __init__(self, trunk: nn.Module):
        modules = list(walked(trunk))
        self._hooks = [module.__dict__[name] for module in modules for name in HOOKS]
        self._replaced = any(map(_replaced, modules))
        whole = [module.__dict__ for module in modules if not isinstance(module, GatedLoraLinear)]
        self._now = [*whole, *(held[name] for held in whole for name in HELD if held[name])]
        self._then = [held.copy() for held in self._now]
        layers = [module for module in modules if isinstance(module, GatedLoraLinear)]
        self._hooks += [layer.base_layer.__dict__[name] for layer in layers for name in HOOKS]
        self._layers = [layer.__dict__ for layer in layers]
        self._sizes = [len(held) for held in self._layers]
        self._products = [layer.product for layer in layers]
        self._weights = [
            (holder, name, tensor, tensor.dtype)
            for held in whole
            for holder in (held["_parameters"], held["_buffers"])
            for name, tensor in holder.items()
            if tensor is not None
        ]

    @property
    def hooked(self) -> bool:
        """Whether somebody has a hook on a module, or gave it a `forward` of theirs: then it has to be called."""
        return self._replaced or any(self._hooks)

    @property
    def weights(self) -> list[Tensor]:
        return [tensor for _, _, tensor, _ in self._weights]

    def changed(self) -> bool:
        try:
            if any(self._hooks) or self._now != self._then or [*map(len, self._layers)] != self._sizes:
                return True
            if [held.get("product") for held in self._layers] != self._products:
                return True
            # Tensors of one number compare equal where they are not the same; and `.data` can change a type.
            return any(holder[name] is not t or t.dtype is not kind for holder, name, t, kind in self._weights)
        except (RuntimeError, KeyError, ValueError, TypeError):  # other tensors do not compare as one truth
            return True


def walked(trunk: nn.Module) -> Iterator[nn.Module]:
    """Modules whose calls are written down; layers of the adapter are one call each and look after theirs."""
    yield trunk
    if not isinstance(trunk, GatedLoraLinear):
        for child in trunk.children():
            yield from walked(child)


def _replaced(module: nn.Module) -> bool:
    """Whether a module runs a `forward` that is neither its class's nor ours: what that goes by is not seen."""
    forward = module.__dict__.get("forward")
    return forward is not None and not str(getattr(forward, "__module__", "")).startswith("retrofit.")
