"""Weights of a Llama-shaped decoder, read from the original checkpoint by name and stacked by input.

    qkv       q_proj | k_proj | v_proj | LoRA A of q | of k | of v          one product, one weight, LoRA's first
    o         o_proj | LoRA A of o                                          factors beneath it; its second factors are
    gate_up   gate_proj | up_proj | LoRA A of gate | of up                  kept apart and meet draft rows only
    down      down_proj | LoRA A of down

Each tensor is copied once, from the file into its place.  Not here: running them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from retrofit.errors import UnsupportedModelError, UsageError
from retrofit.runtime.kernels.gemm import split_matmul, split_plan
from retrofit.weight_files import opened, weight_files

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
ROPES = ("default", "linear", "dynamic", "llama3", "yarn")
PEFT_PREFIX = "base_model.model."

Checkpoint = Callable[[str], Tensor]
"""A tensor of the original checkpoint by its name; KeyError when there is none."""


@dataclass
class Linear:
    """One matrix product: y = x W^T + b of stacked projections, with the hidden columns of their LoRA behind."""

    weight: Tensor
    """[width + LoRA columns, inputs]."""
    width: int
    bias: Tensor | None = None
    """[width + LoRA columns], 0 for those."""
    up: Tensor | None = None
    """[r, width] LoRA's second factors, scaled."""
    own_kernel: bool = False
    """Our matrix product, with a fixed order of addition, in place of the library's."""
    plan: tuple[int, int] = field(init=False)
    """(splits, block_k) of our matrix product: a function of the weight's shape."""

    def __post_init__(self) -> None:
        self.plan = split_plan(*self.weight.shape)

    def parts(self, x_RK: Tensor) -> tuple[Tensor, Tensor | None]:
        """(partial sums [S, R, N], bias that is still to be added)."""
        if self.own_kernel:
            bias = None if self.bias is None else self.bias[: self.width]
            return split_matmul(x_RK, self.weight, *self.plan), bias
        return F.linear(x_RK, self.weight, self.bias)[None], None

    def __call__(self, x_RK: Tensor) -> Tensor:
        """[R, width] in the dtype of x; for products without LoRA."""
        parts, bias = self.parts(x_RK)
        out = parts[0]
        for part in parts[1:]:  # in index order, which a sum over the dimension does not promise
            out = out + part
        return (out if bias is None else out + bias).to(x_RK.dtype)


@dataclass
class Layer:
    input_norm: Tensor
    qkv: Linear
    q_norm: Tensor | None
    k_norm: Tensor | None
    o: Linear
    post_norm: Tensor
    gate_up: Linear
    down: Linear
    window: int | None


@dataclass
class Weights:
    """All that a forward reads."""

    embedding: Tensor
    layers: list[Layer]
    norm: Tensor
    head: Linear

    def linears(self) -> list[Linear]:
        """Every matrix product of the model, the vocabulary's last."""
        return [m for y in self.layers for m in (y.qkv, y.o, y.gate_up, y.down)] + [self.head]

    @property
    def nbytes(self) -> int:
        """Bytes that one forward of few rows reads."""
        return sum(m.weight.nbytes for m in self.linears())


def unsupported(config: Any) -> str | None:
    """What keeps this model from the fused decoder; None when nothing does."""
    if config.model_type not in FAMILIES:
        return f"model type {config.model_type!r} is not one of {', '.join(FAMILIES)}"
    if getattr(config, "quantization_config", None):
        return "its weights are quantised"
    if config.hidden_act != "silu":
        return f"activation {config.hidden_act!r} is not silu"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ROPES:
        return f"RoPE type {rope.get('rope_type')!r} is not one of {', '.join(ROPES)}"
    if float(rope.get("partial_rotary_factor") or getattr(config, "partial_rotary_factor", None) or 1.0) != 1.0:
        return "it rotates only a part of each head"
    if set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}:
        return f"layer types {sorted(set(config.layer_types))}"
    if head_width(config) % 2:
        return f"head width {head_width(config)} is odd"
    return None


def head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def window_of(config: Any, layer: int) -> int | None:
    """Sliding window of a layer; Mistral's slides in every layer, Qwen's where the layer's type says so."""
    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if window is None or (types and types[layer] != "sliding_attention"):
        return None
    return None if getattr(config, "use_sliding_window", True) is False else int(window)


def from_folder(folder: Path, device: torch.device | str) -> Checkpoint:
    """The safetensors of a model folder, each tensor read when it is asked for, straight to the device."""
    files = [opened(path, str(device)) for path in weight_files(folder)]
    where = {name: file for file in files for name in file.keys()}  # noqa: SIM118

    def read(name: str) -> Tensor:
        tensor: Tensor = where[name].get_tensor(name)
        return tensor

    return read


def load(
    config: Any,
    checkpoint: Checkpoint,
    adapter: Mapping[str, Tensor],
    scale: float,
    device: torch.device,
    dtype: torch.dtype,
) -> Weights:
    """Read every tensor once.  adapter: tensors of `adapter_model.safetensors`; scale: LoRA's alpha / rank.

    Raises UnsupportedModelError for what the fused decoder cannot run, or where a tensor is missing.
    """
    reason = unsupported(config)
    if reason is not None:
        raise UnsupportedModelError(f"the fused backend cannot run this model: {reason}", "use backend='hf'")
    width, hidden, inner = head_width(config), config.hidden_size, config.intermediate_size
    q, kv = config.num_attention_heads * width, config.num_key_value_heads * width
    loader = _Loader(checkpoint, adapter, scale, device, dtype)

    def layer(i: int) -> Layer:
        at = f"model.layers.{i}"
        return Layer(
            input_norm=loader.tensor(f"{at}.input_layernorm.weight"),
            qkv=loader.stacked(f"{at}.self_attn", {"q_proj": q, "k_proj": kv, "v_proj": kv}, hidden),
            q_norm=loader.optional(f"{at}.self_attn.q_norm.weight"),
            k_norm=loader.optional(f"{at}.self_attn.k_norm.weight"),
            o=loader.stacked(f"{at}.self_attn", {"o_proj": hidden}, q),
            post_norm=loader.tensor(f"{at}.post_attention_layernorm.weight"),
            gate_up=loader.stacked(f"{at}.mlp", {"gate_proj": inner, "up_proj": inner}, hidden),
            down=loader.stacked(f"{at}.mlp", {"down_proj": hidden}, inner),
            window=window_of(config, i),
        )

    embedding = loader.tensor("model.embed_tokens.weight")
    layers = [layer(i) for i in range(config.num_hidden_layers)]
    norm = loader.tensor("model.norm.weight")
    head = loader.optional("lm_head.weight") if config.tie_word_embeddings else loader.tensor("lm_head.weight")
    # As transformers does: what is said to be tied and yet saved with another value is not.
    tied = head is None or (not head.is_meta and torch.equal(head, embedding))
    head = embedding if head is None or tied else head
    unused = sorted(set(adapter) - loader.used)
    if unused:
        raise UsageError(f"the adapter holds {unused[0]}, which the fused backend has no place for", "use backend='hf'")
    return Weights(embedding, layers, norm, Linear(head, len(head)))


class _Loader:
    def __init__(
        self,
        checkpoint: Checkpoint,
        adapter: Mapping[str, Tensor],
        scale: float,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.checkpoint, self.adapter, self.scale = checkpoint, adapter, scale
        self.device, self.dtype = device, dtype
        self.used: set[str] = set()

    def tensor(self, name: str) -> Tensor:
        found = self.optional(name)
        if found is None:
            raise UnsupportedModelError(f"the checkpoint has no tensor {name}", "use backend='hf'")
        return found

    def optional(self, name: str) -> Tensor | None:
        try:
            return self.checkpoint(name).to(self.device, self.dtype)
        except KeyError:
            return None

    def stacked(self, prefix: str, widths: Mapping[str, int], inputs: int) -> Linear:
        names = [f"{prefix}.{name}" for name in widths]
        down, up = self._lora(names, list(widths.values()))
        total = sum(widths.values())
        lora = 0 if down is None else len(down)
        weight = torch.empty(total + lora, inputs, dtype=self.dtype, device=self.device)
        start = 0
        for name, width in zip(names, widths.values(), strict=True):
            try:
                weight[start : start + width] = self.checkpoint(f"{name}.weight")
            except (KeyError, RuntimeError) as error:
                raise UnsupportedModelError(
                    f"the checkpoint's {name}.weight is missing or not [{width}, {inputs}]", "use backend='hf'"
                ) from error
            start += width
        if down is not None:
            weight[total:] = down
        biases = [self.optional(f"{name}.bias") for name in names]
        bias = None
        if any(b is not None for b in biases):
            zero = [torch.zeros(w, dtype=self.dtype, device=self.device) for w in widths.values()]
            parts = [z if b is None else b for b, z in zip(biases, zero, strict=True)]
            bias = torch.cat([*parts, torch.zeros(lora, dtype=self.dtype, device=self.device)])
        return Linear(weight, total, bias, up)

    def _lora(self, names: Sequence[str], widths: Sequence[int]) -> tuple[Tensor | None, Tensor | None]:
        """(first factors [r of each name, inputs], second factors [r, widths]); a name without LoRA has zeros."""
        keys = [[f"{PEFT_PREFIX}{name}.lora_{half}.weight" for half in "AB"] for name in names]
        found = [[self.adapter.get(key) for key in pair] for pair in keys]
        self.used.update(key for pair in keys for key in pair)
        have = [pair for pair in found if pair[0] is not None and pair[1] is not None]
        if not have:
            return None, None
        some = have[0][0]
        assert some is not None
        rank, inputs = some.shape
        made: dict[str, Any] = {"device": self.device, "dtype": torch.float32}
        downs, ups = [], []
        for (a, b), width in zip(found, widths, strict=True):
            downs.append(torch.zeros(rank, inputs, **made) if a is None else a.to(**made))
            ups.append(torch.zeros(rank, width, **made) if b is None else (b.to(**made) * self.scale).T)
        return torch.cat(downs).to(self.dtype), torch.cat(ups, dim=1).to(self.dtype)
