"""The artifacts that are served, each with its base as a folder and what it is asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from benchmarks.cpu.subjects import ADAPTER, random_tokens, write_artifact
from retrofit.adapters.attach import attach
from retrofit.adapters.layout import DraftLayout
from retrofit.hub import load_base
from retrofit.named_bases import EMBEDDED, embedded_folder
from retrofit.report.prompts import own_rows
from retrofit.serving.unpacking import unpacked

PROMPTS = 8
REAL = "smollm2-135m"
SMALL: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "qwen2": {}, "qwen3": {}}
"""Architectures beside Llama that vLLM is let to draft with, and what their configurations say besides."""
STD = 0.1
"""Of random weights: texts are lively then."""
STEPS = 30
"""Of the embedded base's training: long enough that some drafts are accepted."""


@dataclass(frozen=True)
class Subject:
    """One artifact."""

    name: str
    artifact: str
    """As `retrofit serve` takes it."""
    base: Path
    prompts: list[list[int]]
    text: list[int]
    """Ids of running text, 2,000 at least, from which longer prompts are cut."""
    counted: int
    """New tokens of a request whose drafts are counted."""
    tokens: int
    """New tokens of any other."""


def embedded(folder: Path) -> Subject:
    """The embedded base, converted into a folder; prompts of 12 to 40 tokens of text."""
    from retrofit.recipes.convert import convert

    artifact = folder / "artifact"
    if not artifact.is_dir():
        convert(out=artifact, overrides={"train.steps": STEPS}, quiet=True, offline=True)
    base = embedded_folder()
    ids = AutoTokenizer.from_pretrained(base)((base / "heldout.txt").read_text())["input_ids"] * 3
    prompts = [ids[100 * i : 100 * i + 12 + 4 * i] for i in range(PROMPTS)]
    return Subject("embedded base", str(artifact), base, prompts, ids, counted=192, tokens=64)


def smollm2(folder: Path) -> Subject:
    """SmolLM2 with the artifact that ships; questions in its chat template."""
    base = unpacked(load_base(REAL, with_model=False, offline=True), offline=True)
    tokenizer, rows = AutoTokenizer.from_pretrained(base), own_rows()
    asked = [[{"role": "user", "content": row.asked}] for row in rows[:PROMPTS]]
    prompts = [tokenizer.apply_chat_template(one, add_generation_prompt=True, return_dict=False) for one in asked]
    ids = tokenizer((embedded_folder() / "heldout.txt").read_text())["input_ids"] * 3
    return Subject("SmolLM2-135M", REAL, base, prompts, ids, counted=64, tokens=32)


def family(kind: str, folder: Path) -> Subject:
    """A random model of a family with a random adapter: drafts are accepted by chance, by the same as ours are."""
    base, artifact = folder / kind, folder / f"{kind}-artifact"
    if not artifact.is_dir():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SMALL, **FAMILIES[kind])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=STD)
        model.save_pretrained(base)
        _tokenizer(config.vocab_size).save_pretrained(base)
        loaded = load_base(str(base), offline=True)
        attached = attach(loaded.model, DraftLayout(), **ADAPTER)
        for parameter in (*attached.lora_parameters(), *attached.heads.parameters()):
            torch.nn.init.normal_(parameter, std=STD)
        write_artifact(artifact, str(base), loaded.fingerprint, loaded.model, attached, ADAPTER)
    ids = random_tokens(3000, SMALL["vocab_size"])
    prompts = [ids[100 * i : 100 * i + 12 + 4 * i] for i in range(PROMPTS)]
    return Subject(f"random {kind}", str(artifact), base, prompts, ids, counted=192, tokens=64)


def _tokenizer(words: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0")


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    EMBEDDED: embedded,
    REAL: smollm2,
    **{kind: partial(family, kind) for kind in FAMILIES},
}
