"""How long a text a model can hold, and where its RoPE changes, as its configuration means it.

rope type                 context
default, linear, llama3   max_position_embeddings
dynamic                   max_position_embeddings: beyond it the frequencies of what is cached would change
yarn, longrope            factor x original_max_position_embeddings, or max_position_embeddings if that is more:
                          some configurations write the extended length there (DeepSeek, Phi), some the original one
                          (Qwen's instructions for YaRN)
none named                UNBOUNDED: states and windows take in any number of positions
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationMixin, PreTrainedModel

from retrofit.errors import UnsupportedModelError

UNBOUNDED = 1 << 20


def attends(config: Any) -> bool:
    """Whether any layer of this text configuration attends; Mamba's are all recurrent."""
    return _kinds(config) != {"linear_attention"}


def names_context(config: Any) -> bool:
    """Whether this text configuration says how long a text may be, or need not: no layer sees all of it."""
    named = isinstance(getattr(config, "max_position_embeddings", None), int)
    return named or _kinds(config) <= {"linear_attention", "sliding_attention"}


def _kinds(config: Any) -> set[str]:
    return set(getattr(config, "layer_types", None) or ["full_attention"])


def context_length(config: Any) -> int:
    """Positions that a model of this text configuration computes as it was meant to."""
    if not isinstance(getattr(config, "max_position_embeddings", None), int):
        return UNBOUNDED
    longest = int(config.max_position_embeddings)
    for rope in _ropes(config):
        if rope.get("rope_type") in ("yarn", "longrope") and rope.get("factor"):
            longest = max(longest, int(rope["factor"] * _original(rope, config)))
    return longest


def rope_boundary(config: Any) -> int | None:
    """Position at which longrope switches its frequencies for a whole forward; None for every other RoPE.

    Raises UnsupportedModelError where layers switch at different ones.
    """
    found = {_original(rope, config) for rope in _ropes(config) if rope.get("rope_type") == "longrope"}
    if len(found) > 1:
        raise UnsupportedModelError(f"layers switch their longrope frequencies at different positions: {sorted(found)}")
    return found.pop() if found else None


def restarts_at_boundary(model: PreTrainedModel) -> bool | None:
    """Whether `generate` runs a text again from its start where it crosses a longrope boundary.

    Phi-3's own code does; that of most families keeps what is cached, and only what follows has the new frequencies.
    None: the model prepares its inputs by code of its own, of which neither is known.
    """
    if model.config.get_text_config().model_type == "phi3":
        return True
    return False if type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation else None


def _ropes(config: Any) -> list[dict[str, Any]]:
    """RoPE parameters, of each kind of layer where they differ."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _original(rope: dict[str, Any], config: Any) -> int:
    given = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(given or config.max_position_embeddings)
