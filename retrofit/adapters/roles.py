"""Which modules of a model the roles (`q, k, v, o, gate, up, down`) mean.

Only the layers of the text decoder count: a multimodal model's towers have projections of the same names.  Families
name their projections differently, and some make several at once: such a module plays all the roles it covers.
Not here: putting the adapter on them (`attach.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from retrofit.errors import UsageError

ATTENTION_ROLES = ("q", "k", "v", "o")
MLP_ROLES = ("gate", "up", "down")
ROLES = ATTENTION_ROLES + MLP_ROLES
"""All there are.  Asking for all of them, the default, means those that the model has; a shorter list is meant."""
PROJECTION_TYPES = (nn.Linear, Conv1D)

QKV = ("qkv_proj", "query_key_value", "c_attn", "Wqkv")
# Recurrent layers: what is read with, what is written and how much of it, or all of that in one.
DELTA_QKV = ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_qkv")
MIXER_IN = (
    "mamba.in_proj", "mixer.in_proj", "conv.in_proj", "temporal_block.linear_x", "temporal_block.linear_y",
)  # fmt: skip
DELTA_GATE = ("linear_attn.in_proj_z", "linear_attn.g_proj")
DELTA_WRITE = (
    "linear_attn.in_proj_ba", "linear_attn.in_proj_b", "linear_attn.in_proj_a",
    "linear_attn.b_proj", "linear_attn.a_proj",
)  # fmt: skip
NO_LORA = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}, ("out_proj",)
"""Model types where PEFT refuses LoRA on modules of these names: kernels read their weights past the module."""
# MLA never adapts kv_b_proj: absorbed implementations fold it into the query and the output.
PROJECTIONS: dict[str, tuple[str, ...]] = {
    "q": (
        "q_proj", *QKV, "q_a_proj", "q_b_proj", "q_proj.linear", "self.query", *DELTA_QKV, *DELTA_GATE, *MIXER_IN,
    ),
    "k": (
        "k_proj", *QKV, "kv_a_proj_with_mqa", "kv_proj", "k_proj.linear", "self.key", *DELTA_QKV, *DELTA_WRITE,
        *MIXER_IN,
    ),
    "v": (
        "v_proj", *QKV, "kv_a_proj_with_mqa", "kv_proj", "v_proj.linear", "self.value", *DELTA_QKV, *MIXER_IN,
    ),
    "o": (
        "o_proj", "out_proj", "self_attn.dense", "attention.dense", "attn.c_proj", "attention.output.dense",
        "o_proj.linear", "temporal_block.linear_out",
    ),
    "gate": ("gate_proj", "gate_up_proj", "w1"),
    "up": ("up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "intermediate.dense", "w3"),
    "down": ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "output.dense", "w2"),
}  # fmt: skip
"""Endings of module names; where several fit a module, the longest counts."""
ENDINGS = sorted({ending for endings in PROJECTIONS.values() for ending in endings}, key=len, reverse=True)


def resolve_targets(model: nn.Module, roles: Sequence[str]) -> list[str]:
    """What PEFT is to be told for these roles: endings such as ["q_proj", "v_proj"], or whole names.

    Whole names where endings would say too much, as they do where a tower has projections of the same names.
    On mixture-of-experts models attention roles only: PEFT turns MLP names there into LoRA on the routed experts.
    Raises UsageError when a role is unknown, when one that was asked for by name matches nothing, or when nothing is
    left, listing what the model has.
    """
    unknown = [role for role in roles if role not in PROJECTIONS]
    if unknown:
        raise UsageError(f"adapter.targets: unknown role {unknown[0]!r}", f"roles are {', '.join(ROLES)}")
    layers = text_projections(model)
    has_experts = any("experts" in n.split(".") for n, _ in model.named_modules())
    usable = [role for role in roles if not (has_experts and role in MLP_ROLES)]
    found: dict[str, list[str]] = {}
    for role in usable:
        matched = {e: names for e in PROJECTIONS[role] if (names := [n for n in layers if ending_of(n) == e])}
        if not matched and set(roles) != set(ROLES):
            raise UsageError(
                f"adapter.targets: role {role!r} matches no module of {type(model).__name__}",
                f"this model has {', '.join(sorted({n.rsplit('.', 1)[-1] for n in layers}))}",
            )
        found |= matched
    if not found:
        raise UsageError(
            f"adapter.targets: {list(roles)} leaves nothing to adapt to in {type(model).__name__}",
            "on mixture-of-experts models the roles are q, k, v, o"
            if has_experts
            else f"this model has {', '.join(sorted({n.rsplit('.', 1)[-1] for n in layers})) or 'no linear layers'}",
        )
    wanted = [name for names in found.values() for name in names]
    everywhere = [n for n, m in model.named_modules() if isinstance(m, PROJECTION_TYPES) and is_target(n, found)]
    return list(found) if set(everywhere) == set(wanted) else wanted


def is_target(name: str, targets: Iterable[str]) -> bool:
    """Whether PEFT takes a module of this name for one of the targets."""
    return any(name == target or name.endswith(f".{target}") for target in targets)


def ending_of(name: str) -> str | None:
    """The longest known ending of a module's name."""
    return next((ending for ending in ENDINGS if is_target(name, [ending])), None)


def text_projections(model: nn.Module) -> list[str]:
    """Names of the linear layers within the text decoder's layers; of all of them where those cannot be told."""
    trunk, prefix = trunk_of(model), trunk_name(model)
    head = output_embeddings(model)
    types, refused = NO_LORA
    left_out = refused if getattr(getattr(model, "config", None), "model_type", None) in types else ()
    names = [
        f"{prefix}.{name}".removeprefix(".")
        for name, module in trunk.named_modules()
        if isinstance(module, PROJECTION_TYPES) and module is not head and name.rsplit(".", 1)[-1] not in left_out
    ]
    layers = f"{prefix}.{layer_list(model, trunk)}.".removeprefix(".")
    inside = [name for name in names if name.startswith(layers)]
    return inside or names


def trunk_name(model: nn.Module) -> str:
    """Name within the model of what `trunk_of` finds, such as `model`; empty where that is the model itself."""
    trunk = trunk_of(model)
    return next(name for name, module in model.named_modules() if module is trunk)


def trunk_of(model: nn.Module) -> nn.Module:
    """The text decoder: from embeddings to the last norm.

    `get_decoder` takes what is called so, which in ModernBERT is the projection to the vocabulary, or the whole model.
    """
    decoder: nn.Module = model.get_decoder() if isinstance(model, PreTrainedModel) else model
    if output_embeddings(model) not in set(decoder.modules()):
        return decoder
    if decoder is not model and isinstance(decoder, PreTrainedModel):
        return trunk_of(decoder)  # a language model with its head, inside a model of several parts (Llama 4)
    inside = [child for child in model.children() if isinstance(child, PreTrainedModel)]
    return inside[0] if len(inside) == 1 else decoder


def output_embeddings(model: nn.Module) -> nn.Module | None:
    return model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None


def layer_list(model: nn.Module, trunk: nn.Module) -> str:
    """Name within the trunk of the list that holds its layers: of those as long as the model is deep, the outermost."""
    config = getattr(model, "config", None)
    count = None if config is None else getattr(config.get_text_config(), "num_hidden_layers", None)
    lists = [n for n, m in trunk.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    return min(lists, key=lambda name: name.count("."), default="")
