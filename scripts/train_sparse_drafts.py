"""Should draft rows of a sparse base see what their anchor's indexer picked, or all?  Both, trained and decoded alike.

python scripts/train_sparse_drafts.py --out FOLDER
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import mean
from typing import Any

import click
import torch
from train_base import LENGTH, TINY, evaluate
from train_families import FAMILIES, RESULTS, TEMPERATURES, train
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import NEW_TOKENS, PROMPT_TOKENS, Bar, number, say, section, write
from retrofit.artifact import folder as artifacts
from retrofit.eval.acceptance import measure
from retrofit.recipes.convert import convert
from retrofit.recipes.text.library import held_out_prompts
from retrofit.recipes.training.step import expected_tau
from retrofit.runtime.backends.hf.sparse import indexers
from retrofit.runtime.engine import Engine

CHOICES = ("all", "anchor")


def decoded(artifact: Path, prompts: int) -> dict[str, Any]:
    """Chains: in trees every row runs its indexer alone, which takes long here."""
    engine = Engine.load(artifact, dtype="float32", offline=True)
    texts = held_out_prompts(AutoTokenizer.from_pretrained(TINY), prompts, PROMPT_TOKENS)
    found = {}
    for t in TEMPERATURES:
        some = measure(engine, texts, strategy="fused", temperature=t, max_new_tokens=NEW_TOKENS, tree=0)
        found[f"{t:g}"] = {name: some[name] for name in ("tpf", "tau", "looping_share")}
    engine.close()
    return found


def report(
    seconds: float, budget: dict[str, int], model: dict[str, Any], runs: dict[str, list[dict[str, Any]]]
) -> None:
    """What is known so far."""
    seeds = len(runs["anchor"])
    said = {f"TPF, fused chain, T = {t:g}": lambda run, t=t: run["drafts"][f"{t:g}"]["tpf"] for t in TEMPERATURES}
    said |= {
        f"tau of held-out text, {kind}": lambda run, kind=kind: expected_tau(run["accepted"][kind])
        for kind in ("sampled", "greedy")
    }
    rows = []
    for what, figure in said.items():
        each = {choice: [figure(run) for run in some[:seeds]] for choice, some in runs.items()}
        texts = [
            f"{name} {number(mean(f), 3)} ({number(min(f), 3)} to {number(max(f), 3)})" for name, f in each.items()
        ]
        rows.append(Bar(f"{what}: draft rows see all, or what their anchor picked", "stated", ", ".join(texts), None))
        print(rows[-1].what, rows[-1].figure, flush=True)
    options = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in {**budget, "seeds": seeds}.items())
    figures = {"budget": {**budget, "seeds": seeds}, "model": model, "runs": runs}
    measured = section(f"python scripts/train_sparse_drafts.py {options}", seconds, rows, figures)
    write(RESULTS, {"what draft rows of a sparse base see": measured})


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", default=200, show_default=True)
@click.option("--convert-steps", default=80, show_default=True)
@click.option("--prompts", default=24, show_default=True)
@click.option("--seeds", default=3, show_default=True)
def main(out: Path, steps: int, convert_steps: int, prompts: int, seeds: int) -> None:
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    started = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    model = out / "deepseek_v32"
    config = FAMILIES["deepseek_v32"](AutoConfig.from_pretrained(TINY))
    if not model.exists():
        say(f"{train(config, model, steps):.0f} s of processor time")
    held_out = evaluate(model, windows=24)
    say(f"{held_out['nats']:.3f} nats")
    said_of_model = {"index_topk": config.index_topk, "context": LENGTH, "held_out": held_out}
    budget = {"steps": steps, "convert_steps": convert_steps, "prompts": prompts}
    runs: dict[str, list[dict[str, Any]]] = {choice: [] for choice in CHOICES}
    for seed in range(seeds):
        for choice in CHOICES:
            indexers.DRAFTS_SEE = choice
            artifact = out / f"{choice}-{seed}"
            if not artifact.exists():
                # PEFT takes names of an MLP for routed experts in this family, as in all that have some.
                keys = {"train.steps": convert_steps, "train.seed": seed, "adapter.targets": ["q", "k", "v", "o"]}
                convert(model, "tiny", artifact, keys, offline=True)
            accepted = artifacts.read_config(artifact)["acceptance"]["conditional"]
            found = decoded(artifact, prompts)
            runs[choice].append({"seed": seed, "accepted": accepted, "drafts": found})
            said = {name: round(some["tpf"], 3) for name, some in found.items()}
            say(f"{choice}, seed {seed}: {said}; {accepted['sampled']} {accepted['greedy']}")
        report(time.perf_counter() - started, budget, said_of_model, runs)


if __name__ == "__main__":
    main()
