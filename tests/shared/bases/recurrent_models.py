"""Tiny random models with recurrent layers, most beside attention, of every kind of state that rows get through."""

from collections.abc import Callable, Mapping

import torch
from tiny_models import MLA, MOE, SIZES, randomize
from tiny_models import build as build_attending
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    FalconH1Config,
    GraniteMoeHybridConfig,
    JambaConfig,
    KimiLinearConfig,
    Lfm2Config,
    MambaConfig,
    MiniMaxConfig,
    OlmoHybridConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    Zamba2Config,
)

LAYERS = {"num_hidden_layers": 3, "layer_types": ["linear_attention", "full_attention", "linear_attention"]}
DELTA = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 6,  # no power of two: sums over it have a rest
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_chunk_size": 16}


def _qwen3_next() -> PreTrainedConfig:
    experts = {**MOE, "num_experts": 4, "shared_expert_intermediate_size": 24}
    return Qwen3NextConfig(
        **{
            **SIZES,
            **LAYERS,
            **DELTA,
            **experts,
            "head_dim": 12,
        }
    )


def _qwen3_5() -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [1, 1, 1], "partial_rotary_factor": 0.5}
    return Qwen3_5TextConfig(
        **{
            **SIZES,
            **LAYERS,
            **DELTA,
            "head_dim": 12,
            "rope_parameters": rope,
        }
    )


def _olmo_hybrid() -> PreTrainedConfig:
    return OlmoHybridConfig(**{**SIZES, **LAYERS, **DELTA, "linear_num_key_heads": 4})


def _lfm2() -> PreTrainedConfig:
    kinds = {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}
    return Lfm2Config(**{**SIZES, **kinds}, conv_L_cache=3, conv_bias=True, block_auto_adjust_ff_dim=False)


def _bamba() -> PreTrainedConfig:
    return BambaConfig(**{**SIZES, "num_hidden_layers": 3}, **MAMBA, attn_layer_indices=[1])


def _granitemoehybrid() -> PreTrainedConfig:
    sizes = {**SIZES, "num_hidden_layers": 3}
    kinds = ["linear_attention", "full_attention", "linear_attention"]
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 24}
    return GraniteMoeHybridConfig(
        **sizes, **MAMBA, **experts, layer_types=kinds, embedding_multiplier=2.0, logits_scaling=0.5
    )


def _falcon_h1() -> PreTrainedConfig:
    """Every layer has a state, and attends beside it."""
    return FalconH1Config(**SIZES, **MAMBA, mamba_d_ssm=64, lm_head_multiplier=0.5, ssm_in_multiplier=0.7)


def _mamba() -> PreTrainedConfig:
    """No layer attends."""
    return MambaConfig(**{**SIZES, "num_hidden_layers": 3}, state_size=6)


def _jamba() -> PreTrainedConfig:
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    kinds = {"num_hidden_layers": 3, "attn_layer_period": 2, "attn_layer_offset": 1}
    return JambaConfig(**{**SIZES, **kinds, **experts}, mamba_d_state=6)


def _kimi_linear() -> PreTrainedConfig:
    """The layer that attends is MLA."""
    experts = {**MOE, "num_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    heads = {"linear_num_heads": 4, "linear_head_dim": 6}
    return KimiLinearConfig(**{**SIZES, **LAYERS, **MLA, **experts, **heads}, q_lora_rank=None)


def _minimax() -> PreTrainedConfig:
    """Lightning attention; prompts run in blocks."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return MiniMaxConfig(**{**SIZES, **LAYERS, **experts}, head_dim=6, block_size=16, linear_attn_alpha_factor=0.8)


def _recurrent_gemma() -> PreTrainedConfig:
    """RG-LRU, and a layer that slides; its configuration names no context."""
    kinds = {"num_hidden_layers": 3, "block_types": ["recurrent", "attention", "recurrent"]}
    sizes = {name: size for name, size in SIZES.items() if name != "max_position_embeddings"}
    return RecurrentGemmaConfig(
        **{**sizes, **kinds, "intermediate_size": 96}, lru_width=32, attention_window_size=8, logits_soft_cap=2.0
    )


def _zamba2() -> PreTrainedConfig:
    """A block that several layers share attends in two of three; none of its modules knows in which.

    transformers bounds time steps from below in prompts and not in steps; a model where that tells is refused at load.
    """
    kinds = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
    sizes = {
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "mamba_d_state": 6,
        "chunk_size": 16,
        "num_mem_blocks": 1,
        "time_step_min": 1e-9,
    }
    return Zamba2Config(**{**SIZES, **kinds, **sizes}, mamba_headdim=8, use_mem_rope=True)


RECURRENT: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "qwen3_next": _qwen3_next,
    "qwen3_5": _qwen3_5,
    "olmo_hybrid": _olmo_hybrid,
    "lfm2": _lfm2,
    "bamba": _bamba,
    "granitemoehybrid": _granitemoehybrid,
    "falcon_h1": _falcon_h1,
    "mamba": _mamba,
    "jamba": _jamba,
    "kimi_linear": _kimi_linear,
    "minimax": _minimax,
    "recurrent_gemma": _recurrent_gemma,
    "zamba2": _zamba2,
}


def build(name: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model of this name, on the CPU, the same at equal seed."""
    config = RECURRENT[name]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # what is drawn beside weights: decays
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    return model.to(dtype).eval()


def any_tiny(name: str) -> PreTrainedModel:
    """One of these, or of those that only attend."""
    return build(name) if name in RECURRENT else build_attending(name)
