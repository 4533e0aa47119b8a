"""Is it worth training the base along?  `python -m benchmarks.joint`

The embedded base, converted by the profile `frozen` and by `joint` in several ways, on the same data, for the same
steps and draft rows; each then decodes the same held-out prompts, one at a time, on the CPU, offline.  What is finished
is written at once and not run again; what was interrupted goes on.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import torch
from transformers.utils import logging

from benchmarks.common import PROMPT_TOKENS, ROOT, Bar, number, say, section, table, write
from benchmarks.drafts.__main__ import sections_of
from retrofit.artifact import folder as artifact
from retrofit.errors import RetrofitError
from retrofit.eval.acceptance import measure
from retrofit.recipes.convert import convert
from retrofit.recipes.text.library import held_out_prompts
from retrofit.recipes.training.step import expected_tau
from retrofit.runtime.engine import Engine

RESULTS = ROOT / "results" / "joint.json"
WORK = ROOT / "out" / "joint"
ALONG = {"profile": "joint", "joint.weights": "full", "joint.lr": 1e-3, "objective.diffusion_share": 0.1}
ANCHORED = {"joint.anchor": "both", "joint.kl_weight": 3.0}
ARMS: dict[str, dict[str, Any]] = {
    "frozen": {},
    "joint": {**ALONG, "joint.anchor": "ce", "joint.gated": False},
    "joint anchored": {**ALONG, **ANCHORED, "joint.gated": False},
    "joint anchored + gated": {**ALONG, **ANCHORED},
    "joint lora anchored + gated": {**ALONG, **ANCHORED, "joint.weights": "lora"},
}
WAYS: dict[str, dict[str, Any]] = {
    "chain": {"strategy": "fused", "tree": 0},
    "best plan": {"strategy": "fused"},
}
TEMPERATURES = (0.0, 0.8)
THRESHOLDS = (0.5, 0.7, 0.9)
AIM_TPF, AIM_KL = 1.05, 0.05
"""Of anchored joint training: TPF as a multiple of the frozen base's, and the drift that it may cost."""


def run(name: str, seed: int, setting: dict[str, int]) -> dict[str, Any]:
    """Everything of one arm and seed.  Raises what `convert` and `Engine.load` raise."""
    overrides = {
        **{f"train.{key}": setting[key] for key in ("steps", "batch_size", "anchors")},
        **{"data.max_length": setting["length"], "train.seed": seed},
        **ARMS[name],
    }
    size = "x".join(str(setting[key]) for key in ("steps", "batch_size", "anchors", "length"))
    folder = WORK / f"{name.replace(' ', '-')}-{size}-{seed}"
    if not (folder / artifact.CONFIG).is_file():
        say(f"training {name}, seed {seed}")
        convert(recipe="tiny", out=folder, overrides=overrides, offline=True, quiet=True)
    config = artifact.read_config(folder)
    found = {
        "setting": setting,
        "recipe": ARMS[name],
        "seed": seed,
        "drift": config.get("drift"),
        "seconds": config["training"]["seconds"],
        "held_out_tau": round(expected_tau(config["acceptance"]["conditional"]["sampled"]), 4),
        "conditional": config["acceptance"]["conditional"],
    }
    with Engine.load(folder, "cpu", "float32", offline=True) as engine:
        return found | decoded(engine, setting, seed)


def decoded(engine: Engine, setting: dict[str, int], seed: int) -> dict[str, Any]:
    prompts = held_out_prompts(engine.tokenizer, setting["prompts"], PROMPT_TOKENS)
    tpf: dict[str, dict[str, float]] = {}
    for temperature in TEMPERATURES:
        tpf[f"{temperature:g}"] = {}
        for way, options in WAYS.items():
            figures = measure(
                engine, prompts, **options, temperature=temperature, max_new_tokens=setting["new_tokens"],
                batch_size=1, seed=seed,
            )  # fmt: skip
            tpf[f"{temperature:g}"][way] = round(figures["tpf"], 4)
    return {"tpf": tpf, "diffusion": {f"{one:g}": diffusion(engine, prompts, setting, one) for one in THRESHOLDS}}


def diffusion(engine: Engine, prompts: list[list[int]], setting: dict[str, int], threshold: float) -> dict[str, float]:
    """TPF at a threshold, and how many of its tokens greedy `ar` would have had next."""
    options = {"max_new_tokens": setting["new_tokens"], "ignore_eos": True}
    results = engine.generate(prompts, "diffusion", threshold=threshold, **options)
    tokens, forwards = (sum(n) for n in zip(*((r.stats.tokens, r.stats.decode_forwards) for r in results), strict=True))
    same = count = 0
    for prompt, result in zip(prompts, results, strict=True):
        logits = engine.attached.model(torch.tensor([[*prompt, *result.tokens]])).logits[0, len(prompt) - 1 : -1]
        same += int((logits.argmax(-1) == torch.tensor(result.tokens)).sum())
        count += len(result.tokens)
    return {"tpf": round(tokens / forwards, 4), "agreement": round(same / count, 4)}


def title_of(name: str, seed: int) -> str:
    return f"{name}, seed {seed}"


def shown(sections: dict[str, Any]) -> str:
    rows = [["", "seed", "TPF T=0", "best", "TPF T=0.8", "best", "tau held out", "KL", "same token", "seconds"]]
    for name, one in sections.items():
        f = one["figures"]
        drift = f["drift"] or {"kl": 0.0, "agreement": 1.0}
        cells = [f["tpf"][t][way] for t in ("0", "0.8") for way in WAYS]
        figures = [number(cell) for cell in cells] + [number(f["held_out_tau"]), number(drift["kl"], 4)]
        rows.append([name, str(f["seed"]), *figures, f"{drift['agreement']:.1%}", f"{f['seconds']:.0f}"])
    return table(rows)


def bars(found: dict[str, Any], frozen: dict[str, Any] | None) -> list[Bar]:
    """The aim, of one arm of joint training against the frozen base of the same seed."""
    if frozen is None or found["drift"] is None:
        return []
    ratio = found["tpf"]["0.8"]["best plan"] / frozen["tpf"]["0.8"]["best plan"]
    kl = found["drift"]["kl"]
    met = ratio >= AIM_TPF and kl <= AIM_KL
    figure = f"{ratio:.3f} x at KL {kl:.4f}"
    return [Bar("TPF against frozen, T = 0.8", f">= {AIM_TPF} x at KL <= {AIM_KL}", figure, met)]


@click.command(help=__doc__)
@click.option("--steps", type=click.IntRange(1), default=220, show_default=True)
@click.option("--anchors", type=click.IntRange(1), default=64, show_default=True, help="Draft blocks per sequence.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences per step.")
@click.option("--length", type=click.IntRange(8), default=256, show_default=True, help="Of a sequence, in tokens.")
@click.option("--arms", multiple=True, type=click.Choice(list(ARMS)), help="Some of them.  [default: all]")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many.")
@click.option("--prompts", type=click.IntRange(1), default=16, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True)
def main(seeds: int, arms: tuple[str, ...], **setting: int) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    command = " ".join(["python -m benchmarks.joint", *(f"--{k.replace('_', '-')} {v}" for k, v in setting.items())])
    try:
        for seed in range(seeds):
            for name in arms or ARMS:
                known = sections_of(RESULTS).get(title_of(name, seed))
                if known is not None and known["figures"]["setting"] == setting:
                    continue
                begin = time.perf_counter()
                found = run(name, seed, setting)
                frozen = sections_of(RESULTS).get(title_of("frozen", seed), {}).get("figures")
                seconds = time.perf_counter() - begin
                write(RESULTS, {title_of(name, seed): section(command, seconds, bars(found, frozen), found)})
    except RetrofitError as error:
        say(f"error: {error}" + (f"\n{error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    print(shown(sections_of(Path(RESULTS))))


if __name__ == "__main__":
    main()
