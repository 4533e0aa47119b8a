"""LoRA that acts on draft rows only.

The base layer runs first, over all rows; the low-rank update is then added to the slice of draft rows.  A base row's
value is never an operand of anything that involves the adapter, so even NaN weights cannot reach it (a gate that
multiplies by 0 or 1 would: 0 * NaN = NaN).  LoRA: Hu et al. 2021, arXiv 2106.09685; gating by row: Samragh et al. 2025,
arXiv 2507.11851.
"""

from __future__ import annotations

import threading
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from retrofit.adapters.one_call import one_call


class Gate(threading.local):
    """How many leading rows of this thread's forward are base rows; None: all of them (the adapter is off).

    Each thread has its own: what one decodes leaves the model's own forward in another alone.
    """

    base_rows: int | None = None

    def __reduce__(self) -> tuple[type[Gate], tuple[()]]:
        """A copy of the model has a gate of its own, closed."""
        return Gate, ()


class BaseProduct(Protocol):
    """How a backend computes the base layer: rows cut, or weight packed."""

    @property
    def is_packed(self) -> bool:
        """Whether that is a call of torch with a packed weight."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def updated(self, x: Tensor, first: int) -> Tensor | None:
        """With the adapter's update of rows `first` and later; None where this adds none."""


def _is_product(layer: GatedLoraLinear, x: Tensor) -> bool:
    """Whether what the layer does with these rows is its packed product: none of them is a draft row."""
    base, product, first = layer.plain, layer.product, layer.gate.base_rows
    if base is None or product is None or first is None or first < x.shape[-2]:
        return False
    return product.is_packed and not (base._forward_hooks or base._forward_pre_hooks)


class GatedLoraLinear(lora.Linear):
    """`peft`'s LoRA linear layer, applied to rows >= gate.base_rows of the second-last dimension."""

    gate = Gate()
    """Closed until `set_gate`: another thread may run the model while the adapter is being attached."""
    plain: nn.Linear | None = None
    product: BaseProduct | None = None
    """Computes the base layer in forwards of a backend; None: the layer itself does."""
    by_hand = True
    """Whether gradients of draft rows are formed by hand; False is plain autograd, to compare with."""

    def set_gate(self, gate: Gate) -> None:
        """Obey this gate.  Also keeps the base layer at hand where it is a plain linear layer."""
        self.gate = gate
        self.__dict__["plain"] = self.base_layer if type(self.base_layer) is nn.Linear else None

    def factors(self) -> tuple[Tensor, Tensor, float]:
        """A [rank, in], B [out, rank], and what their product is scaled by."""
        adapter = self.active_adapters[0]
        # Few rows of a small model: each operation and each look-up costs as much as the products do.
        down, up = (self._modules[name]._modules[adapter]._parameters["weight"] for name in ("lora_A", "lora_B"))
        return down, up, self.scaling[adapter]

    @partial(one_call, plain=_is_product)
    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """x [..., N, in] -> [..., N, out]."""
        base, first = self.plain, self.gate.base_rows
        product = None if first is None else self.product
        replaced = base is not None and "forward" in base.__dict__ and product is None
        if base is None or replaced or base._forward_hooks or base._forward_pre_hooks:
            out: Tensor = self.base_layer(x)
        elif first == 0 and self.by_hand and torch.is_grad_enabled() and not base.weight.requires_grad:
            trained: Tensor = _FrozenPlusLowRank.apply(x, base.weight, base.bias, *self.factors())
            return trained
        elif product is not None:
            if first is not None and first < x.shape[-2] and not torch.is_grad_enabled():
                updated = product.updated(x, first)
                if updated is not None:
                    return updated
            out = product(x)
        else:
            # What the layer would do, past the module machinery: a tenth of a small model's decode step.
            out = F.linear(x, base._parameters["weight"], base._parameters["bias"])  # type: ignore[arg-type]
        if first is None or first >= x.shape[-2]:
            return out
        down, up, scaling = self.factors()
        rows = x[0, first:] if x.dim() == 3 and len(x) == 1 else x[..., first:, :]
        update = F.linear(F.linear(rows.to(down.dtype), down), up)
        if first == 0 and torch.is_grad_enabled():
            return out + (update * scaling).to(out.dtype).view_as(out)
        changed = out[0, first:] if rows.dim() < out.dim() else out[..., first:, :]
        changed.add_(update, alpha=scaling)
        return out


class _FrozenPlusLowRank(torch.autograd.Function):
    """x W^T + bias + scaling (x A^T) B^T for draft rows alone, W and bias frozen.

    Autograd would make a full-size tensor each for the update, its scaling, the sum, and their gradients; here the
    scaling is met by [N, rank] numbers and every sum is formed by the matrix product itself.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scaling: float
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        low = (rows.to(down.dtype) @ down.T).mul_(scaling)
        out = _plus_product(F.linear(rows, weight, bias), low, up.T)
        ctx.save_for_backward(rows, low, weight, down, up)
        ctx.scaling = scaling
        return out.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, low, weight, down, up = ctx.saved_tensors
        given = gradient.reshape(-1, gradient.shape[-1])
        wide = given.to(up.dtype)
        d_low = (wide @ up).mul_(ctx.scaling)
        d_up = wide.T @ low if ctx.needs_input_grad[4] else None
        d_down = d_low.T @ rows.to(down.dtype) if ctx.needs_input_grad[3] else None
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = _plus_product(given @ weight, d_low, down).view(*gradient.shape[:-1], -1)
        return d_x, None, None, d_down, d_up, None


def _plus_product(out: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """out + left right, in place; the product in its own type where that is another."""
    return out.addmm_(left, right) if out.dtype == left.dtype else out.add_((left @ right).to(out.dtype))
