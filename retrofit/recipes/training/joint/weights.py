"""The base's weights while they are trained along, and the original's, which stay at hand.

    full    every parameter of the base moves; of one in a half type the optimizer moves a copy in fp32
    lora    W x + scale B A x in the projections that `adapter.targets` names, for every row; `merge` makes
            W + scale B A of it, in fp32, rounded once to the type the base runs in

`original()` lets the model be what it was: for the anchor of L_AR, and to measure drift.
Not here: their gradients (`backward.py`), what is written of them (`publish.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from retrofit.adapters.attach import Attached
from retrofit.adapters.gated_lora import GatedLoraLinear
from retrofit.recipes.schema import Recipe
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.backends.hf.instead import instead

PREFIX = "joint"
"""Before the names of these weights in checkpoints."""


@dataclass(frozen=True)
class _Update:
    """The LoRA on all rows of one projection: down [rank, in], up [out, rank]."""

    module: nn.Module
    down: nn.Parameter
    up: nn.Parameter
    scale: float

    def of(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return F.linear(F.linear(x.to(self.down.dtype), self.down), self.up) * self.scale

    def merged(self, weight: Tensor) -> Tensor:
        """The projection's weight with this in it, in the weight's type."""
        update = self.up.detach() @ self.down.detach() * self.scale
        return (weight.float() + (update.T if isinstance(self.module, Conv1D) else update)).to(weight.dtype)


class BaseWeights:
    """What is trained of the base.

    Attributes: `trained`, what the optimizer moves, by name; `forwarded`, the parameters that the model computes with
    and that get the gradients, in the same order.
    """

    def __init__(self, attached: Attached, backend: HFBackend, recipe: Recipe):
        self.attached, self.kind = attached, recipe.joint.weights
        self._updates: list[_Update] = []
        self._originals: list[tuple[nn.Parameter, Tensor]] = []
        """Parameters that are no longer the original's, and what they were."""
        self._off = False
        if not recipe.joint.gated:
            for parameter in attached.lora_parameters():
                parameter.requires_grad_(False)
        parts = self._all() if self.kind == "full" else self._low_rank(backend, recipe)
        self.forwarded = list(parts.values())
        self.trained = {f"{PREFIX}.{name}": _in_fp32(parameter) for name, parameter in parts.items()}
        backend.until_closed(self._give_back)

    def _all(self) -> dict[str, nn.Parameter]:
        found = self._of_base()
        for parameter in found.values():
            self._originals.append((parameter, parameter.detach().clone()))
            parameter.requires_grad_(True)
        return found

    def _of_base(self) -> dict[str, nn.Parameter]:
        """Its parameters by their names in the model without an adapter."""
        named = self.attached.peft_model.named_parameters()
        return {plain_name(name): p for name, p in named if "lora_" not in name and p.is_floating_point()}

    def _keep(self, parameter: nn.Parameter) -> None:
        """Remember what it was in the original, before it is another tensor."""
        if all(one is not parameter for one, _ in self._originals):
            self._originals.append((parameter, parameter.data))

    def _low_rank(self, backend: HFBackend, recipe: Recipe) -> dict[str, nn.Parameter]:
        joint = recipe.joint
        found: dict[str, nn.Parameter] = {}
        generator = torch.Generator().manual_seed(recipe.train.seed)
        for name, module in self.attached.peft_model.named_modules():
            if not isinstance(module, GatedLoraLinear):
                continue
            base = module.base_layer
            shape = base.weight.shape[::-1] if isinstance(base, Conv1D) else base.weight.shape
            # As PEFT begins: uniform with a variance of 1 / (3 in), and zero.
            drawn = torch.empty(joint.rank, shape[1]).uniform_(-1, 1, generator=generator) / shape[1] ** 0.5
            down = nn.Parameter(drawn.to(backend.device))
            up = nn.Parameter(torch.zeros(shape[0], joint.rank, device=backend.device))
            update = _Update(base, down, up, joint.alpha / joint.rank)
            self._updates.append(update)
            backend.until_closed(instead(base, self._with_update(base, update)))
            plain = plain_name(name)
            found |= {f"{plain}.lora_A": down, f"{plain}.lora_B": up}
        return found

    def _with_update(self, module: nn.Module, update: _Update) -> Callable[[Tensor], Tensor]:
        own = module.forward

        def run(x: Tensor) -> Tensor:
            out: Tensor = own(x)
            return out if self._off else out + update.of(x).to(out.dtype)

        return run

    @torch.no_grad()
    def begin_with(self, state: Mapping[str, Tensor]) -> None:
        """Let the model be one that was trained along before; the original stays what it was.

        state: that one's weights, by their names in the model.
        """
        if self.kind == "full":
            for name, kept in self.trained.items():
                kept.copy_(state[name.removeprefix(f"{PREFIX}.")])
            self.follow()
            return
        for name, parameter in self._of_base().items():
            own = state[name].to(parameter)
            if not torch.equal(own, parameter.data):
                self._keep(parameter)
                parameter.data = own

    def follow(self) -> None:
        """Let the model compute with what the optimizer has moved."""
        with torch.no_grad():
            for kept, parameter in zip(self.trained.values(), self.forwarded, strict=True):
                if kept is not parameter:
                    parameter.copy_(kept)

    @contextmanager
    def original(self) -> Iterator[None]:
        """The model as it was before it was trained, without gradients."""
        off, own = self._off, [parameter.data for parameter, _ in self._originals]
        self._off = True
        for parameter, before in self._originals:
            parameter.data = before
        try:
            with torch.no_grad():
                yield
        finally:
            self._off = off
            for (parameter, _), data in zip(self._originals, own, strict=True):
                parameter.data = data

    def merge(self) -> None:
        """Put the LoRA into the weights; nothing can be trained after that."""
        for update in self._updates:
            weight = update.module.weight
            assert isinstance(weight, nn.Parameter)
            self._keep(weight)
            weight.data = update.merged(weight.data)
        self._off = True
        for parameter in self.forwarded:
            parameter.requires_grad_(False)

    def _give_back(self) -> None:
        """Let the model be the original for good."""
        self._off = True
        for parameter, before in self._originals:
            parameter.data = before
            parameter.requires_grad_(False)


def plain_name(name: str) -> str:
    """A parameter's or module's name in the model without an adapter."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _in_fp32(parameter: nn.Parameter) -> nn.Parameter:
    """Itself, or a copy in fp32 of one in a half type: small steps would be rounded away."""
    return parameter if parameter.dtype == torch.float32 else nn.Parameter(parameter.detach().float())
