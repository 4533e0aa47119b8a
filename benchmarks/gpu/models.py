"""Models of published shapes with random weights, made on the device: nothing is downloaded, nothing read.

Every tensor is a function of its name alone, so the fused decoder and the transformers model hold equal values.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen3Config

from retrofit.adapters.heads import Heads
from retrofit.adapters.layout import DraftLayout

WEIGHT_STD = 0.02
"""At hidden size 4096, scores of attention and logits then have a spread of about one: every token matters."""
ADAPTER_STD = 0.02
NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}

_SIZES_8B = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
_QWEN3 = {
    "vocab_size": 151936, "head_dim": 128, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip
PUBLISHED: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama-3.1-8b": (LlamaConfig, {
        **_SIZES_8B, "vocab_size": 128256, "intermediate_size": 14336, "num_hidden_layers": 32,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
        "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    }),
    "qwen3-8b": (Qwen3Config, {
        **_SIZES_8B, **_QWEN3, "intermediate_size": 12288, "num_hidden_layers": 36, "tie_word_embeddings": False,
    }),
    "qwen3-0.6b": (Qwen3Config, {
        **_QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "tie_word_embeddings": True,
    }),
}  # fmt: skip
TINY = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 16384,
}  # fmt: skip


def config_of(shape: str, tiny: bool = False) -> PreTrainedConfig:
    """The configuration of a published shape; tiny: its architecture in the least size."""
    kind, sizes = PUBLISHED[shape]
    return kind(**{**sizes, **NO_SPECIAL_TOKENS, **(TINY if tiny else {})})


@cache
def _shapes(shape: str, tiny: bool) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(shape, tiny))
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def random_checkpoint(
    shape: str, device: torch.device, dtype: torch.dtype, tiny: bool = False
) -> Callable[[str], Tensor]:
    """A tensor by name, made when asked for; KeyError for a name the model does not have."""
    shapes = _shapes(shape, tiny)
    # Tiny models are narrow: larger weights give their scores and logits the spread that the wide ones have.
    std = 0.3 if tiny else WEIGHT_STD

    def read(name: str) -> Tensor:
        size = shapes[name]
        if "norm" in name:
            return torch.ones(size, device=device, dtype=dtype)
        return random_tensor(name, size, device, dtype).mul_(std)

    return read


def random_tensor(name: str, size: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(size, generator=generator, device=device, dtype=dtype)


def random_adapter(config: Any, rank: int, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """LoRA on all seven projections under PEFT's names."""
    hidden, inner, width = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * width, config.num_key_value_heads * width
    sizes = {
        "self_attn.q_proj": (hidden, q), "self_attn.k_proj": (hidden, kv), "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden), "mlp.gate_proj": (hidden, inner), "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }  # fmt: skip
    state = {}
    for layer in range(config.num_hidden_layers):
        for name, (inputs, outputs) in sizes.items():
            key = f"base_model.model.model.layers.{layer}.{name}.lora"
            for half, size in (("A", (rank, inputs)), ("B", (outputs, rank))):
                full = f"{key}_{half}.weight"
                state[full] = random_tensor(full, size, device, dtype).mul_(ADAPTER_STD)
    return state


@torch.no_grad()
def random_heads(config: Any, layout: DraftLayout, rank: int, device: torch.device, dtype: torch.dtype) -> Heads:
    """Mask vector, Markov head and confidence head, none of them zero."""
    with torch.device(device):
        heads = Heads(config.hidden_size, config.vocab_size, layout.drafts, rank, confidence=True)
    for name, parameter in heads.named_parameters():
        parameter.copy_(random_tensor(name, tuple(parameter.shape), device, dtype).mul_(ADAPTER_STD))
        parameter.requires_grad_(False)
    return heads


@torch.no_grad()
def transformers_model(shape: str, device: torch.device, dtype: torch.dtype, tiny: bool = False) -> PreTrainedModel:
    """The original's own modules with the same values."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config_of(shape, tiny), dtype=dtype, attn_implementation="sdpa")
    checkpoint = random_checkpoint(shape, device, dtype, tiny)
    for name, parameter in model.named_parameters():
        parameter.copy_(checkpoint(name))
    return model.to(device).eval()
