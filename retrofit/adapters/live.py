"""Which live models can take an adapter; the others are refused by name, before anything about them is changed.

Not here: what a model computes (`refuse_unsupported` in `runtime/backends/hf/refused.py`).
"""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.errors import UnsupportedModelError, UsageError

DEVICES = ("cpu", "cuda")
QUANTISERS = ("torch.ao", "torchao", "bitsandbytes", "gptqmodel", "auto_gptq", "awq", "hqq", "optimum.quanto", "eetq")
"""Packages whose modules hold quantised weights."""
MERGE = "merge it first: `model = model.merge_and_unload()` of a PeftModel; retrofit then trains on what that says"

WHOLE = "load it whole onto one device, without device_map"


def refuse_live(model: Any) -> None:
    """Raise UsageError for what is no transformers model, UnsupportedModelError for one that cannot be wrapped."""
    if isinstance(model, PeftModel):
        raise UnsupportedModelError(f"a {type(model).__name__} carries an adapter of its own", MERGE)
    if not isinstance(model, PreTrainedModel):
        hint = "give the transformers model itself, without torch.compile or a parallel wrapper around it"
        raise UsageError(f"a {type(model).__name__} is no transformers model", hint)
    refuse_adapters(model)
    _refuse_quantised(model)
    _refuse_places(model)


def refuse_adapters(model: nn.Module) -> None:
    """Raise UnsupportedModelError for a model that has an adapter of its own on it, UsageError for one with ours."""
    for name, module in model.named_modules():
        if isinstance(module, GatedLoraLinear):
            raise UsageError(
                f"this {type(model).__name__} is in use by another engine, which is still open",
                "close that one first, with its close() or as `with Engine.from_model(...) as engine:`; "
                "if it is lost, load the model again",
            )
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            raise UnsupportedModelError(f"{type(model).__name__} carries an adapter of its own, on {name}", MERGE)


def _refuse_quantised(model: PreTrainedModel) -> None:
    found = "its configuration says so" if getattr(model, "hf_quantizer", None) is not None else None
    for name, module in model.named_modules():
        if type(module).__module__.startswith(QUANTISERS):
            found = found or f"{name} is a {type(module).__module__}.{type(module).__name__}"
    for name, parameter in model.named_parameters():
        plain = parameter.is_floating_point() and parameter.itemsize > 1
        if not plain or hasattr(parameter, "__tensor_flatten__"):
            found = found or f"{name} is a {type(parameter.data).__name__} of {parameter.dtype}"
    if found is not None:
        raise UnsupportedModelError(
            f"{type(model).__name__} is quantised ({found}), which retrofit does not support yet",
            "take the original weights, in bfloat16",
        )


def _refuse_places(model: PreTrainedModel) -> None:
    name, places = type(model).__name__, {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    kinds = {place.type for place in places}
    if "meta" in kinds:
        raise UnsupportedModelError(
            f"{name} has weights that are not in memory (meta, or offloaded to CPU or disk)",
            WHOLE,
        )
    if foreign := kinds - set(DEVICES):
        raise UnsupportedModelError(
            f"{name} is on {', '.join(sorted(foreign))}; retrofit runs on cpu and cuda", "move it: `model.to('cpu')`"
        )
    if len(places) > 1:
        listed = ", ".join(sorted(map(str, places)))
        raise UnsupportedModelError(
            f"{name} lies on several devices ({listed})", "load it onto one, without device_map"
        )
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in model.modules()):
        raise UnsupportedModelError(f"{name} is offloaded", WHOLE)


def remove_adapter(model: nn.Module, name: str) -> None:
    """Put back what our layers stand in front of; what others have put around or into them since stays.

    name: of our adapter in those layers.
    """
    for parent in list(model.modules()):
        for key, layer in list(parent.named_children()):
            if not isinstance(layer, GatedLoraLinear):
                continue
            if set(layer.lora_A) <= {name}:
                setattr(parent, key, layer.base_layer)
            else:  # someone added an adapter, which PEFT keeps in the layer it finds there
                layer.delete_adapter(name)
                layer.__class__ = GatedLoraLinear.__base__
    configs = vars(model).pop("peft_config", {})
    if others := {key: config for key, config in configs.items() if key != name}:
        vars(model)["peft_config"] = others
