"""How large the adapter of every shipped recipe is, counted on models without weights, offline.

Shapes are those of the published `config.json` files.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from retrofit.adapters.heads import Heads
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import is_target, resolve_targets
from retrofit.named_bases import EMBEDDED, embedded_folder
from retrofit.recipes.schema import Recipe, load_recipe, recipe_names

ANY_MODEL = "default"
"""The recipe that names no model, so has no size of its own."""
LARGE = 6e9
"""Base parameters from which a recipe is one of the `8B` ones of the bars."""


def published(model: str) -> PreTrainedConfig:
    """The shapes of a recipe's base; of layers, widths and vocabulary only."""
    if model == EMBEDDED:
        return AutoConfig.from_pretrained(embedded_folder())
    return {
        "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
            vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
            num_attention_heads=32, num_key_value_heads=8,
        ),
        "Qwen/Qwen3-0.6B": Qwen3Config(
            vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        ),
        "Qwen/Qwen3-8B": Qwen3Config(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        ),
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": Qwen2Config(
            vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28,
            num_attention_heads=28, num_key_value_heads=4, tie_word_embeddings=False,
        ),
        "deepseek-ai/DeepSeek-V2-Lite": DeepseekV2Config(
            vocab_size=102400, hidden_size=2048, intermediate_size=10944, moe_intermediate_size=1408,
            num_hidden_layers=27, num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64,
            n_shared_experts=2, num_experts_per_tok=6, first_k_dense_replace=1, kv_lora_rank=512,
            q_lora_rank=None, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
            tie_word_embeddings=False,
        ),
    }[model]  # fmt: skip


def adapter_size(recipe: Recipe) -> tuple[int, int]:
    """(parameters of adapter and heads, parameters of the base)."""
    adapter, draft = recipe.adapter, recipe.draft
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(published(recipe.base.model))
        vocabulary, hidden = model.get_output_embeddings().weight.shape
        drafts = DraftLayout(**draft.model_dump()).drafts
        heads = Heads(hidden, vocabulary, drafts, adapter.markov_rank, adapter.confidence)
    names = resolve_targets(model, adapter.targets)
    lora = sum(
        adapter.rank * (module.in_features + module.out_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and is_target(name, names)
    )
    return lora + count(heads), count(model)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def all_sizes() -> dict[str, tuple[int, int]]:
    """`adapter_size` of every recipe that names a model."""
    return {name: adapter_size(load_recipe(name)) for name in recipe_names() if name != ANY_MODEL}
