"""A real model in few bits a weight, from the command line to its certificate.  `python -m benchmarks.quantised`

    used        each kind converted for 20 steps and decoded from: it works, or is refused by name
    weighed     what its weights take, and a process that loads and runs them
    certified   by `retrofit certify`, of fewer texts than it takes unless --whole names the kind
    drafts      tau of the adapter that ships, and of short trainings on plain weights and on quantised ones

SmolLM2-135M-Instruct in bfloat16, on the CPU, one thread, offline; wants the packages of the extras smollm2,
bitsandbytes, torchao and compressed-tensors, and nvidia-mtbench-evaluator.  What is finished is written to
results/quantised.json at once and not run again.  Exits 3 if a bar is missed.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from transformers.utils import logging

from benchmarks.common import ROOT, Bar, say, section, write
from benchmarks.drafts.__main__ import sections_of
from benchmarks.quantised import commands, drafting
from benchmarks.quantised.bases import COMPRESSED, subjects
from benchmarks.quantised.drafting import CELLS, Setting
from benchmarks.quantised.tables import CERTIFIED, DRAFTS, STAGES, USED, WEIGHED
from retrofit.errors import RetrofitError
from retrofit.quantised.methods import KINDS

WORK = ROOT / "out" / "quantised"
RESULTS = ROOT / "results" / "quantised.json"

NAMED = {title.partition(", ")[2]: title for title in STAGES}

Figures = dict[str, Any]


def stage(
    title: str,
    command: str,
    names: Sequence[str],
    measure: Callable[[str], Figures],
    bars_of: Callable[[Figures], list[Bar]],
) -> list[Bar]:
    """Measure what is not there yet, name by name; the section is written after each."""
    say(f"== {title}")
    for name in names:
        known = sections_of(RESULTS).get(title, {"figures": {}, "seconds": 0.0})
        if name in known["figures"]:
            continue
        begin = time.perf_counter()
        figures = {**known["figures"], name: measure(name)}
        seconds = known["seconds"] + time.perf_counter() - begin
        write(RESULTS, {title: section(command, seconds, bars_of(figures), figures)}, STAGES)
        say(f"  {name}: {time.perf_counter() - begin:.0f} s")
    known = sections_of(RESULTS).get(title, {"bars": []})
    return [Bar(**bar) for bar in known["bars"]]


def each(bar_of: Callable[[str, Figures], Bar], found: Figures) -> list[Bar]:
    return [bar_of(name, one) for name, one in found.items()]


class Asked(NamedTuple):
    """What of it is to be measured, and how."""

    kinds: Sequence[str]
    certified_in: str
    whole: Sequence[str]
    drafts: Setting
    work: Path


def measured(stages: Sequence[str], asked: Asked, command: str) -> list[Bar]:
    work = asked.work
    tried = {one.name: one for one in subjects(work) if one.name in asked.kinds}

    def use(name: str) -> Figures:
        return commands.used(tried[name], work / f"{name}-retrofit")

    def weigh(name: str) -> Figures:
        return commands.weighed(work / "plain", name)

    def certify(name: str) -> Figures:
        return commands.certified(work / f"{name}-retrofit", asked.certified_in, name in asked.whole)

    def draft(title: str) -> Figures:
        return drafting.drafted(next(cell for cell in CELLS if cell.title == title), asked.drafts, work)

    weights = ["plain", *(kind for kind in tried if kind in KINDS)]
    cells = [
        cell.title for cell in CELLS if {cell.trained, cell.on} <= {*asked.kinds, drafting.SHIPPED, drafting.PLAIN}
    ]
    known: dict[str, tuple[Sequence[str], Callable[[str], Figures], Callable[[Figures], list[Bar]]]] = {
        USED: (list(tried), use, partial(each, commands.bar_of_use)),
        WEIGHED: (weights, weigh, commands.bars_of_weight),
        CERTIFIED: (list(tried), certify, partial(each, commands.bar_of_certificate)),
        DRAFTS: (cells, draft, drafting.bars_of),
    }
    bars = []
    for title in stages:
        bars += stage(title, command, *known[title])
    return bars


@click.command(help=__doc__)
@click.option("--stages", type=click.Choice(list(NAMED)), multiple=True, help="Some of them.  [default: all]")
@click.option("--kinds", multiple=True, help="What holds the bits.  [default: all]")
@click.option("--whole", multiple=True, help="Kinds that are certified by as many texts as the command takes.")
@click.option("--certified-in", type=click.Choice(["bfloat16", "float32"]), default="bfloat16", show_default=True)
@click.option("--steps", type=click.IntRange(1), default=60, show_default=True, help="Of the short trainings.")
@click.option("--asked", type=click.IntRange(1), default=64, show_default=True, help="Prompts that their bases answer.")
@click.option("--prompts", type=click.IntRange(1), default=24, show_default=True, help="Of MT-bench.")
@click.option("--new-tokens", type=click.IntRange(1), default=48, show_default=True)
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, help="How many.")
@click.option("--work", type=click.Path(path_type=Path), default=WORK, help="For artifacts.  [default: out/quantised]")
@click.option("--weigh", hidden=True, type=click.Path(path_type=Path))
def main(
    stages: tuple[str, ...],
    kinds: tuple[str, ...],
    whole: tuple[str, ...],
    certified_in: str,
    work: Path,
    weigh: Path | None,
    **sizes: int,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if weigh is not None:
        print(json.dumps(commands.weigh(weigh, kinds[0])))
        return
    given = [f"--certified-in {certified_in}", *(f"--whole {kind}" for kind in whole)]
    given += [f"--{key.replace('_', '-')} {value}" for key, value in sizes.items()]
    command = " ".join(["python -m benchmarks.quantised", *given])
    asked = Asked(kinds or (*KINDS, COMPRESSED), certified_in, whole, Setting(**sizes), work)
    try:
        bars = measured([title for name, title in NAMED.items() if not stages or name in stages], asked, command)
    except RetrofitError as error:
        say(f"error: {error}" + (f"\n{error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    for bar in bars:
        print(f"  {bar.what}  {bar.bar}  {bar.figure}{'  MISSED' if bar.met is False else ''}")
    sys.exit(3 if any(bar.met is False for bar in bars) else 0)


if __name__ == "__main__":
    main()
