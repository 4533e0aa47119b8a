"""A linear layer that holds few bits a weight, and multiplies rows as they are by what those bits stand for.

    x [..., N, in]  ->  x W^T + bias, W [out, in] dequantised in the type of x, for this product only

All methods run so, and rows stay in the run type.  Kernels that quantise rows too are not used: where one row has an
outlier, LLM.int8() takes that column of all rows out of the product, so that a row would depend on its neighbours.
Gradients of rows go through W as well, which is dequantised anew, so no more than one layer's W exists at a time.
Not here: how the bits come about (`loading.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

KERNEL_TYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What bitsandbytes dequantises to."""


class Weight(Protocol):
    """A quantised weight [out, in]."""

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in a type, a new tensor."""

    def parts(self) -> dict[str, Tensor]:
        """What is stored, under the names that a checkpoint has behind the layer's."""

    def to(self, device: torch.device) -> Weight:
        """The same on a device."""


class FourBits:
    """bitsandbytes' 4 bits.  state: its QuantState."""

    def __init__(self, packed: Tensor, state: Any):
        self.packed, self.state = packed, state

    def dense(self, dtype: torch.dtype) -> Tensor:
        from bitsandbytes.functional import dequantize_blockwise

        state = self.state
        scales = state.absmax
        if state.nested:
            scales = dequantize_blockwise(scales, state.state2).float() + state.offset
        held = dtype if dtype in KERNEL_TYPES else torch.float32
        out: Tensor = torch.ops.bitsandbytes.dequantize_4bit(
            self.packed, scales, state.blocksize, state.quant_type, state.shape, held
        )
        return out.to(dtype)

    def parts(self) -> dict[str, Tensor]:
        told = {f"weight.{name}": tensor for name, tensor in self.state.as_dict(packed=True).items()}
        return {"weight": self.packed, **told}

    def to(self, device: torch.device) -> FourBits:
        self.state.to(device)
        return FourBits(self.packed.to(device), self.state)


class EightBits:
    """bitsandbytes' int8 numbers [out, in] and the largest of each row, which 127 stands for."""

    def __init__(self, numbers: Tensor, largest: Tensor):
        self.numbers, self.largest = numbers, largest

    def dense(self, dtype: torch.dtype) -> Tensor:
        held = dtype if dtype == torch.float64 else torch.float32
        return self.numbers.to(held).mul_(self.largest.to(held)[:, None] / 127).to(dtype)

    def parts(self) -> dict[str, Tensor]:
        row_major = torch.tensor(0, dtype=torch.uint8)
        return {"weight": self.numbers, "SCB": self.largest, "weight_format": row_major}

    def to(self, device: torch.device) -> EightBits:
        return EightBits(self.numbers.to(device), self.largest.to(device))


class Subclass:
    """A tensor of torchao's that can be dequantised."""

    def __init__(self, tensor: Any):
        self.tensor = tensor

    def dense(self, dtype: torch.dtype) -> Tensor:
        out: Tensor = self.tensor.dequantize()
        return out.to(dtype)

    def parts(self) -> dict[str, Tensor]:
        return {f"weight.{name}": getattr(self.tensor, name) for name in self.tensor.__tensor_flatten__()[0]}

    def to(self, device: torch.device) -> Subclass:
        return Subclass(self.tensor.to(device))


class Dense:
    """A plain weight, to try a product out on one that was drawn."""

    def __init__(self, weight: Tensor):
        self.weight = weight

    def dense(self, dtype: torch.dtype) -> Tensor:
        return self.weight.to(dtype)

    def parts(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def to(self, device: torch.device) -> Dense:
        return Dense(self.weight.to(device))


class QuantisedLinear(nn.Linear):
    """`weight` is NaN that takes no memory: it has the shape, the type of the rows and the device, and no values."""

    def __init__(self, held: Weight, shape: tuple[int, int], dtype: torch.dtype, bias: Tensor | None = None):
        """shape: [out, in]."""
        super().__init__(1, 1, bias=False, device="meta")
        self.out_features, self.in_features = shape
        self.held = held
        device = next(iter(held.parts().values())).device
        self.weight = nn.Parameter(_nowhere(shape, dtype, device), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., N, in] -> [..., N, out]."""
        if x.requires_grad and torch.is_grad_enabled():
            out: Tensor = _Dequantised.apply(x, self)
            return out
        return F.linear(x, self.held.dense(x.dtype), self.bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantisedLinear:
        """What moves or casts a model: the bits move, and stay what they are."""
        seen = fn(self.weight.detach().flatten()[:1])
        shape = (self.out_features, self.in_features)
        self.weight = nn.Parameter(_nowhere(shape, seen.dtype, seen.device), requires_grad=False)
        self.held = self.held.to(seen.device)
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.detach()), requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, tensor in self.held.parts().items():
            destination[prefix + name] = tensor
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, held={type(self.held).__name__}"


class _Dequantised(torch.autograd.Function):
    """x W^T + bias, W frozen, and not kept for the way back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantisedLinear) -> Tensor:
        ctx.held = layer.held
        return F.linear(x, layer.held.dense(x.dtype), layer.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.held.dense(gradient.dtype), None


def _nowhere(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((), float("nan"), dtype=dtype, device=device).expand(shape)


def quantised_layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    """Those of a model, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantisedLinear)}


def stored_parts(model: nn.Module) -> list[Tensor]:
    """All that its quantised layers hold."""
    return [tensor for layer in quantised_layers(model).values() for tensor in layer.held.parts().values()]


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all its weights as they are held; tied ones once."""
    placeholders = {id(layer.weight) for layer in quantised_layers(model).values()}
    plain = (p.nbytes for p in model.parameters() if id(p) not in placeholders)
    return sum(plain) + sum(part.nbytes for part in stored_parts(model))
