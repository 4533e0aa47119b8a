"""What is measured: an artifact of a model folder, its engines as they were and as they are, prompts.

An option that this version's `Engine.load` does not have is left out, so that the same program measures older ones.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import retrofit
from retrofit.adapters.attach import Attached, attach
from retrofit.adapters.layout import DraftLayout
from retrofit.adapters.roles import ROLES
from retrofit.artifact import folder as artifacts
from retrofit.hub import load_base
from retrofit.runtime.engine import Engine

DTYPES = ("bfloat16", "float32")
SETTINGS: dict[str, dict[str, Any]] = {"before": {"exact": "off", "packed": False}, "now": {}}
"""How an engine is loaded: with plain products and the attention that is fastest then, and with all defaults."""
ADAPTER: dict[str, Any] = {"rank": 8, "alpha": 8.0, "targets": list(ROLES), "markov_rank": 64, "confidence": True}


@dataclass(frozen=True)
class Task:
    """model: a transformers folder; artifact: one for it; quick: fewer repeats, and less of everything.

    full: of `bitwise`, every batch at every temperature; only: of its models these, all if empty; types: of numbers,
    by default both, and with `quick` bfloat16.
    """

    model: Path
    artifact: Path
    quick: bool
    full: bool = False
    only: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    loaded: dict[str, Engine] = field(default_factory=dict)
    """Engines are loaded once for all sections: their self-tests take long."""

    @property
    def dtypes(self) -> tuple[str, ...]:
        return self.types or (DTYPES[:1] if self.quick else DTYPES)

    @cached_property
    def vocab(self) -> int:
        return int(self.original("bfloat16").config.get_text_config().vocab_size)

    def original(self, dtype: str) -> PreTrainedModel:
        """The untouched model."""
        kind = getattr(torch, dtype)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.model, dtype=kind).eval()
        return model

    def engine(self, dtype: str, **options: Any) -> Engine:
        known = inspect.signature(Engine.load).parameters
        given = {name: value for name, value in options.items() if name in known}
        key = f"{dtype} {given}"
        if key not in self.loaded:
            given |= {"base": str(self.model), "backend": "hf", "offline": True}
            self.loaded[key] = Engine.load(self.artifact, "cpu", dtype, **given)
        return self.loaded[key]

    def engines(self, dtype: str) -> dict[str, Engine]:
        """One for each setting."""
        return {name: self.engine(dtype, prefix_cache=0, **options) for name, options in SETTINGS.items()}

    def close(self) -> None:
        while self.loaded:
            self.loaded.popitem()[1].close()


def random_tokens(count: int, vocab: int, seed: int = 1) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (count,), generator=generator).tolist()


def untrained_artifact(model: Path, folder: Path) -> Path:
    """An artifact whose adapter has learned nothing: it costs what a trained one costs."""
    base = load_base(str(model), offline=True, need_tokenizer=False)
    attached = attach(base.model, DraftLayout(), **ADAPTER)
    return write_artifact(folder, str(model), base.fingerprint, base.model, attached, ADAPTER)


def write_artifact(
    folder: Path,
    name: str,
    fingerprint: Mapping[str, Any],
    model: PreTrainedModel,
    attached: Attached,
    adapter: Mapping[str, Any],
    **more: Any,
) -> Path:
    """An artifact of what is attached to a model, as `convert` would write it, without any training.

    name, fingerprint: of the base; adapter: what `attach` was given; more: other keys of its configuration.
    """
    config = {
        "format": artifacts.FORMAT,
        "retrofit": retrofit.__version__,
        "base": {
            "model": name,
            "revision": None,
            "dtype": str(model.dtype).removeprefix("torch."),
            "fingerprint": fingerprint,
            "architecture": type(model).__name__,
        },
        "profile": "frozen",
        "draft": attached.layout.to_dict(),
        "adapter": {**adapter, "modules": sorted(attached.adapter_config()["target_modules"])},
        "parameters": {
            "adapter": sum(p.numel() for p in attached.lora_parameters()),
            "heads": sum(p.numel() for p in attached.heads.parameters()),
            "base": sum(p.numel() for p in attached.base_parameters()),
        },
        "acceptance": {"conditional": {kind: [0.5] * attached.layout.drafts for kind in ("greedy", "sampled")}},
        "training": {"steps": 0},
        **more,
    }
    return artifacts.write(
        folder,
        adapter_config=attached.adapter_config(),
        adapter_state=attached.adapter_state(),
        heads=attached.heads_state(),
        config=config,
        recipe_yaml="profile: frozen\n",
        card="# Untrained\n",
    )
