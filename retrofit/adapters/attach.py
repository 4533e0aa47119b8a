"""Put the adapter on a model, and take its tensors off again.

Roles are resolved to the model's own projections (`roles.py`); the LoRA itself is PEFT's, with `GatedLoraLinear` as its
layer, so what is saved is a plain PEFT folder.  A plain PEFT reload of that folder is ungated.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from retrofit.adapters.gated_lora import Gate, GatedLoraLinear
from retrofit.adapters.heads import MARKOV, Heads, load_heads
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.live import refuse_adapters, remove_adapter
from retrofit.adapters.roles import is_target, resolve_targets
from retrofit.errors import ArtifactError, UnsupportedModelError

NAME = "default"
"""What PEFT calls our adapter."""
NEVER = (2**31 - 1,)
"""Token ids after which an Activated LoRA would begin to act; no vocabulary has such an id, however it may grow."""

WRAPPING = threading.RLock()
"""Held while an adapter is put on a model or taken off."""


@dataclass
class Attached:
    """A model with its adapter on.  `peft_model` wraps `model`, whose projections are now gated."""

    model: PreTrainedModel
    peft_model: PeftModel
    gate: Gate
    heads: Heads
    layout: DraftLayout
    trainable: list[nn.Parameter]
    """Base parameters that required gradients before; PEFT froze them."""
    detached: bool = False

    def lora_parameters(self) -> list[nn.Parameter]:
        return [p for n, p in self.peft_model.named_parameters() if "lora_" in n]

    def base_parameters(self) -> list[nn.Parameter]:
        """All but the LoRA; the heads are not among the model's own."""
        return [p for n, p in self.peft_model.named_parameters() if "lora_" not in n]

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained: LoRA and heads."""
        return self.lora_parameters() + list(self.heads.parameters())

    def named(self) -> dict[str, nn.Parameter]:
        """All that is trained, in the order of `parameters`, by the names that checkpoints have."""
        lora = {name: p for name, p in self.peft_model.named_parameters() if "lora_" in name}
        return lora | dict(self.heads.named_parameters(prefix="heads"))

    @property
    def share(self) -> float:
        """How many parameters are trained, to how many the base has."""
        return count(self.parameters()) / count(self.base_parameters())

    def round_to(self, dtype: torch.dtype) -> None:
        """Round LoRA and Markov head, in place, to numbers of `dtype`: saved in that they are the same."""
        with torch.no_grad():
            for tensor in [*self.lora_parameters(), *self.heads.markov_parameters()]:
                tensor.copy_(tensor.to(dtype))

    def adapter_state(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors of `adapter_model.safetensors`, as PEFT names them.  dtype: to save them in; None: as they are."""
        own = {name: p for name, p in self.peft_model.named_parameters() if "lora_" in name}
        state = get_peft_model_state_dict(self.peft_model, own, save_embedding_layers=False)
        return {name: tensor.detach().cpu().to(dtype or tensor.dtype).contiguous() for name, tensor in state.items()}

    def adapter_config(self, base: str | None = None) -> dict[str, Any]:
        """`adapter_config.json` of a plain PEFT folder.  base: what it calls the base; PEFT would name a path.

        To other programs it is an Activated LoRA that is never activated: PEFT leaves the base as it is, and programs
        that do not know of such adapters refuse it; a plain LoRA they would apply to every row.
        """
        config = self.peft_model.peft_config[NAME]
        inference = config.inference_mode
        config.inference_mode = True
        plain = config.to_dict()
        config.inference_mode = inference
        plain |= {"base_model_name_or_path": base, "alora_invocation_tokens": list(NEVER)}
        return {key: _jsonable(value) for key, value in plain.items()}

    def heads_state(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Tensors of `heads.safetensors`.  dtype: to save the Markov head in, which all but is their size."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in self.heads.state_dict().items()}
        return {
            name: tensor.to(dtype) if dtype and name.startswith(MARKOV) else tensor for name, tensor in state.items()
        }

    def load(self, adapter: dict[str, Tensor], heads: dict[str, Tensor]) -> None:
        """Raises ArtifactError when names or shapes do not fit this model."""
        want = {name: tuple(t.shape) for name, t in self.adapter_state().items()}
        have = {name: tuple(t.shape) for name, t in adapter.items()}
        if want != have:
            wrong = sorted(set(want.items()) ^ set(have.items()))[0][0]
            raise ArtifactError(
                f"adapter_model.safetensors does not fit the base model: tensor {wrong}",
                "the artifact belongs to another base; check `retrofit inspect`",
            )
        set_peft_model_state_dict(self.peft_model, adapter)
        load_heads(self.heads, heads)

    def detach(self) -> None:
        """Give the live model back without the adapter; one that someone else has added since stays.

        A second call does nothing.
        """
        with WRAPPING:
            if self.detached:
                return
            remove_adapter(self.model, NAME)
            for parameter in self.trainable:
                parameter.requires_grad_(True)
            self.detached = True


def attach(
    model: PreTrainedModel,
    layout: DraftLayout,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    markov_rank: int,
    confidence: bool,
    seed: int = 0,
    modules: Sequence[str] | None = None,
) -> Attached:
    """Add gated LoRA, mask vector and heads to `model`, in place.  New weights are the identity, drawn from `seed`.

    modules: what an artifact says its roles meant, as PEFT reads it; without it they are resolved here.
    Raises UsageError for roles that match nothing and for a model that has an adapter of ours on it,
    UnsupportedModelError where PEFT cannot go or another adapter is; then, and after any other error, the model is as
    it was.
    """
    refuse_adapters(model)
    names = list(modules or resolve_targets(model, targets))
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        return _attached(model, layout, names, rank, alpha, markov_rank, confidence, seed, trainable)
    except BaseException:
        remove_adapter(model, NAME)
        for parameter in trainable:
            parameter.requires_grad_(True)
        raise


def _attached(
    model: PreTrainedModel,
    layout: DraftLayout,
    names: list[str],
    rank: int,
    alpha: float,
    markov_rank: int,
    confidence: bool,
    seed: int,
    trainable: list[nn.Parameter],
) -> Attached:
    wanted = [module for name, module in model.named_modules() if is_target(name, names)]
    if not wanted:
        raise ArtifactError(
            f"{type(model).__name__} has none of the modules that carry the adapter: {', '.join(names)}"
        )
    transposed = any(isinstance(module, Conv1D) for module in wanted)
    devices = [] if model.device.type == "cpu" else [model.device]
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,
            target_modules=names,
            bias="none",
            task_type="CAUSAL_LM",
            fan_in_fan_out=transposed,
        )
        config._register_custom_module({nn.Linear: GatedLoraLinear, Conv1D: GatedLoraLinear})
        peft_model = _with_lora(model, config)
        text = model.config.get_text_config()
        heads = Heads(
            text.hidden_size,
            model.get_output_embeddings().weight.shape[0],
            layout.drafts,
            markov_rank,
            confidence,
        )
    embedding = model.get_input_embeddings().weight
    with torch.no_grad():
        heads.mask_vector.copy_(embedding.mean(0, dtype=torch.float32))  # no copy of the whole table
    gate = Gate()
    wrong = []
    for name, module in peft_model.named_modules():
        if isinstance(module, GatedLoraLinear):
            module.set_gate(gate)
        elif hasattr(module, "lora_A"):
            wrong.append(name)
    if wrong:
        peft_model.unload()  # of other kinds than `remove_adapter` knows
        raise UnsupportedModelError(
            f"PEFT put an ungated LoRA on {wrong[0]} ({len(wrong)} modules); choose other targets"
        )
    heads.to(embedding.device)
    return Attached(model, peft_model, gate, heads, layout, trainable)


def _with_lora(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """What PEFT makes of the model.

    It takes no LoRA on the output projections of some recurrent layers; and in families with routed experts it takes
    the names of an MLP for theirs, also where a model has none.
    """
    try:
        made = get_peft_model(model, config)
    except ValueError as error:
        said = " ".join(str(error).split())
        raise UnsupportedModelError(
            f"PEFT puts no LoRA on {type(model).__name__}: {said[:160]}", "choose other adapter.targets"
        ) from error
    if config.target_parameters:
        raise UnsupportedModelError(
            f"PEFT takes projections of the MLP of {type(model).__name__} for routed experts",
            "choose other adapter.targets: [q, k, v, o]",
        )
    return made


def count(tensors: Iterable[Tensor]) -> int:
    """How many numbers they hold."""
    return sum(tensor.numel() for tensor in tensors)


def _jsonable(value: Any) -> Any:
    if isinstance(value, set | frozenset):
        return sorted(value)
    return value if isinstance(value, str | int | float | bool | list | dict | type(None)) else str(value)
