"""Tiny random models of the architectures that tests run on, and of some that must be refused.

Built in code, without network or files: vocabulary 64, hidden 32, two or three layers, a context of 128
positions, fp32, eval mode. The weights are larger than a usual initialisation on purpose: with transformers'
0.02 a random model repeats one token for ever and attention is nearly uniform, so a wrong mask or a stale
cache slot would change no greedy token.
"""

from collections.abc import Callable, Mapping
from functools import partial

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DeepseekV2Config,
    DeepseekV3Config,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    RwkvConfig,
)

VOCABULARY = 64
CONTEXT = 128
WINDOW = 8  # positions a sliding layer sees, its own included
ORIGINAL_CONTEXT = 32  # where yarn, llama3 and longrope say the base was trained up to

WEIGHT_STD = 0.3
NORM_STD = 0.5

NO_SPECIAL_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    **NO_SPECIAL_TOKENS,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "num_key_value_heads": 4,
}
THETA = 10_000.0


def _rope(rope_type: str, **parameters: object) -> dict[str, object]:
    return {"rope_type": rope_type, "rope_theta": THETA, **parameters}


def _llama(**changes: object) -> PreTrainedConfig:
    return LlamaConfig(**{**SIZES, **changes})


def _mistral(window: int | None) -> PreTrainedConfig:
    return MistralConfig(**SIZES, sliding_window=window)


def _qwen2(**changes: object) -> PreTrainedConfig:
    return Qwen2Config(**{**SIZES, **changes})


def _qwen3(**changes: object) -> PreTrainedConfig:
    return Qwen3Config(**{**SIZES, "head_dim": 12, **changes})


def _qwen3_moe() -> PreTrainedConfig:
    return Qwen3MoeConfig(**SIZES, **MOE, head_dim=12, num_experts=6, norm_topk_prob=True, mlp_only_layers=[0])


def _gemma2() -> PreTrainedConfig:
    return Gemma2Config(
        **{**SIZES, "tie_word_embeddings": True},
        head_dim=12,
        query_pre_attn_scalar=16,
        sliding_window=WINDOW,
        attn_logit_softcapping=5.0,
        final_logit_softcapping=1.0,
    )


def _gemma3() -> PreTrainedConfig:
    return Gemma3TextConfig(
        **{**SIZES, "tie_word_embeddings": True, "num_hidden_layers": 3},
        head_dim=12,
        query_pre_attn_scalar=4,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        rope_parameters={
            "full_attention": {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": THETA},
        },
    )


def _phi3(**changes: object) -> PreTrainedConfig:
    return Phi3Config(**{**SIZES, "original_max_position_embeddings": CONTEXT, **changes})


def _phi3_longrope() -> PreTrainedConfig:
    """Short factors below ORIGINAL_CONTEXT, long above; 6 of 8 dimensions rotate (3/4, as in Phi-4-mini)."""
    rope = _rope(
        "longrope",
        short_factor=[1.0, 1.1, 1.2],
        long_factor=[1.5, 3.0, 6.0],
        original_max_position_embeddings=ORIGINAL_CONTEXT,
        partial_rotary_factor=0.75,
        factor=CONTEXT / ORIGINAL_CONTEXT,
    )
    return _phi3(original_max_position_embeddings=ORIGINAL_CONTEXT, rope_parameters=rope)


def _olmo2() -> PreTrainedConfig:
    return Olmo2Config(**SIZES)


def _deepseek_v2(**changes: object) -> PreTrainedConfig:
    """The first layer is dense, the others have 2 of 6 routed experts and one shared expert."""
    sizes = {**SIZES, **MOE, **MLA, "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1}
    return DeepseekV2Config(**{**sizes, **changes})


def _deepseek_v3(**changes: object) -> PreTrainedConfig:
    """As V2, with 4 expert groups of 2, of which 2 are open, and a correction bias on the experts' scores."""
    groups = {
        "n_routed_experts": 8,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 1,
        "num_mtp_layers": 0,
    }
    return DeepseekV3Config(**{**SIZES, **MOE, **MLA, **groups, "first_k_dense_replace": 1, **changes})


def _gpt_oss() -> PreTrainedConfig:
    """Attention sinks in both layers, of which the first slides."""
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssConfig(**SIZES, **experts, head_dim=8, sliding_window=WINDOW, rope_parameters=YARN)


def _llama4() -> PreTrainedConfig:
    """A layer that attends within chunks, and one without RoPE whose queries grow with the position."""
    return Llama4TextConfig(
        **SIZES,
        head_dim=8,
        intermediate_size_mlp=48,
        num_local_experts=4,
        attention_chunk_size=WINDOW,
        layer_types=["chunked_attention", "full_attention"],
        no_rope_layers=[1, 0],
        floor_scale=4,
        attn_scale=0.5,
    )


YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL_CONTEXT)
LLAMA3 = _rope(
    "llama3",
    factor=4.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=ORIGINAL_CONTEXT,
)
MLA_YARN = {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}
LAST_LAYER_SLIDES = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}

CONFIGS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "llama": _llama,
    "llama_tied": partial(_llama, tie_word_embeddings=True, num_key_value_heads=4),
    "llama_mqa": partial(_llama, num_key_value_heads=1, head_dim=12, attention_bias=True),
    "llama_rope_linear": partial(_llama, rope_parameters=_rope("linear", factor=4.0)),
    "llama_rope_dynamic": partial(_llama, rope_parameters=_rope("dynamic", factor=4.0)),
    "llama_rope_llama3": partial(_llama, rope_parameters=LLAMA3),
    "llama_rope_yarn": partial(_llama, rope_parameters=YARN),
    "mistral": partial(_mistral, None),
    "mistral_window": partial(_mistral, WINDOW),
    "qwen2": _qwen2,
    "qwen2_window": partial(_qwen2, **LAST_LAYER_SLIDES),
    "qwen3": _qwen3,
    "qwen3_window": partial(_qwen3, **LAST_LAYER_SLIDES),
    "qwen3_moe": _qwen3_moe,
    "gemma2": _gemma2,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "phi3_window": partial(_phi3, sliding_window=WINDOW),
    "phi3_longrope": _phi3_longrope,
    "olmo2": _olmo2,
    "deepseek_v2": partial(_deepseek_v2, q_lora_rank=16, topk_method="group_limited_greedy", n_group=3, topk_group=2),
    "deepseek_v2_lite": partial(_deepseek_v2, q_lora_rank=None, rope_parameters=MLA_YARN),
    "deepseek_v3": partial(_deepseek_v3, q_lora_rank=16, rope_parameters=MLA_YARN),
    "deepseek_v3_no_q_lora": partial(_deepseek_v3, q_lora_rank=None),
    "gpt_oss": _gpt_oss,
    "llama4": _llama4,
}


def _rwkv() -> PreTrainedConfig:
    return RwkvConfig(vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, **NO_SPECIAL_TOKENS)


def _bloom() -> PreTrainedConfig:
    return BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=2, n_head=4, **NO_SPECIAL_TOKENS)


def _falcon() -> PreTrainedConfig:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return FalconConfig(**sizes, **NO_SPECIAL_TOKENS)


REFUSED_CONFIGS: Mapping[str, Callable[[], PreTrainedConfig]] = {
    "rwkv": _rwkv,  # recurrent, of a kind that is not driven
    "bloom": _bloom,  # computes its attention itself (alibi)
    "falcon": _falcon,  # computes its attention itself
}


@torch.no_grad()
def randomize(model: PreTrainedModel, seed: int) -> None:
    """Give every weight, bias, router and norm a value that matters."""
    generator = torch.Generator().manual_seed(seed)
    embedding = model.get_input_embeddings()
    embed_scale = getattr(embedding, "scalar_embed_scale", 1.0)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.add_(noise, alpha=NORM_STD)  # neutral is 1, or 0 for Gemma: keep what the model chose
        elif parameter is embedding.weight:
            # Gemma multiplies its (tied) embeddings: at full size every token would predict itself.
            parameter.copy_(noise * WEIGHT_STD / embed_scale)
        elif parameter.ndim > 1 or name.endswith((".bias", ".sinks")):
            parameter.copy_(noise * WEIGHT_STD)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=generator) * WEIGHT_STD)


def build(name: str, seed: int = 0, eos_token_id: int | None = None) -> PreTrainedModel:
    """The tiny model `name` (a key of ARCHITECTURES or REFUSED): fp32, on the CPU, the same at equal seed."""
    config = {**CONFIGS, **REFUSED_CONFIGS}[name]()
    config.eos_token_id = eos_token_id
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state as it was
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    return model.eval()


ARCHITECTURES: Mapping[str, Callable[..., PreTrainedModel]] = {name: partial(build, name) for name in CONFIGS}
REFUSED: Mapping[str, Callable[..., PreTrainedModel]] = {name: partial(build, name) for name in REFUSED_CONFIGS}
