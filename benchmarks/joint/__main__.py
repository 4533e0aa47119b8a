"""Is it worth training the base along?  `python -m benchmarks.joint`

The embedded base, or that of another recipe, converted by the profile `frozen` and by `joint` in several ways, on the
same data, for the same steps and draft rows; and by `frozen` for twice the steps, which takes about as long as `joint`
does.  Each then decodes the same held-out prompts, one at a time, on the CPU, offline: of MT-bench where the model
answers chats.  What is finished is written at once and not run again; what was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import sys
import time
from typing import Any

import click
import torch
from transformers.utils import logging

from benchmarks.common import ROOT, say, section, table, write
from benchmarks.drafts.__main__ import sections_of
from benchmarks.joint.tables import FROZEN, rows, verdict
from benchmarks.smollm2 import held_out
from retrofit.artifact import folder as artifact
from retrofit.errors import RetrofitError
from retrofit.eval.acceptance import measure
from retrofit.recipes.convert import convert
from retrofit.recipes.schema import by_key, load_recipe
from retrofit.recipes.training.step import expected_tau
from retrofit.runtime.engine import Engine

RESULTS = ROOT / "results" / "joint.json"
WORK = ROOT / "out" / "joint"
ALONG = {"profile": "joint", "joint.weights": "full", "joint.lr": 1e-3}
"""Without L_diff, as `frozen`: it costs drafts a few percent in either (LOG.md)."""
ANCHORED = {"joint.anchor": "both", "joint.kl_weight": 5.0}
OWN = "tiny"
"""The embedded base's recipe."""
LONGER = "frozen, twice the steps"
ARMS: dict[str, dict[str, Any]] = {
    FROZEN: {},
    LONGER: {},
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


def run(recipe: str, name: str, seed: int, setting: dict[str, int]) -> dict[str, Any]:
    """Everything of one arm and seed.  recipe: with keys changed.  Raises what `convert` and `Engine.load` raise."""
    of, *changes = recipe.split()
    plan = load_recipe(of, changes)
    overrides = {
        **{f"train.{key}": setting[key] for key in ("steps", "batch_size", "anchors")},
        **{"data.max_length": setting["length"], "train.seed": seed},
        **ARMS[name],
        **{key: by_key(plan)[key] for key in (change.partition("=")[0] for change in changes)},
    }
    if name == LONGER:
        overrides["train.steps"] *= 2
    size = "x".join(str(setting[key]) for key in ("steps", "batch_size", "anchors", "length"))
    keys = f"-{hashlib.sha256(recipe.encode()).hexdigest()[:8]}" if changes else ""
    folder = WORK / f"{title_of(of, name, seed).replace(': ', '-').replace(' ', '-').replace(',', '')}-{size}{keys}"
    if not (folder / artifact.CONFIG).is_file():
        say(f"training {title_of(of, name, seed)}")
        convert(recipe=of, out=folder, overrides=overrides, offline=True, quiet=True)
    config = artifact.read_config(folder)
    found = {
        "setting": setting,
        "base": recipe,
        "recipe": ARMS[name],
        "seed": seed,
        "drift": config.get("drift"),
        "seconds": config["training"]["seconds"],
        "held_out_tau": round(expected_tau(config["acceptance"]["conditional"]["sampled"]), 4),
        "conditional": config["acceptance"]["conditional"],
    }
    with Engine.load(folder, "cpu", offline=True) as engine:
        return found | decoded(engine, setting, seed)


def decoded(engine: Engine, setting: dict[str, int], seed: int) -> dict[str, Any]:
    prompts = held_out(engine, setting["prompts"])
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


def title_of(recipe: str, name: str, seed: int) -> str:
    base = "" if recipe == OWN else f"{recipe}: "
    return f"{base}{name}, seed {seed}"


@click.command(help=__doc__)
@click.option("--recipe", default=OWN, show_default=True, help="Whose base is converted, keys changed after it.")
@click.option("--steps", type=click.IntRange(1), default=220, show_default=True)
@click.option("--anchors", type=click.IntRange(1), default=64, show_default=True, help="Draft blocks per sequence.")
@click.option("--batch-size", type=click.IntRange(1), default=8, show_default=True, help="Sequences per step.")
@click.option("--length", type=click.IntRange(8), default=256, show_default=True, help="Of a sequence, in tokens.")
@click.option("--arms", multiple=True, type=click.Choice(list(ARMS)), help="Some of them.  [default: all]")
@click.option("--seeds", type=click.IntRange(1), default=1, show_default=True, help="How many.")
@click.option("--prompts", type=click.IntRange(1), default=16, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True)
def main(recipe: str, seeds: int, arms: tuple[str, ...], **setting: int) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    of = [] if recipe == OWN else [f'--recipe "{recipe}"']
    command = " ".join(
        ["python -m benchmarks.joint", *of, *(f"--{k.replace('_', '-')} {v}" for k, v in setting.items())]
    )
    base = recipe.split()[0]
    try:
        for seed in range(seeds):
            for name in arms or ARMS:
                title = title_of(base, name, seed)
                known = sections_of(RESULTS).get(title, {}).get("figures", {})
                if (known.get("base"), known.get("setting")) == (recipe, setting):
                    continue
                begin = time.perf_counter()
                found = run(recipe, name, seed, setting)
                seconds = time.perf_counter() - begin
                write(RESULTS, {title: section(command, seconds, [], found)})
    except RetrofitError as error:
        say(f"error: {error}" + (f"\n{error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    sections = sections_of(RESULTS)
    print(table(rows(sections)) + "\n" + verdict(sections))


if __name__ == "__main__":
    main()
