"""What `retrofit convert --dry-run` says of memory against what a conversion takes, on a model of 107M parameters.

Random weights and random text, made here; CPU, one thread, offline.  For each setting one process estimates, from the
configuration alone, and another converts: its largest resident size (VmHWM), less what it held after its imports and
a conversion of the embedded base that loads what Python loads late.  The table goes to stdout, progress to stderr, the
figures to results/memory-cpu.json.  Exits 3 if an estimate is further off than the bar allows.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.common import ROOT, Bar, say, section, table, write
from retrofit.machine import forget_peak, peak_resident, resident
from retrofit.recipes.dry_run.fit import short

RESULTS = ROOT / "results" / "memory-cpu.json"
OVER, UNDER = 0.15, 0.10
"""How far an estimate may be above the measured figure, and below."""
VOCABULARY = 32_000
COMMON = ("train.steps=3", "train.warmup=0", "train.save_every=2", "data.held_out=2")
SETTINGS = {
    "one long window, float32": (
        *("train.precision=float32", "data.max_length=1536", "train.batch_size=1", "train.anchors=8"),
    ),
    "batch of 4, many anchors, float32": (
        *("train.precision=float32", "data.max_length=128", "train.batch_size=4", "train.anchors=32"),
        "adapter.rank=8",
    ),
    "large ranks, bfloat16": (
        *("train.precision=bfloat16", "data.max_length=64", "train.batch_size=1", "train.anchors=8"),
        *("adapter.rank=128", "adapter.markov_rank=256"),
    ),
}
WARM_UP = (
    *("train.steps=1", "train.warmup=0", "train.batch_size=1", "train.anchors=4", "train.save_every=1"),
    *("adapter.rank=2", "data.max_length=32", "data.held_out=1"),
)


@click.command(help=__doc__)
@click.option("--only", type=int, help="The setting of this number alone; writes nothing.")
@click.option("--job", hidden=True, type=click.Choice(["estimate", "measure"]))
@click.argument("given", nargs=-1)
def main(only: int | None, job: str | None, given: tuple[str, ...]) -> None:
    if job is not None:
        print(json.dumps({"estimate": estimate, "measure": measure}[job](given)))
        return
    begin = time.perf_counter()
    chosen = [name for number, name in enumerate(SETTINGS) if only in (None, number)]
    with tempfile.TemporaryDirectory(prefix="retrofit-memory-") as folder:
        base, text = Path(folder, "base"), Path(folder, "text.jsonl")
        make(base, text)
        found = {}
        for name in chosen:
            recipe = [f"base.model={base}", f"data.source={text}", *COMMON, *SETTINGS[name]]
            estimated, measured = started("estimate", recipe), started("measure", recipe)
            error = estimated["peak"] / measured["peak"] - 1
            met = -UNDER <= error <= OVER
            found[name] = {**estimated, "measured": measured["peak"], "error": round(error, 4), "met": met}
            found[name]["recipe"] = [*COMMON, *SETTINGS[name]]
            say(f"{name}: {short(estimated['peak'])} estimated, {short(measured['peak'])} measured ({error:+.1%})")
    rows = [["setting", "phase", "estimated", "measured", "error", "bar"]]
    for name, one in found.items():
        sizes = [short(one["peak"]), short(one["measured"])]
        rows.append([name, one["phase"], *sizes, f"{one['error']:+.1%}", "met" if one["met"] else "MISSED"])
    print(table(rows, left=2))
    if only is None:
        write(RESULTS, {"memory": measured_section(found, time.perf_counter() - begin)})
        say(f"wrote {RESULTS}")
    sys.exit(0 if all(one["met"] for one in found.values()) else 3)


def measured_section(found: dict[str, Any], seconds: float) -> dict[str, Any]:
    bars = [
        Bar(
            f"dry run's memory against measured, {name}",
            f"-{UNDER:.0%} to +{OVER:.0%}",
            f"{one['error']:+.1%} ({short(one['peak'])}, {short(one['measured'])})",
            one["met"],
        )
        for name, one in found.items()
    ]
    made = section("python -m benchmarks.memory", seconds, bars, {"settings": found})
    return {**made, "hardware": {**made["hardware"], "threads": 1}}


def make(base: Path, text: Path) -> None:
    """A Qwen3 of random weights with a tokenizer of as many words, and documents of those words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2304, num_hidden_layers=12, num_attention_heads=12,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=4096, tie_word_embeddings=True,
        eos_token_id=None, bos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(base)
    words = [f"w{number}" for number in range(VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(base)
    chance = random.Random(0)
    with text.open("w", encoding="utf-8") as out:
        for _ in range(260):  # more windows than are held for shuffling
            out.write(json.dumps({"text": " ".join(chance.choices(words, k=3072))}) + "\n")


def started(job: str, recipe: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.memory", "--job", job, *recipe]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode != 0:
        sys.exit(f"{job} failed for {' '.join(recipe)}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def estimate(recipe: tuple[str, ...]) -> dict[str, Any]:
    """The peak that a dry run would print, the phase it is in, and what is held then."""
    from retrofit.hub import load_config
    from retrofit.recipes.dry_run.estimate import estimate as rehearse
    from retrofit.recipes.dry_run.report import surroundings
    from retrofit.recipes.schema import load_recipe

    plan = load_recipe("default", recipe)
    config, folder = load_config(plan.base.model)
    begin = time.perf_counter()
    found = rehearse(plan, config, "cpu", surroundings(config, folder))
    return {
        "peak": found.peak,
        "phase": found.fullest,
        "holds": found.phases[found.fullest].holds,
        "phases": {name: moment.total for name, moment in found.phases.items()},
        "seconds": round(time.perf_counter() - begin, 1),
    }


def measure(recipe: tuple[str, ...]) -> dict[str, Any]:
    """Convert, and say by how much this process grew at most."""
    from transformers.utils import logging

    from retrofit.recipes.convert import convert
    from retrofit.recipes.schema import load_recipe

    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(prefix="retrofit-memory-") as folder:
        convert(out=Path(folder, "warm"), overrides=WARM_UP, quiet=True)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        forget_peak()
        before = resident()
        convert(recipe=load_recipe("default", recipe), out=Path(folder, "out"), quiet=True)
        return {"peak": peak_resident() - before}


if __name__ == "__main__":
    main()
