"""What each preset makes of the embedded base: tokens per forward by strategy.  `python -m benchmarks.drafts.presets`

Held-out prompts one at a time, on the CPU, offline.  An artifact that lies in --work already is not made again.  Exits
3 if a bar is missed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click
import torch

from benchmarks.common import ROOT, Bar, conversion_seconds, load, number, say, section, table, write
from benchmarks.drafts.figures import MOST_ROWS
from benchmarks.drafts.setting import OWN
from retrofit.eval.acceptance import measure
from retrofit.recipes.budget.presets import SCALES, Preset, changes_of
from retrofit.recipes.convert import convert
from retrofit.recipes.schema import load_recipe

RESULTS = ROOT / "results" / "presets.json"
WAYS = ("fused", "hybrid", "prompt_lookup")
LEAST = {0.8: 2.6, 1.0: 2.2}
"""Tokens per forward that `hybrid` has to reach with the preset `best`, by temperature."""
GREEDY_LEAD = 0.8
"""By how much it has to lead prompt lookup, greedy."""


def title_of(preset: Preset) -> str:
    return f"preset {preset}"


def bars_of(found: dict[str, dict[str, Any]]) -> list[Bar]:
    """found: what `measure` says by strategy, for each temperature."""
    bars = []
    for temperature, least in LEAST.items():
        hybrid = found[f"T = {temperature:g}"]["hybrid"]
        met = hybrid["tpf"] >= least and hybrid["most_rows"] <= MOST_ROWS
        bars.append(Bar(f"TPF, hybrid, preset best, T = {temperature:g}", f">= {least}", number(hybrid["tpf"]), met))
    greedy = {way: one["tpf"] for way, one in found["T = 0"].items()}
    least = greedy["prompt_lookup"] + GREEDY_LEAD
    met = greedy["hybrid"] >= least and found["T = 0"]["hybrid"]["most_rows"] <= MOST_ROWS
    what = "TPF, hybrid, preset best, greedy"
    return [*bars, Bar(what, f">= {least:.2f}, prompt lookup's + {GREEDY_LEAD}", number(greedy["hybrid"]), met)]


def measured(folder: Path, prompts: int, new_tokens: int) -> dict[str, dict[str, Any]]:
    """Tokens per forward and what goes with them, by temperature and strategy."""
    setting = load(folder, prompts)
    found: dict[str, dict[str, Any]] = {}
    for temperature in (*LEAST, 0.0):
        title = f"T = {temperature:g}"
        say(f"{folder.name}: {title}")
        found[title] = {
            way: measure(
                setting.engine, setting.prompts, strategy=way, temperature=temperature,
                max_new_tokens=new_tokens, batch_size=1,
            )
            for way in WAYS
        }  # fmt: skip
    return found


@click.command(help=__doc__)
@click.option("--presets", multiple=True, type=click.Choice(list(SCALES)), help="One of them.  [default: all]")
@click.option("--prompts", type=click.IntRange(1), default=32, show_default=True)
@click.option("--new-tokens", type=click.IntRange(1), default=64, show_default=True)
@click.option("--threads", type=click.IntRange(1), default=1, show_default=True, help="Of torch.")
@click.option(
    "--work", type=click.Path(path_type=Path), default=ROOT / "out" / "presets", help="[default: out/presets]"
)
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="[default: results/presets.json]")
def main(presets: tuple[Preset, ...], prompts: int, new_tokens: int, threads: int, work: Path, out: Path) -> None:
    torch.set_num_threads(threads)
    command = f"python -m benchmarks.drafts.presets --prompts {prompts} --new-tokens {new_tokens} --threads {threads}"
    rows, bars = [["tokens per forward", "T", *WAYS]], []
    for preset in presets or SCALES:
        begin, folder = time.perf_counter(), work / preset
        if not folder.is_dir():
            convert(out=folder, overrides=changes_of(preset, load_recipe(OWN)), offline=True)
        found = measured(folder, prompts, new_tokens)
        rows += [
            [title_of(preset), temperature, *(number(one["tpf"]) for one in ways.values())]
            for temperature, ways in found.items()
        ]
        reached = bars_of(found) if preset == "best" else []
        bars += reached
        figures = {"prompts": prompts, "new_tokens": new_tokens, "conversion_seconds": conversion_seconds(folder)}
        write(out, {title_of(preset): section(command, time.perf_counter() - begin, reached, {**figures, **found})})
    print(table(rows, left=2))
    print(table([[bar.what, bar.bar, bar.figure, "met" if bar.met else "MISSED"] for bar in bars]))
    sys.exit(0 if all(bar.met for bar in bars) else 3)


if __name__ == "__main__":
    main()
