"""Tiny models as GGUF files, written by the `gguf` package as llama.cpp's converter lays them out."""

from pathlib import Path

import gguf
import numpy as np
import torch
from tiny_models import CONTEXT, VOCABULARY, randomize
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz.,:()=+"
TOKENS = [*LETTERS, "Ġ", "Ċ", "th"]
EOS = VOCABULARY - 1
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,  # rows of a multiple of 32 can be quantised
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen2": lambda: Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen3": lambda: Qwen3Config(**SIZES, tie_word_embeddings=True),  # heads of 128: a GGUF file does not say
    "gemma3": lambda: Gemma3TextConfig(**SIZES, tie_word_embeddings=True, head_dim=16, sliding_window=8),
}


def model_of(name: str) -> PreTrainedModel:
    """A random model of a family, in fp32."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
    randomize(model, 0)
    return model


def write_gguf(
    path: Path, name: str, kind: str = "F32", *, arch: str | None = None, **metadata: str
) -> PreTrainedModel:
    """The file of a tiny model, and the model as it was before.

    kind: type of the matrices whose rows allow it; the others, and vectors, are F32.  arch: what the file says it is.
    metadata: more of it, with `__` for the dot, as text.
    """
    model = model_of(name)
    config = model.config
    writer = gguf.GGUFWriter(path, arch or name)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(VOCABULARY)
    if name == "llama":
        writer.add_rope_dimension_count(config.head_dim)
    if name == "gemma3":
        writer.add_key_length(config.head_dim)
        writer.add_sliding_window(config.sliding_window)
    else:
        writer.add_rope_freq_base(10_000.0)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    add_tokenizer(writer)
    names = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name.upper()), config.num_hidden_layers)
    for key, tensor in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stem, suffix = key.rsplit(".", 1)
        add_tensor(writer, f"{names.get_name(stem)}.{suffix}", stored(name, key, tensor, config), kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def add_tensor(writer: gguf.GGUFWriter, name: str, values: np.ndarray, kind: str = "F32") -> None:
    wanted = gguf.GGMLQuantizationType[kind]
    rows_fit = values.ndim == 2 and values.shape[-1] % gguf.GGML_QUANT_SIZES[wanted][0] == 0
    kept = wanted if rows_fit else gguf.GGMLQuantizationType.F32
    writer.add_tensor(name, gguf.quantize(values, kept), raw_dtype=kept)


def stored(name: str, key: str, tensor: torch.Tensor, config: LlamaConfig) -> np.ndarray:
    """A tensor as llama.cpp has it: Llama's heads turned for its rotation, Gemma's norms counted from 0."""
    values = tensor.numpy()
    if name == "gemma3" and key.endswith("norm.weight"):
        return values + 1
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(key.split(".")[-2])
    if name != "llama" or heads is None:
        return values
    return values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)


def add_tokenizer(writer: gguf.GGUFWriter) -> None:
    """Byte-level, of single letters and one merge; the last token ends a text."""
    tokens = [*TOKENS, *(f"<unused{i}>" for i in range(VOCABULARY - len(TOKENS) - 1)), "<end>"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (VOCABULARY - 1) + [3])
    writer.add_token_merges(["t h"])
    writer.add_eos_token_id(EOS)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}\n{% endfor %}")
