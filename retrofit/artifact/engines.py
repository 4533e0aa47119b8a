"""Which artifacts a serving engine can draft with, as data; an artifact that does not fit is refused with all that is
to be changed.

Not here: starting an engine.  This file imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrofit.errors import RetrofitError, UnsupportedModelError, UsageError

WANTED: dict[str, dict[str, Any]] = {
    "vllm": {"draft.shift": 1, "draft.seed_row": "base"},
    "sglang": {
        "draft.input": "noise",
        "draft.attention": "causal",
        "draft.shift": 1,
        "draft.seed_row": "base",
        "adapter.markov_rank": 0,
        "adapter.confidence": False,
    },
    "nemotron": {
        "draft.input": "mask",
        "draft.attention": "bidirectional",
        "draft.shift": 0,
        "draft.seed_row": "draft",
        "adapter.markov_rank": 0,
        "adapter.confidence": False,
    },
}
"""Engine -> recipe key -> the one value it can draft with.  Of SGLang: its UNO, sgl-project/sglang#37667; of Nemotron,
which is no engine: what reads checkpoints of Nemotron-Labs-Diffusion."""

ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
"""Bases whose vLLM model was read: decoders with full attention in every layer, embeddings that are not scaled, and
projections that go by transformers' names."""

STATEFUL = (
    "BailingHybridForCausalLM", "BambaForCausalLM", "FalconH1ForCausalLM", "FalconMambaForCausalLM",
    "GraniteMoeHybridForCausalLM", "JambaForCausalLM", "KimiLinearForCausalLM", "Lfm2ForCausalLM",
    "Lfm2MoeForCausalLM", "Lfm3ForCausalLM", "Mamba2ForCausalLM", "MambaForCausalLM", "MiniMaxForCausalLM",
    "NemotronHForCausalLM", "OlmoHybridForCausalLM", "Qwen3NextForCausalLM", "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM", "RecurrentGemmaForCausalLM", "Zamba2ForCausalLM",
)  # fmt: skip
"""Bases that retrofit converts and whose layers have a recurrent state, which UNO's two forwards do not roll back."""


def refuse_unfit(name: str, config: Mapping[str, Any], engine: str) -> None:
    """Raise UsageError or UnsupportedModelError for an artifact that an engine cannot draft with.

    name: what the artifact is called; config: its `retrofit.json`.
    """
    base = config["base"]
    if engine == "sglang" and "gguf" in base:
        raise UsageError(
            f"{name} cannot be served by {engine}: its base is a GGUF file",
            "save the base once as safetensors (docs/bases.md) and convert that",
        )
    if engine == "vllm" and base["architecture"] not in ARCHITECTURES:
        raise UnsupportedModelError(
            f"{name} cannot be served by vllm: drafting there is written for {', '.join(ARCHITECTURES)}, "
            f"and its base is {base['architecture']}",
            "decode it with retrofit: `retrofit generate`",
        )
    if engine == "sglang" and base["architecture"] in STATEFUL:
        raise UnsupportedModelError(
            f"{name} cannot be served by sglang: drafts that are refused stay in the state of a {base['architecture']}",
            "decode it with retrofit: `retrofit generate`",
        )
    wrong = unfit(config, engine)
    if wrong:
        said = "; ".join(f"{key} is {found}, not {want}" for key, (found, want) in wrong.items())
        change = " ".join(f"{key}={want}" for key, (_, want) in wrong.items())
        raise UsageError(f"{name} cannot be served by {engine}: {said}", f"convert the base with {change}")


def fits(config: Mapping[str, Any], engine: str) -> bool:
    """Whether an engine can draft with an artifact."""
    try:
        refuse_unfit("", config, engine)
    except RetrofitError:
        return False
    return True


def unfit(config: Mapping[str, Any], engine: str) -> dict[str, tuple[str, str]]:
    """Recipe key -> (what it is, what the engine wants), as a recipe has them, where these differ."""
    found = {key: _value(config, key) for key in WANTED[engine]}
    return {key: (_shown(found[key]), _shown(want)) for key, want in WANTED[engine].items() if found[key] != want}


def _value(config: Mapping[str, Any], key: str) -> Any:
    section, _, name = key.partition(".")
    return config[section][name] if name else config[section]


def _shown(value: Any) -> str:
    """As a recipe has it."""
    return str(value).lower()
