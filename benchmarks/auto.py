"""Whether `auto` keeps its word: never slower than `ar`, nothing before the first token.  `python -m benchmarks.auto`

Each prompt is decoded by `ar` and by `auto`, one after the other, first the one and then the other in turn, with
nothing learnt before the first.  The artifact's acceptance is that which was measured; or none, as of an untrained
adapter; or it says that nearly all is accepted, whatever is true.  Exits 3 if a bar is missed.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import click
from transformers.utils import logging

from benchmarks.common import ROOT, Bar, say, section, write
from benchmarks.cpu.subjects import untrained_artifact
from retrofit.hub import load_base
from retrofit.machine import cache_folder
from retrofit.recipes.text.library import held_out_prompts
from retrofit.runtime.auto.policy import AutoPolicy
from retrofit.runtime.engine import Engine

PROMPTS, NEW_TOKENS, PROMPT_TOKENS = 8, 128, 64
SLOWER, FIRST = 1.02, 1.05
"""Most time of `auto` to that of `ar`; of the first token of all."""
SURE = 0.95
RESULTS = ROOT / "results" / "auto.json"


def claims(engine: Engine) -> dict[str, dict[str, Any]]:
    """What an artifact may say of its acceptance, by name."""
    measured = dict(engine.config.get("acceptance") or {})
    sure = {kind: [SURE] * engine.layout.drafts for kind in ("greedy", "sampled")}
    trees = {} if "ranks" not in measured else {"ranks": measured["ranks"]}
    return {"as measured": measured, "untrained": {}, "lying": {"conditional": sure, **trees}}


def decode(engine: Engine, prompts: Sequence[list[int]], strategy: str, temperature: float) -> tuple[float, float, Any]:
    """Seconds, seconds to the first token, and the results of prompts that run together."""
    how: dict[str, Any] = {"mode": "ar"} if strategy == "ar" else {"strategy": strategy}
    begin = time.perf_counter()
    results = engine.generate(
        list(prompts),
        temperature=temperature,
        seed=1,
        max_new_tokens=NEW_TOKENS,
        ignore_eos=True,
        batch_size=len(prompts),
        original_settings=False,
        **how,
    )
    return time.perf_counter() - begin, min(r.stats.prefill_seconds for r in results), results


def compare(
    engine: Engine, prompts: Sequence[list[int]], acceptance: dict[str, Any], batch: int, temperature: float
) -> dict[str, Any]:
    """`auto` beside `ar` over all prompts, `batch` of them at a time."""
    engine.policy = AutoPolicy(engine.layout, acceptance)
    shutil.rmtree(cache_folder(), ignore_errors=True)  # of the benchmark's own
    seconds: dict[str, float] = {"ar": 0.0, "auto": 0.0}
    first: dict[str, list[float]] = {"ar": [], "auto": []}
    same, forwards = True, 0
    groups = [list(prompts[at : at + batch]) for at in range(0, len(prompts), batch)]
    for number, group in enumerate(groups):
        found = {}
        for way in ("ar", "auto") if number % 2 else ("auto", "ar"):
            took, begun, found[way] = decode(engine, group, way, temperature)
            seconds[way] += took
            first[way].append(begun)
        same = same and [r.tokens for r in found["ar"]] == [r.tokens for r in found["auto"]]
        forwards += sum(sum(r.stats.forwards.values()) - r.stats.forwards["prefill"] for r in found["auto"])
    tpf = len(prompts) * (NEW_TOKENS - 1) / max(1, forwards)
    return {"seconds": seconds, "first_token_seconds": first, "tpf": tpf, "same": same}


@click.command(help=__doc__)
@click.option("--model", type=click.Path(exists=True, path_type=Path), help="A model's folder.  [default: embedded]")
@click.option("--artifact", type=click.Path(exists=True, path_type=Path), help="[default: an untrained adapter]")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="float32", show_default=True)
@click.option("--batch", multiple=True, type=int, default=(1, 4, 16), show_default=True, help="Repeatable.")
@click.option("--write/--no-write", "keep", default=True, help=f"Put the figures into results/{RESULTS.name}.")
def main(model: Path | None, artifact: Path | None, dtype: str, batch: tuple[int, ...], keep: bool) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    begin, bars, figures = time.perf_counter(), [], {}
    name = "embedded" if model is None else model.name
    with tempfile.TemporaryDirectory(prefix="retrofit-auto-") as folder:
        os.environ["RETROFIT_CACHE"] = str(Path(folder, "cache"))
        base = str(model) if model else load_base("tiny", offline=True).name
        given = artifact or untrained_artifact(Path(base), Path(folder, "artifact"))
        with Engine.load(given, "cpu", dtype, base=base, prefix_cache=0) as engine:
            assert engine.tokenizer is not None
            for size in batch:
                prompts = held_out_prompts(engine.tokenizer, max(PROMPTS, size), PROMPT_TOKENS)
                for what, acceptance in claims(engine).items():
                    for temperature in (0.0, 0.8):
                        decode(engine, prompts[:size], "ar", temperature)  # the machine is warm
                        found = compare(engine, prompts, acceptance, size, temperature)
                        title = f"{name}, {dtype}, {what}, batch {size}, T = {temperature:g}"
                        bars += judged(title, found)
                        figures[title] = found
    for bar in bars:
        say(f"{bar.what}: {bar.figure}{'' if bar.met else '  MISSED'}")
    if keep:
        command = " ".join(["python -m benchmarks.auto", *sys.argv[1:]])
        write(RESULTS, {f"auto, {name}, {dtype}": section(command, time.perf_counter() - begin, bars, figures)})
    sys.exit(0 if all(bar.met for bar in bars) else 3)


def judged(title: str, found: dict[str, Any]) -> list[Bar]:
    seconds, first = found["seconds"], found["first_token_seconds"]
    slower = seconds["auto"] / seconds["ar"]
    later = median(a / b for a, b in zip(first["auto"], first["ar"], strict=True))
    say(f"{title}: {slower:.3f} x the time of `ar`, first token {later:.2f} x, TPF {found['tpf']:.2f}")
    return [
        Bar(f"{title}: time / ar's", f"<= {SLOWER}", f"{slower:.3f}, TPF {found['tpf']:.2f}", slower <= SLOWER),
        Bar(f"{title}: first token / ar's", f"<= {FIRST}", f"{later:.2f}", later <= FIRST),
        Bar(f"{title}: tokens of ar", "all", "all" if found["same"] else "not all", found["same"]),
    ]


if __name__ == "__main__":
    main()
