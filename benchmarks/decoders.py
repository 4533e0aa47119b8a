"""A tiny random model of every decoder in transformers' causal-LM mapping, made from its configuration class.

The sizes are set by the names that configuration classes use for them; what a family needs besides is in `CHANGES`.
Not here: what is done with the models (`scripts/sweep.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

VOCABULARY = 64
CONTEXT = 128
WINDOW = 8
"""Positions that a sliding layer sees."""
LAYERS = 2
MOST = 20_000_000
"""Parameters of a model that counts as tiny."""

SIZES: Mapping[str, Any] = {
    **dict.fromkeys(("vocab_size", "num_embeddings"), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "model_dim"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(
        ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers"), LAYERS
    ),
    **dict.fromkeys(
        ("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "encoder_attention_heads"), 4
    ),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"), CONTEXT),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k"), 2),
    **dict.fromkeys(("sliding_window", "attention_window_size", "attention_chunk_size", "window_size"), WINDOW),
    "num_key_value_heads": 2,
    "head_dim": 8,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "index_topk": 4,
    "index_n_heads": 16,
    "index_head_dim": 16,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "is_decoder": True,
    "tie_word_embeddings": False,
    "forced_eos_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}

LINEAR = {"layer_types": ["linear_attention", "full_attention"]}
"""As many layers as there are here would all be recurrent, which not even `generate` decodes."""
KIMI = {**LINEAR, "linear_num_heads": 4, "linear_head_dim": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2}
PADDED = {"text_config": {"pad_token_id": 0}}
NO_WINDOW = {"sliding_window": CONTEXT}
"""As long as the context, as published."""
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
ROBERTA = ("camembert", "data2vec-text", "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl")
CHANGES: Mapping[str, Mapping[str, Any]] = {
    "bamba": {**MAMBA, "attn_layer_indices": [1]},
    "codegen": {"rotary_dim": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}},
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10_000.0, "kv_n_heads": 2}},
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    "gemma4": PADDED,
    "gemma4_unified": PADDED,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    **dict.fromkeys(("kimi_linear", "bailing_hybrid"), KIMI),
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "gptj": {"rotary_dim": 8},
    "granitemoehybrid": {**MAMBA, **LINEAR},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_d_state": 16},
    "zamba2": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "linear_attention"]},
    **{name: {"layer_types": ["conv", "full_attention"]} for name in ("lfm2", "lfm2_moe", "lfm3")},
    **{name: {"indexer_types": ["full", "shared"]} for name in ("glm_moe_dsa", "hy_v4")},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 2,
    },
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mllama": {"text_config": {"num_hidden_layers": 3, "cross_attention_layers": [1]}},
    "zaya": {"num_experts_per_tok": 1},
    "moshi": NO_WINDOW,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "nemotron_h": {
        "layer_types": ["linear_attention", "full_attention", "moe", "mlp"],
        "num_hidden_layers": 4,
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "ssm_state_size": 16,
        "moe_shared_expert_intermediate_size": 24,
    },
    "phimoe": NO_WINDOW,
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "qwen4_exp_text"), LINEAR),
    **{name: {"text_config": LINEAR} for name in ("qwen3_5", "qwen3_5_moe", "qwen4_exp")},
    "reformer": {"axial_pos_embds_dim": (16, 16), "axial_pos_shape": (8, 16)},
    **{name: {"pad_token_id": 1} for name in ROBERTA},
    "xmod": {"pad_token_id": 1, "default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3},
}
REQUIRED_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
"""Where a family does not take None for one of its special tokens."""


def names() -> list[str]:
    """Every entry of the mapping, by model type."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING._model_mapping)


def config_of(name: str) -> PreTrainedConfig:
    """The tiny configuration of an entry.  Raises whatever the class says to sizes that do not suit it."""
    return shrunk(CONFIG_MAPPING[name], CHANGES.get(name, {}))


def shrunk(kind: type[PreTrainedConfig], changes: Mapping[str, Any]) -> PreTrainedConfig:
    fields = {f.name: f.type for f in dataclasses.fields(kind)}
    aliases = {theirs: ours for ours, theirs in (kind.attribute_map or {}).items()}
    values: dict[str, Any] = {}
    for field, type_ in fields.items():
        known = next((n for n in (field, aliases.get(field)) if n in SIZES), None)
        if known is not None:
            required = field in REQUIRED_IDS and "None" not in str(type_)
            values[field] = REQUIRED_IDS[field] if required else SIZES[known]
    if "kv_lora_rank" in fields:
        values["num_key_value_heads"] = values["num_attention_heads"]
    default = kind()
    for field in kind.sub_configs or {}:
        part = getattr(default, field, None)
        if isinstance(part, PreTrainedConfig):
            values[field] = shrunk(type(part), changes.get(field, {}))
    values.update({k: v for k, v in changes.items() if k not in (kind.sub_configs or {})})
    return kind(**values)


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """fp32, on the CPU, eval mode, weights lively enough that a wrong mask changes the output."""
    config = config_of(name)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > MOST:
        raise ValueError(f"{size} parameters, more than a tiny model's {MOST}")
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    enliven(model, seed)
    return model.eval()


@torch.no_grad()
def enliven(model: PreTrainedModel, seed: int) -> None:
    """Give every weight a value that matters: large matrices, small biases, norms that differ.

    With transformers' own 0.02 a random model repeats one token, whatever it attends to; so it does with large biases.
    """
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter is embedding.weight:
            parameter.copy_(noise / float(getattr(embedding, "embed_scale", 1.0)))
        elif parameter.ndim > 1:
            parameter.copy_(noise * 0.4)
        elif name.endswith("bias"):
            parameter.copy_(noise * 0.05)
        elif name.endswith("sinks"):
            parameter.copy_(noise)
        elif "norm" in name.lower() or "ln_" in name:
            parameter.add_(noise, alpha=0.5)  # neutral is 1, or 0: keep what the model chose
