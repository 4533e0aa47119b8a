"""Whether an adapter of another program is one that a recipe can express, on this base, and then which one it is.

What PEFT's configuration and the tensors say is held against what retrofit does: one LoRA of one rank and scale on all
projections of some roles, added to draft rows.  All that stands in the way is listed, not the first of it.
Not here: reading the files (`retrofit.sharing.adapters`), the layout of drafts, which such files do not tell.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from retrofit.adapters.attach import NEVER
from retrofit.adapters.roles import (
    PROJECTIONS,
    ROLES,
    ending_of,
    is_target,
    resolve_targets,
    text_projections,
    trunk_name,
)
from retrofit.artifact.schema import ADAPTER_CONFIG, not_allowed
from retrofit.errors import UsageError
from retrofit.weight_files import dtype_name

TENSOR = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<factor>[AB])(?:\.default)?\.weight")
TRUNKS = ("encoder",)
"""What else the text decoder is called: Nemotron-Labs-Diffusion's own code has no `model` around its layers."""
DTYPES = ("float32", "bfloat16", "float16")


def _anything(value: Any) -> bool:
    return True


SAYS: dict[str, Callable[[Any], bool]] = {
    **ADAPTER_CONFIG,
    "task_type": _anything,
    "base_model_name_or_path": _anything,
    "target_modules": _anything,  # a pattern or a list: which modules it meant is told by the tensors
    "target_parameters": lambda value: value in (None, []),
    "init_lora_weights": lambda value: value in (True, False, None, "gaussian"),  # others change the base's weights
    "alora_invocation_tokens": lambda value: value in (None, list(NEVER)),
}
"""As `ADAPTER_CONFIG`, of adapters that others wrote.  PEFT is never shown them."""


@dataclass(frozen=True)
class Fitted:
    """An adapter as a recipe has it.  state: tensors by the names PEFT gives them on this base.

    None is what its configuration does not say.
    """

    rank: int | None
    alpha: float | None
    targets: tuple[str, ...]
    dtype: str
    state: dict[str, Tensor]


def fit(model: PreTrainedModel, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> tuple[Fitted, list[str]]:
    """The adapter on this base, which is of use only where nothing stands in the way, and what does.

    config: adapter_config.json; tensors: adapter_model.safetensors, A [rank, in] and B [out, rank] of each module.
    """
    wrong = not_allowed(config, SAYS)
    problems = [f"{shown(key)} is {value}" for key, value in wrong.items()]
    rank, alpha = (None if key in wrong else config.get(key) for key in ("r", "lora_alpha"))
    problems += [f"{key} is missing" for key in ("peft_type", "r", "lora_alpha") if key not in config]
    projections = set(text_projections(model))
    found: dict[tuple[str, str], Tensor] = {}
    placeless = []
    for name, tensor in tensors.items():
        match = TENSOR.fullmatch(name)
        module = _place(model, match["module"]) if match else None
        if match is None or module not in projections or (module, match["factor"]) in found:
            placeless.append(name)
        else:
            found[module, match["factor"]] = tensor
    if placeless:
        problems.append(f"{_counted(placeless, 'tensor')} without a place in {type(model).__name__}")
    modules = {module for module, _ in found}
    targets = _roles(modules)
    problems += _missing(model, targets, modules, projections, found)
    problems += _wrong(model, found, rank)
    narrow = bool(found) and all(dtype_name(tensor.dtype) == "bfloat16" for tensor in found.values())
    state = {f"base_model.model.{module}.lora_{factor}.weight": tensor for (module, factor), tensor in found.items()}
    return Fitted(rank, alpha, targets, "bfloat16" if narrow else "float32", state), problems


def _place(model: nn.Module, module: str) -> str:
    """The module of this base that a module of the adapter's is, by its name."""
    trunk = trunk_name(model)
    for other in TRUNKS:
        if module.startswith(f"{other}."):
            return f"{trunk}.{module.removeprefix(f'{other}.')}".removeprefix(".")
    return module


def _roles(modules: set[str]) -> tuple[str, ...]:
    """The roles that these modules play, in the order of ROLES."""
    endings = {ending_of(module) for module in modules}
    return tuple(role for role in ROLES if endings & set(PROJECTIONS[role]))


def _missing(
    model: PreTrainedModel,
    targets: tuple[str, ...],
    modules: set[str],
    projections: set[str],
    found: Mapping[tuple[str, str], Tensor],
) -> list[str]:
    """Modules that a recipe with these targets would adapt as well or not, and those with one factor of two."""
    if not targets:
        return ["no tensor is a LoRA on a projection of the base"]
    try:
        names = resolve_targets(model, targets)
    except UsageError as error:
        return [str(error)]
    expected = {name for name in projections if is_target(name, names)}
    halves = [module for module in modules if not {(module, "A"), (module, "B")} <= found.keys()]
    told = ((expected - modules, "not adapted, as others of its role are"), (modules - expected, "not to be adapted"))
    problems = [f"{_counted(list(which), 'module')} {what}" for which, what in told if which]
    return problems + ([f"{_counted(halves, 'module')} with one factor of two"] if halves else [])


def _wrong(model: nn.Module, found: Mapping[tuple[str, str], Tensor], rank: int | None) -> list[str]:
    """Tensors of other shapes than the base's, of other types or not finite; and an adapter that changes nothing."""
    named = dict(model.named_modules())
    shapes, types, broken = [], [], []
    for (module, factor), tensor in found.items():
        rows, columns = _sizes(named[module])
        own = rank or (tensor.shape[factor == "B"] if tensor.dim() == 2 else 0)
        want = (own, columns) if factor == "A" else (rows, own)
        name = f"{module}.lora_{factor}"
        if tuple(tensor.shape) != want:
            shapes.append(f"{name} {list(tensor.shape)} for {list(want)}")
        if dtype_name(tensor.dtype) not in DTYPES:
            types.append(f"{name} {dtype_name(tensor.dtype)}")
        elif not tensor.isfinite().all():
            broken.append(name)
    told = ((shapes, "of another shape than the base wants"), (types, "of a type that is none of a LoRA's"))
    problems = [f"{_counted(which, 'tensor')} {what}" for which, what in told if which]
    if broken:
        problems.append(f"{_counted(broken, 'tensor')} not finite")
    if found and not types and not any(tensor.any() for (_, factor), tensor in found.items() if factor == "B"):
        problems.append("it changes nothing: every lora_B is zero")
    return problems


def _sizes(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a projection."""
    weight: Any = module.weight
    return (weight.shape[1], weight.shape[0]) if isinstance(module, Conv1D) else (weight.shape[0], weight.shape[1])


def _counted(names: list[str], what: str) -> str:
    """`3 tensors (the first, ...)`."""
    first, more = shown(min(names)), ", ..." if len(names) > 1 else ""
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''} ({first}{more})"


def shown(name: str) -> str:
    """What a stranger called something, short, in letters that are but letters."""
    short = name if len(name) <= 80 else f"{name[:77]}..."
    return short if short.isprintable() else ascii(short)
