"""Language models of other families beside a plain one, trained alike and converted alike: do they draft as well?

    python scripts/train_families.py --out FOLDER    writes models and artifacts there, and results/families-cpu.json

A Llama, a Qwen3.5 (a recurrent layer, then one that attends) and a gpt-oss (sinks, a window, routed experts), of one
width and depth, from nothing: all weights by AdamW in float32, the same batches of the embedded base's text, as many
steps.  Each is converted by the embedded base's recipe, with as many steps as that gets here, and all decode
the same prompts.  What stands in FOLDER already is taken as it is.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import click
import torch
from train_base import TINY, evaluate, optimise, sequences, token_stream
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3_5TextConfig,
)
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import NEW_TOKENS, PROMPT_TOKENS, ROOT, Bar, number, say, section, write
from retrofit.eval.acceptance import measure
from retrofit.recipes.convert import convert
from retrofit.recipes.text.library import held_out_prompts
from retrofit.runtime.engine import Engine

RESULTS = ROOT / "results" / "families-cpu.json"
PLAIN = "llama"
TEMPERATURES = (0.0, 0.8)
JUDGED = 0.8
"""Models of this size loop when they are greedy, so that figure is stated only."""
WITHIN = 0.1
"""How far below the plain model's TPF a family's may be."""
EXPERTS = 4
LR = 3e-3


def sizes(base: PreTrainedConfig) -> dict[str, Any]:
    """Of all of them; the vocabulary and the context are the embedded base's."""
    same = (
        "vocab_size",
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "eos_token_id",
        "pad_token_id",
    )
    ours = {
        "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 32,
    }  # fmt: skip
    return {name: getattr(base, name) for name in same} | ours


def llama(base: PreTrainedConfig) -> PreTrainedConfig:
    return LlamaConfig(**sizes(base), rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})


def qwen3_5(base: PreTrainedConfig) -> PreTrainedConfig:
    return Qwen3_5TextConfig(
        **sizes(base),
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=16,
        linear_value_head_dim=32,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )


def gpt_oss(base: PreTrainedConfig) -> PreTrainedConfig:
    """Two of four experts answer for a token, each of half the plain model's width."""
    shape = sizes(base)
    return GptOssConfig(
        **shape | {"intermediate_size": shape["intermediate_size"] // 2},
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"],
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


FAMILIES: Mapping[str, Callable[[PreTrainedConfig], PreTrainedConfig]] = {
    PLAIN: llama, "qwen3_5": qwen3_5, "gpt_oss": gpt_oss,
}  # fmt: skip


@cache
def text() -> torch.Tensor:
    """What all of them are trained on, as tokens."""
    return torch.tensor(token_stream(AutoTokenizer.from_pretrained(TINY), "train"))


def train(config: PreTrainedConfig, out: Path, steps: int, seed: int = 0) -> float:
    """Train a model from nothing and save it in float32; returns the processor's seconds."""
    started = time.process_time()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    adam = torch.optim.AdamW(
        [{"params": list(model.parameters()), "peak": LR}], lr=LR, betas=(0.9, 0.95), weight_decay=0.0
    )
    batches = sequences(text(), random.Random(seed))
    optimise(model, [adam], batches, steps, f"training {config.model_type}")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(TINY).save_pretrained(out)
    GenerationConfig(eos_token_id=0, pad_token_id=0).save_pretrained(out)
    return time.process_time() - started


def drafts(artifact: Path, prompts: int) -> dict[str, Any]:
    """What it takes to decode held-out prompts with `fused`, by temperature."""
    engine = Engine.load(artifact, dtype="float32", offline=True)
    texts = held_out_prompts(AutoTokenizer.from_pretrained(TINY), prompts, PROMPT_TOKENS)
    found = {
        f"{t:g}": measure(engine, texts, strategy="fused", temperature=t, max_new_tokens=NEW_TOKENS)
        for t in TEMPERATURES
    }
    engine.close()
    return found


def bars(figures: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    rows: list[Bar] = []
    for temperature in TEMPERATURES:
        tpf = {name: found["drafts"][f"{temperature:g}"]["tpf"] for name, found in figures.items()}
        least = (1 - WITHIN) * tpf[PLAIN]
        for name, found in tpf.items():
            judged = temperature == JUDGED and name != PLAIN
            what = f"TPF, fused, T = {temperature:g}: {name}"
            bar, met = (f">= {number(least)}", found >= least) if judged else ("stated", None)
            rows.append(Bar(what, bar, number(found), met))
    return rows


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for models and artifacts.")
@click.option("--steps", type=click.IntRange(1), default=200, show_default=True, help="Steps of a model's training.")
@click.option("--convert-steps", type=click.IntRange(10), default=80, show_default=True, help="Steps of a conversion.")
@click.option("--prompts", type=click.IntRange(1), default=16, show_default=True, help="Held-out prompts.")
@click.option("--windows", type=click.IntRange(1), default=64, show_default=True, help="Held-out windows for the loss.")
def main(out: Path, steps: int, convert_steps: int, prompts: int, windows: int) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    base = AutoConfig.from_pretrained(TINY)
    figures: dict[str, Any] = {}
    for name, family in FAMILIES.items():
        model, artifact = out / name, out / f"{name}-artifact"
        if not model.exists():
            say(f"{name}: {train(family(base), model, steps):.0f} s of processor time")
        if not artifact.exists():
            convert(model, "tiny", artifact, {"train.steps": convert_steps}, offline=True)
        held_out = evaluate(model, windows=windows)
        figures[name] = {"held_out": held_out, "drafts": drafts(artifact, prompts)}
        say(f"{name}: {held_out['nats']:.3f} nats, TPF {figures[name]['drafts'][f'{JUDGED:g}']['tpf']:.3f}")
    command = f"python scripts/train_families.py --steps {steps} --convert-steps {convert_steps} --prompts {prompts}"
    budget = {"steps": steps, "convert_steps": convert_steps, "prompts": prompts}
    found = {"budget": budget, "models": figures}
    measured = section(f"{command} --windows {windows}", time.perf_counter() - started, bars(figures), found)
    write(RESULTS, {"families": measured})
    for bar in measured["bars"]:
        print(f"{bar['what']}: {bar['figure']} ({bar['bar']})")


if __name__ == "__main__":
    main()
