"""Measure decoding on this machine's CPU with a real model, and print each figure beside its bar.

    speed     `ar` behind short and long prompts, against how it was and against transformers
    steps     what a step that drafts and verifies costs against one of `ar`
    batch     `ar` of 32 requests against left-padded `generate`
    split     where a step's time goes, beside the floor that the memory's bandwidth sets
    bitwise   whether every text is own `ar`'s; written model by model, so that --only measures one anew
    memory    packed against plain products; K/V behind windows

Times are medians of runs in turn.  Exits 3 if a bar is missed.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from transformers.utils import logging

from benchmarks.common import ROOT, Bar, say, section, table, write
from benchmarks.cpu.bitwise import bitwise
from benchmarks.cpu.memory import held, memory
from benchmarks.cpu.speed import batch, contexts
from benchmarks.cpu.steps import costs, parts_table, split
from benchmarks.cpu.subjects import DTYPES, Task, untrained_artifact

Found = tuple[list[Bar], dict[str, Any]]
SECTIONS: dict[str, Callable[[Task], Found | Iterator[Found]]] = {
    "speed": contexts,
    "steps": costs,
    "batch": batch,
    "split": split,
    "bitwise": bitwise,
    "memory": memory,
}
RESULTS = ROOT / "results" / "cpu.json"
VERDICTS = {True: "met", False: "MISSED", None: ""}
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(help=__doc__)
@click.option("--model", type=FOLDER, required=True, help="A model as transformers saves it.")
@click.option("--artifact", type=FOLDER, help="One of that model.  [default: an adapter that has learned nothing]")
@click.option("--sections", default=",".join(SECTIONS), show_default=True, help="Which, with commas.")
@click.option("--quick", is_flag=True, help="One type, fewer turns, lengths and families.")
@click.option("--full", is_flag=True, help="bitwise: every batch at every temperature.")
@click.option("--only", multiple=True, help="bitwise: this model only, by its folder's name or its family; repeatable.")
@click.option("--dtype", multiple=True, type=click.Choice(DTYPES), help="[default: both; with --quick bfloat16]")
@click.option("--out", type=click.Path(path_type=Path), help="[default: results/cpu.json, unless --quick]")
@click.option("--job", hidden=True)
def main(
    model: Path,
    artifact: Path | None,
    sections: str,
    quick: bool,
    full: bool,
    only: tuple[str, ...],
    dtype: tuple[str, ...],
    out: Path | None,
    job: str | None,
) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    names = sections.split(",")
    if unknown := set(names) - set(SECTIONS):
        raise click.UsageError(f"no such section: {', '.join(sorted(unknown))}")
    path = out or (None if quick else RESULTS)
    with tempfile.TemporaryDirectory(prefix="retrofit-cpu-") as folder:
        given = artifact or untrained_artifact(model, Path(folder, "artifact"))
        task = Task(model, given, quick, full, only, dtype)
        if job is not None:
            print(json.dumps(held(task, job)))
            return
        bars = []
        for name in [name for name in SECTIONS if name in names]:
            say(f"== {name}")
            begin = time.perf_counter()
            measured = SECTIONS[name](task)
            for found, figures in [measured] if isinstance(measured, tuple) else measured:
                bars += found
                print(table([[b.what, b.bar, b.figure, VERDICTS[b.met]] for b in found], left=3), flush=True)
                if name == "split":
                    print(table(parts_table(figures)), flush=True)
                if path is not None:
                    command = commanded(model, artifact, name, full, dtype)
                    new = section(command, time.perf_counter() - begin, found, figures)
                    kept = with_others(new, path) if name == "bitwise" else new
                    write(path, {named(name): kept}, [named(each) for each in SECTIONS])
        task.close()
    if path is not None:
        say(f"wrote {path}")
    missed = sum(bar.met is False for bar in bars)
    print(f"\n{sum(bar.met is True for bar in bars)} bars met, {missed} missed")
    sys.exit(3 if missed else 0)


def with_others(new: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The section `bitwise` with a model measured anew, and the others as the file has them.

    Each model's figures say what they were measured on and with; the section's say it of the last.
    """
    sections = json.loads(path.read_text())["sections"] if path.is_file() else {}
    old = sections.get(named("bitwise"), {"bars": [], "figures": {}})
    bars = {bar["what"]: bar for bar in [*old["bars"], *new["bars"]]}
    return {**new, "bars": list(bars.values()), "figures": {**old["figures"], **new["figures"]}}


def named(name: str) -> str:
    """A section in the results, where those of other programs have the same names."""
    return f"CPU, {name}"


def commanded(model: Path, artifact: Path | None, name: str, full: bool, dtypes: tuple[str, ...]) -> str:
    """How to measure a section again."""
    types = "".join(f" --dtype {one}" for one in dtypes)
    given = f" --artifact {artifact.name}" if artifact else ""
    return f"python -m benchmarks.cpu --model {model.name}{given} --sections {name}{' --full' if full else ''}{types}"


if __name__ == "__main__":
    main()
