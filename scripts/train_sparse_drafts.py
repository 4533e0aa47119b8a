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
from train_base import TINY, evaluate
from train_families import FAMILIES, RESULTS, TEMPERATURES, train
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import NEW_TOKENS, PROMPT_TOKENS, Bar, number, say, section, write
from retrofit.artifact import folder as artifacts
from retrofit.eval.acceptance import measure
from retrofit.recipes.convert import convert
from retrofit.recipes.text.library import held_out_prompts
from retrofit.runtime.backends.hf.sparse import indexers
from retrofit.runtime.engine import Engine

CHOICES = ("all", "anchor")


def decoded(artifact: Path, prompts: int) -> dict[str, Any]:
    engine = Engine.load(artifact, dtype="float32", offline=True)
    texts = held_out_prompts(AutoTokenizer.from_pretrained(TINY), prompts, PROMPT_TOKENS)
    found = {}
    for t in TEMPERATURES:
        for way, options in (("chain", {"tree": 0}), ("tree", {})):
            some = measure(engine, texts, strategy="fused", temperature=t, max_new_tokens=NEW_TOKENS, **options)
            found[f"{way}, {t:g}"] = {name: some[name] for name in ("tpf", "tau", "looping_share")}
    engine.close()
    return found


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True)
@click.option("--steps", default=400, show_default=True)
@click.option("--convert-steps", default=80, show_default=True)
@click.option("--prompts", default=32, show_default=True)
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
    runs: dict[str, list[dict[str, Any]]] = {choice: [] for choice in CHOICES}
    for seed in range(seeds):
        for choice in CHOICES:
            indexers.DRAFTS_SEE = choice
            artifact = out / f"{choice}-{seed}"
            if not artifact.exists():
                convert(model, "tiny", artifact, {"train.steps": convert_steps, "train.seed": seed}, offline=True)
            accepted = artifacts.read_config(artifact)["acceptance"]["conditional"]
            found = decoded(artifact, prompts)
            runs[choice].append({"seed": seed, "accepted": accepted, "drafts": found})
            said = {name: round(some["tpf"], 3) for name, some in found.items()}
            say(f"{choice}, seed {seed}: {said}; {accepted['sampled']} {accepted['greedy']}")
    rows = []
    for name in runs["all"][0]["drafts"]:
        tpf = {choice: mean(run["drafts"][name]["tpf"] for run in some) for choice, some in runs.items()}
        figure = f"all {number(tpf['all'])}, anchor's choice {number(tpf['anchor'])}"
        rows.append(Bar(f"TPF, {name}, draft rows see", "stated", figure, None))
        print(rows[-1].what, figure)
    budget = {"steps": steps, "convert_steps": convert_steps, "prompts": prompts, "seeds": seeds}
    config_said = {"index_topk": config.index_topk, "context": 256}
    figures = {"budget": budget, "model": {**config_said, "held_out": held_out}, "runs": runs}
    command = f"python scripts/train_sparse_drafts.py --steps {steps} --convert-steps {convert_steps}"
    command += f" --prompts {prompts} --seeds {seeds}"
    write(
        RESULTS,
        {"what draft rows of a sparse base see": section(command, time.perf_counter() - started, rows, figures)},
    )


if __name__ == "__main__":
    main()
