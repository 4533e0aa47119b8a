"""Language models of other families on the embedded base's text, converted beside it: do they draft as well?

    python scripts/train_families.py --out FOLDER    writes models and artifacts there, and results/families-cpu.json

A Qwen3.5 (three recurrent layers, one that attends) and a gpt-oss (sinks, windows, routed experts) of the embedded
base's width and depth.  Nobody has an hour for each, so they begin with what fits of the embedded base: embeddings,
norms and feed-forward layers, of gpt-oss the attention too; its sinks, router and windows, and all of Qwen3.5 that
looks from row to row begin anew.  Then all weights are trained, in float32, on the text that the base was trained on.
Each is converted by the embedded base's recipe, with as many steps as that gets here, and all decode the same prompts.
What stands in FOLDER already is taken as it is.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from train_base import TINY, evaluate, new_optimizers, optimise, sequences, token_stream
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GptOssConfig,
    PreTrainedConfig,
    PreTrainedModel,
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
EMBEDDED = "embedded (llama)"
TEMPERATURE = 0.8
WITHIN = 0.1
"""How far below the embedded base's TPF a family's may be."""
EXPERTS = 4
SHARE = 0.3
"""Of the learning rates of a model that begins from nothing."""


def qwen3_5(base: PreTrainedConfig) -> PreTrainedConfig:
    return Qwen3_5TextConfig(
        **sizes(base),
        head_dim=base.head_dim,
        layer_types=["linear_attention", "linear_attention", "full_attention", "linear_attention"],
        linear_num_key_heads=4,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )


def gpt_oss(base: PreTrainedConfig) -> PreTrainedConfig:
    return GptOssConfig(
        **sizes(base),
        head_dim=base.head_dim,
        sliding_window=128,
        layer_types=["sliding_attention", "full_attention"] * 2,
        num_local_experts=EXPERTS,
        num_experts_per_tok=2,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )


def sizes(base: PreTrainedConfig) -> dict[str, Any]:
    same = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "eos_token_id",
        "pad_token_id",
    )  # fmt: skip
    return {name: getattr(base, name) for name in same}


FEWER = {"gpt_oss": 4}
"""A family that begins with nearly all of the embedded base gets so many times fewer steps."""
FAMILIES: Mapping[str, Callable[[PreTrainedConfig], PreTrainedConfig]] = {"qwen3_5": qwen3_5, "gpt_oss": gpt_oss}


@torch.no_grad()
def begin(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of the family, float32, with what fits of the embedded base."""
    base = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(FAMILIES[name](base.config), dtype=torch.float32)
    given, mine = base.state_dict(), model.state_dict()
    shift = 1.0 if name == "qwen3_5" else 0.0  # its norms multiply by 1 + weight
    for key, weight in given.items():
        if key in mine and mine[key].shape == weight.shape:
            mine[key].copy_(weight - shift if "norm" in key else weight)
    if name == "gpt_oss":
        for depth, layer in enumerate(model.model.layers):
            layer.self_attn.sinks.fill_(-2.0)
            fill_experts(layer.mlp.experts, base.model.layers[depth].mlp)
    return model


def fill_experts(experts: Any, mlp: Any) -> None:
    """Every expert as the base's feed-forward layer, a little apart from each other.

    down(gate sigmoid(alpha gate) (up + 1)) is silu(g) u at gate = g / alpha, up = u - 1, with alpha times the way down.
    """
    noise = torch.randn(EXPERTS, *mlp.gate_proj.weight.T.shape) * 0.1 * mlp.gate_proj.weight.std()
    experts.gate_up_proj[..., ::2] = (mlp.gate_proj.weight.T + noise) / experts.alpha
    experts.gate_up_proj[..., 1::2] = mlp.up_proj.weight.T
    experts.gate_up_proj_bias[..., ::2] = 0.0
    experts.gate_up_proj_bias[..., 1::2] = -1.0
    experts.down_proj[:] = mlp.down_proj.weight.T * experts.alpha
    experts.down_proj_bias.zero_()


def train(name: str, out: Path, steps: int, seed: int = 0) -> float:
    """Train a family's model and save it in float32; returns the processor's seconds."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model, started = begin(name, seed).train(), time.process_time()
    optimizers = new_optimizers(model)
    batches = sequences(torch.tensor(token_stream(tokenizer, "train")), random.Random(seed))
    optimise(model, optimizers, batches, steps, f"training {name}", SHARE)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    GenerationConfig(eos_token_id=0, pad_token_id=0).save_pretrained(out)
    return time.process_time() - started


def drafts(artifact: Path, prompts: int) -> dict[str, Any]:
    """What it takes to decode held-out prompts with `fused`."""
    engine = Engine.load(artifact, dtype="float32", offline=True)
    texts = held_out_prompts(AutoTokenizer.from_pretrained(TINY), prompts, PROMPT_TOKENS)
    found = measure(engine, texts, strategy="fused", temperature=TEMPERATURE, max_new_tokens=NEW_TOKENS)
    engine.close()
    return found


def bars(figures: Mapping[str, Mapping[str, Any]]) -> list[Bar]:
    tpf = {name: found["drafts"]["tpf"] for name, found in figures.items()}
    least = (1 - WITHIN) * tpf.pop(EMBEDDED)
    what = f"TPF, fused, T = {TEMPERATURE}: "
    stated = Bar(what + EMBEDDED, "stated", number(figures[EMBEDDED]["drafts"]["tpf"]), None)
    return [stated, *(Bar(what + n, f">= {number(least)}", number(found), found >= least) for n, found in tpf.items())]


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder for models and artifacts.")
@click.option("--steps", type=click.IntRange(1), default=160, show_default=True, help="Steps of a model's training.")
@click.option("--convert-steps", type=click.IntRange(10), default=60, show_default=True, help="Steps of a conversion.")
@click.option("--prompts", type=click.IntRange(1), default=16, show_default=True, help="Held-out prompts.")
@click.option("--windows", type=click.IntRange(1), default=64, show_default=True, help="Held-out windows for the loss.")
def main(out: Path, steps: int, convert_steps: int, prompts: int, windows: int) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for name in (EMBEDDED, *FAMILIES):
        model, artifact = out / name, out / f"{name}-artifact"
        if name == EMBEDDED:
            model = TINY
        elif not model.exists():
            say(f"{name}: {train(name, model, steps // FEWER.get(name, 1)):.0f} s of processor time")
        if not artifact.exists():
            convert(model, "tiny", artifact, {"train.steps": convert_steps}, offline=True)
        held_out = evaluate(model, windows=windows)
        figures[name] = {"held_out": held_out, "drafts": drafts(artifact, prompts)}
        say(f"{name}: {held_out['nats']:.3f} nats, TPF {figures[name]['drafts']['tpf']:.3f}")
    command = f"python scripts/train_families.py --steps {steps} --convert-steps {convert_steps} --prompts {prompts}"
    budget = {"steps": steps, "convert_steps": convert_steps, "prompts": prompts}
    found = {"budget": budget, "models": figures}
    measured = section(f"{command} --windows {windows}", time.perf_counter() - started, bars(figures), found)
    write(RESULTS, {"families": measured})
    for bar in measured["bars"]:
        print(f"{bar['what']}: {bar['figure']} ({bar['bar']})")


if __name__ == "__main__":
    main()
