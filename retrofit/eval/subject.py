"""What is on trial: the engine in its run type, its base in any type, and the same engine in fp32.

Every extra model is built from the checkpoint where there is one, else from the live base's tensors, and only
when a check asks for it and memory allows.  Not here: the checks.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import GenerationConfig, PreTrainedModel

from retrofit.adapters.attach import attach, count
from retrofit.adapters.roles import ROLES
from retrofit.artifact import folder as artifacts
from retrofit.errors import DataError, ResourceError, UsageError
from retrofit.eval.weights import artifact_shapes, base_state
from retrofit.hub import load_base
from retrofit.machine import free_memory
from retrofit.quantised.methods import KINDS
from retrofit.recipes.text.library import held_out_prompts
from retrofit.runtime.backends.hf.backend import HFBackend
from retrofit.runtime.engine import Engine
from retrofit.runtime.loading import fused_backend
from retrofit.weight_files import dtype_name

PROMPT_TOKENS = 48
HEADROOM = 1.2
"""Activations and caches beside the weights."""
GENERIC_PROMPTS = (
    "The first thing to know about the sea is that",
    "def area(radius):\n    return",
    "Question: why is the sky blue?\nAnswer:",
    "Once upon a time, in a village by the river, there lived",
    "The three most important rules of the game are: 1.",
    "import json\n\nclass Reader:\n    def __init__(self, path):\n",
    "In 1905 the patent clerk published",
    "A list of fruits: apple, banana, cherry,",
)


@dataclass
class Subject:
    """run: the engine as it is used.  checkpoint: the base's own folder or GGUF file, None if unknown.

    artifact: its folder; an engine of the fused backend is built from it again.
    """

    run: Engine
    checkpoint: Path | None
    trust_remote_code: bool = False
    artifact: Path | None = None
    _bases: dict[torch.dtype, PreTrainedModel] = field(default_factory=dict)
    _fp32: Engine | None = None

    @property
    def dtype(self) -> torch.dtype:
        return self.run.backend.dtype

    @property
    def device(self) -> torch.device:
        return self.run.backend.device

    @property
    def quantization(self) -> str | None:
        """What linear layers are quantised to while the base is loaded."""
        precision = None if self.run.base is None else self.run.base.precision
        return precision if precision in KINDS else None

    def base(self, dtype: torch.dtype) -> PreTrainedModel:
        """A separate copy of the base, no adapter, generation defaults neutral.  One is kept at a time.

        Raises ResourceError when it does not fit into free memory.
        """
        if dtype not in self._bases:
            self._bases.clear()
            gc.collect()
            self._bases[dtype] = self._load_base(dtype)
        return self._bases[dtype]

    def fp32(self) -> Engine:
        """The engine in fp32: the run engine itself, or a second one with the same adapter and heads.

        At the run engine's level it runs what that puts in place of the model's own (attention, filler rows), so that
        the base judges it too; bits are promised for the run type only.
        """
        if self.dtype == torch.float32:
            return self.run
        if self._fp32 is None:
            fused = self.run.backend.name == "fused"
            self._fp32 = self._fused_in_fp32() if fused else self._converted(self._load_base(torch.float32))
        return self._fp32

    def _fused_in_fp32(self) -> Engine:
        """The fused backend in fp32, nothing promised of its bits: what fp32 cannot tell is excused anyway."""
        assert self.artifact is not None and self.run.base is not None
        self._require_memory(torch.float32)
        artifact = artifacts.read(self.artifact)
        backend = fused_backend(self.run.base, artifact, str(self.device), "float32", "off")
        config = artifact.config
        return Engine(backend, backend.layout, self.run.tokenizer, config.get("acceptance"), config, self.run.base)

    def _load_base(self, dtype: torch.dtype) -> PreTrainedModel:
        self._require_memory(dtype)
        if self.checkpoint is not None:
            model = load_base(
                str(self.checkpoint),
                dtype=dtype_name(dtype),
                device=str(self.device),
                trust_remote_code=self.trust_remote_code,
                need_tokenizer=False,
                quantization=self.quantization,
            ).model
        else:
            own = self.run.attached.model
            model = type(own)(copy.deepcopy(own.config))
            model.load_state_dict(base_state(own))
            model = model.to(self.device, dtype).eval()
        model.generation_config = GenerationConfig()
        if getattr(model.config.get_text_config(), "_experts_implementation", None) is not None:
            model.set_experts_implementation("eager" if dtype == torch.float64 else "batched_mm")
        return model

    def _converted(self, model: PreTrainedModel) -> Engine:
        run = self.run
        saved = run.config.get("adapter", {})
        lora = run.attached.peft_model.peft_config["default"]
        markov = run.attached.heads.markov_w1
        attached = attach(
            model,
            run.layout,
            rank=lora.r,
            alpha=lora.lora_alpha,
            targets=saved.get("targets", ROLES),
            markov_rank=0 if markov is None else markov.shape[1],
            confidence=run.attached.heads.confidence_weight is not None,
            modules=sorted(lora.target_modules),
        )
        attached.load(run.attached.adapter_state(), run.attached.heads_state())
        backend = HFBackend(model, attached.gate, attached.heads, run.layout.causal)
        kept: Any = run.backend
        backend.hold_as(kept)
        return Engine(backend, run.layout, run.tokenizer, run.config.get("acceptance"), run.config, run.base, attached)

    def _require_memory(self, dtype: torch.dtype) -> None:
        if self.run.backend.name == "fused":
            assert self.checkpoint is not None
            shapes = artifact_shapes(self.checkpoint).values()
            numbers = sum(math.prod(shape) for file in shapes for shape in file.values())
        else:
            numbers = count(self.run.attached.base_parameters())
        need, free = HEADROOM * numbers * dtype.itemsize, free_memory(self.device)
        if need > free:
            name = dtype_name(dtype)
            raise ResourceError(
                f"the base in {name} needs about {need / 2**30:.1f} GiB of memory, {free / 2**30:.1f} free",
                "certify on a larger machine, or on the CPU with --device cpu",
            )


def trained_on_stdlib(artifact: Path | None, engine: Engine) -> bool:
    """Whether the model was trained on Python sources, so that held-out ones suit it."""
    if artifact is None:
        return engine.base is not None and engine.base.name == "tiny"
    recipe = yaml.safe_load((artifact / artifacts.RECIPE).read_text(encoding="utf-8")) or {}
    return isinstance(recipe, dict) and (recipe.get("data") or {}).get("source") == "stdlib"


def token_prompts(
    engine: Engine, given: Sequence[str | Sequence[int]] | None, count: int, room: int, stdlib: bool
) -> list[list[int]]:
    """Prompts as token ids: the given ones, else held-out or generic text, else (no tokenizer) arbitrary ids.

    room: longest prompt that leaves space for the output; longer ones lose their beginning.
    """
    length = min(PROMPT_TOKENS, room)
    tokenizer = engine.tokenizer
    if given is not None:
        if not given or isinstance(given, str):
            raise UsageError("prompts is empty or a string; give a list of texts or token ids")
        prompts = [_ids(prompt, tokenizer) for prompt in given]
    elif tokenizer is None:
        drawn = torch.Generator().manual_seed(0)
        size = (count, length)
        prompts = torch.randint(0, engine.backend.head.vocab, size, generator=drawn).tolist()
    elif stdlib and (held_out := _held_out(tokenizer, count, length)) is not None:
        prompts = held_out
    else:
        texts = [GENERIC_PROMPTS[i % len(GENERIC_PROMPTS)] for i in range(count)]
        numbered = [f"{i}. {text}" if i >= len(GENERIC_PROMPTS) else text for i, text in enumerate(texts)]
        prompts = [list(tokenizer(text)["input_ids"]) for text in numbered]
    return [prompt[-room:] for prompt in prompts]


def _held_out(tokenizer: Any, count: int, length: int) -> list[list[int]] | None:
    try:
        return held_out_prompts(tokenizer, count, length)
    except DataError:  # another Python's standard library: generic prompts do as well
        return None


def _ids(prompt: str | Sequence[int], tokenizer: Any) -> list[int]:
    if not isinstance(prompt, str):
        return list(prompt)
    if tokenizer is None:
        raise UsageError("text prompts need a tokenizer; this engine has none", "give token ids")
    return list(tokenizer(prompt)["input_ids"])
