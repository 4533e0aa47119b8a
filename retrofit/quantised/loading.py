"""Make a model's linear layers hold few bits a weight, or take over those that a checkpoint holds so.

Layers are quantised one by one, from the type that the file has: what they hold does not depend on the type the base
runs in.  The output projection, embeddings, norms and routed experts stay as they are.
Not here: which methods there are (`methods.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from retrofit.errors import UnsupportedModelError
from retrofit.quantised.linear import EightBits, FourBits, QuantisedLinear, Subclass, Weight, quantised_layers
from retrofit.quantised.methods import BITS, ORIGINAL

GROUP = 32
"""Numbers that share a scale with int4wo."""


def quantise(model: PreTrainedModel, kind: str, dtype: torch.dtype) -> None:
    """Quantise a plain model's linear layers in place, and let the rest run in `dtype`.

    kind: one of KINDS.  Raises UnsupportedModelError where there is nothing to quantise, or a shape does not allow it.
    """
    for name, module in _plain_layers(model).items():
        weight = module.weight.detach()
        if kind == "int4wo" and module.in_features % GROUP:
            raise UnsupportedModelError(
                f"{name} has {module.in_features} inputs, which int4wo cannot divide into groups of {GROUP}",
                "use nf4 or int8",
            )
        held = MAKE[kind](weight)
        put(model, name, QuantisedLinear(held, (module.out_features, module.in_features), dtype, module.bias))
    _run_in(model, dtype)


def rehearse(model: PreTrainedModel, kind: str) -> None:
    """As `quantise`, of a model without values: layers that are as large."""
    for name, module in _plain_layers(model).items():
        held = Sized(module.weight, BITS[kind])
        shape = (module.out_features, module.in_features)
        put(model, name, QuantisedLinear(held, shape, module.weight.dtype, module.bias))


class Sized:
    """A quantised weight of which nothing but its size is known."""

    def __init__(self, weight: Tensor, bits: float):
        self.shape = weight.shape
        self.bytes = torch.empty(round(weight.numel() * bits / 8), dtype=torch.uint8, device=weight.device)

    def dense(self, dtype: torch.dtype) -> Tensor:
        return torch.empty(self.shape, dtype=dtype, device=self.bytes.device)

    def parts(self) -> dict[str, Tensor]:
        return {"weight": self.bytes}

    def to(self, device: torch.device) -> Sized:
        self.bytes = self.bytes.to(device)
        return self


def _plain_layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The layers that are quantised.  Raises UnsupportedModelError where there are none."""
    head = model.get_output_embeddings()
    layers = {name: m for name, m in model.named_modules() if type(m) is nn.Linear and m is not head}
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no linear layers to quantise", "leave it out")
    return layers


def _run_in(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast parameters that hold values; buffers are what their modules made them."""
    whole = model._keep_in_fp32_modules or ()
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and not any(one in name.split(".") for one in whole):
            parameter.data = parameter.data.to(dtype) if parameter.numel() > 1 else parameter.data
    model.config.dtype = dtype


def take_over(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Put our layers in the place of those that a quantised checkpoint came with, and let the rest run in `dtype`.

    Raises UnsupportedModelError for anything else in the model that is quantised.
    """
    for name, module in list(model.named_modules()):
        held = _held(module)
        if held is not None:
            put(model, name, QuantisedLinear(held, (module.out_features, module.in_features), dtype, module.bias))
    ours = {id(layer.weight) for layer in quantised_layers(model).values()}
    for name, parameter in model.named_parameters():
        plain = parameter.is_floating_point() and parameter.itemsize > 1 and type(parameter.data) is Tensor
        if not plain and id(parameter) not in ours:
            what = f"{type(parameter.data).__name__} of {parameter.dtype}"
            raise UnsupportedModelError(f"{name} is a {what}; retrofit runs quantised linear layers only", ORIGINAL)
    _run_in(model, dtype)


def _held(module: nn.Module) -> Weight | None:
    """What a layer of another package holds; None where it is no quantised linear layer."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(module, nn.Linear) or weight is None:
        return None
    kind = type(module).__name__
    if kind == "Linear4bit":
        return FourBits(weight.data, weight.quant_state)
    if kind == "Linear8bitLt":
        state: Any = module.state
        numbers, largest = (weight.CB, weight.SCB) if weight.CB is not None else (state.CB, state.SCB)
        return EightBits(numbers, largest)
    data = weight.data if type(weight) is nn.Parameter else weight
    return Subclass(data) if hasattr(data, "dequantize") and hasattr(data, "__tensor_flatten__") else None


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place that a name has."""
    holder, _, last = name.rpartition(".")
    setattr(model.get_submodule(holder), last, module)


def _four_bits(weight: Tensor) -> Weight:
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight.contiguous(), blocksize=64, compress_statistics=True, quant_type="nf4")
    return FourBits(packed, state)


def _eight_bits(weight: Tensor) -> Weight:
    from bitsandbytes.functional import int8_vectorwise_quant

    numbers, largest, _ = int8_vectorwise_quant(weight.to(torch.float16))
    return EightBits(numbers, largest)


def _by_torchao(config: Callable[[], Any]) -> Callable[[Tensor], Weight]:
    def make(weight: Tensor) -> Weight:
        from torchao.quantization import quantize_

        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        layer.weight = nn.Parameter(weight.float(), requires_grad=False)  # scales are held in the type of the weight
        quantize_(layer, config())
        return Subclass(layer.weight.data)

    return make


def _int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


def _int4() -> Any:
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup

    four = torch.int4  # type: ignore[attr-defined]  # not in its stubs
    return IntxWeightOnlyConfig(weight_dtype=four, granularity=PerGroup(GROUP))


MAKE: dict[str, Callable[[Tensor], Weight]] = {
    "nf4": _four_bits,
    "int8": _eight_bits,
    "int8wo": _by_torchao(_int8),
    "int4wo": _by_torchao(_int4),
}
