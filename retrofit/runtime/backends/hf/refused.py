"""Which models retrofit cannot run, by name and reason, told from what they say of themselves.

What slips through is caught by the first forwards (`load_check.py`).
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from retrofit.adapters.live import refuse_adapters
from retrofit.adapters.roles import trunk_of
from retrofit.adapters.visibility import Chunk
from retrofit.errors import UnsupportedModelError
from retrofit.runtime.backends.context import attends, names_context
from retrofit.runtime.backends.hf.recurrent.mixers import mixers_of
from retrofit.runtime.backends.hf.sparse.indexers import indexers_of

ATTENTION_LAYERS = {"full_attention", "sliding_attention", "chunked_attention"}
ROW_LAYERS = {"mlp", "moe"}
"""Layers of their own that look at each row alone."""
OTHER_LAYERS = {
    "window_attention": "attends within windows that do not overlap",
    "indexed_attention": "has sparse attention: an indexer picks the keys that each row sees",
    "minimax_m3_sparse": "has sparse attention: an indexer picks the keys that each row sees",
    "compressed_sparse_attention": "attends to compressed keys, several positions in one",
    "heavily_compressed_attention": "attends to compressed keys, several positions in one",
    "reference_sliding_attention": "slides over generated tokens only",
}
"""Kinds of layers that are no recurrence, and still not something that a row plan can say."""
INDEXED = {"indexed_attention", "minimax_m3_sparse"}
"""Of those, what runs where the indexers are known (`sparse/indexers.py`)."""
ATTENTION_ARGUMENTS = {
    "sinks": "has attention sinks that every row makes for itself",
    "position_bias": "adds a bias of its own to its attention scores",
    "indices": OTHER_LAYERS["indexed_attention"],
    "block_indices": OTHER_LAYERS["indexed_attention"],
}
"""What some attention modules hand on that changes what a row sees, beyond what the row plan says."""


def has_state(model: PreTrainedModel) -> bool:
    """Whether a layer of a model that is not refused has a state, which others do not roll back as they cut K/V."""
    return bool(_kinds(model.config.get_text_config()) - INDEXED)


def _kinds(config: PreTrainedConfig) -> set[str]:
    """Of the layers that neither attend in a way we know nor look at each row alone."""
    return set(getattr(config, "layer_types", None) or []) - ATTENTION_LAYERS - ROW_LAYERS


def refuse_unsupported(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError for what retrofit cannot do, by name; UsageError for a model another engine has."""
    refuse_adapters(model)
    name, config = type(model).__name__, model.config.get_text_config()
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(f"{name} has no language-model head; load it with AutoModelForCausalLM")
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; retrofit converts decoder-only models")
    kinds = _kinds(config)
    if indexers_of(trunk_of(model)):
        kinds -= INDEXED
    recurrent = sorted(kinds - set(OTHER_LAYERS))
    if kinds and not recurrent:
        raise unsupported_yet(name, OTHER_LAYERS[min(kinds)])
    driven = mixers_of(trunk_of(model))
    known = {config.layer_types[layer] for layer in driven}
    if set(recurrent) - known or (getattr(model, "_is_stateful", False) and not driven):
        raise UnsupportedModelError(
            f"{name} has recurrent or linear-attention layers ({', '.join(recurrent) or 'a recurrent state'}), "
            "of a kind that retrofit does not run row by row"
        )
    if attends(config) and not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{name} does not call transformers' attention interface, which retrofit drives it by"
        )
    width = model.get_input_embeddings().weight.shape[-1]
    if width != config.hidden_size:
        raise unsupported_yet(name, f"has embeddings of width {width} for hidden states of {config.hidden_size}")
    if not names_context(config):
        raise UnsupportedModelError(f"{name}: its configuration names no max_position_embeddings, the context length")


def refuse_call(module: Any, attention_mask: Any, arguments: dict[str, Any]) -> None:
    """Raise UnsupportedModelError where an attention module asks for more than a row plan says."""
    if attention_mask is not None:
        raise UnsupportedModelError(f"{type(module).__name__} makes an attention mask of its own")
    for argument, what in ATTENTION_ARGUMENTS.items():
        if arguments.get(argument) is not None:
            raise unsupported_yet(type(module).__name__, what)


def unsupported_yet(name: str, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"{name} {what}, which retrofit does not support yet")


def chunks_of(config: Any) -> dict[int, Chunk]:
    """layer -> its chunks, of layers that attend within chunks."""
    size, kinds = getattr(config, "attention_chunk_size", None), getattr(config, "layer_types", None) or []
    return {n: Chunk(size) for n, kind in enumerate(kinds) if size and kind == "chunked_attention"}


def has_sliding_window(config: Any, context: int) -> bool:
    """Whether any layer sees less than the context; where layers are not typed, all do."""
    window = getattr(config, "sliding_window", None)
    if not window or window >= context:
        return False
    types = getattr(config, "layer_types", None)
    if types:
        return "sliding_attention" in types
    return getattr(config, "use_sliding_window", True) is not False
