"""`make bars`: measure the figures the project promises and print each beside its bar.

Offline, on the CPU.  Without --artifact the embedded base is converted afresh first.  The figures go to
results/bars-cpu.json, a section measured anew replacing its older self; with fewer prompts than 64 only
where --out says so.  Exits 3 if a bar is missed.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.common import ROOT, Bar, convert_default, say, section, table, write
from benchmarks.sections import NEED_ARTIFACT, SECTIONS, Task
from retrofit.errors import RetrofitError

PROMPTS = 64
RESULTS = ROOT / "results" / "bars-cpu.json"
VERDICTS = {True: "met", False: "MISSED", None: ""}


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="This section only; repeatable.")
@click.option("--artifact", type=click.Path(path_type=Path), help="Use this artifact instead of a fresh one.")
@click.option("--prompts", type=click.IntRange(1), default=PROMPTS, show_default=True, help="How many.")
@click.option("--out", type=click.Path(path_type=Path), help="[default: results/bars-cpu.json]")
def main(only: tuple[str, ...], artifact: Path | None, prompts: int, out: Path | None) -> None:
    wanted = [name for name in SECTIONS if name in only] if only else list(SECTIONS)
    path = out or (RESULTS if prompts == PROMPTS else None)
    command = " ".join(["python -m benchmarks.bars", *(f"--only {name}" for name in only)])
    command += f" --prompts {prompts}" if prompts != PROMPTS else ""
    command += f" --artifact {artifact.name}" if artifact else ""
    try:
        folder = artifact or ROOT / "out" / "bars"
        if artifact is None and set(wanted) & set(NEED_ARTIFACT):
            say("converting the embedded base (a few minutes)")
            convert_default(folder)
        measured = {name: run(name, task, command) for task in [Task(folder, prompts)] for name in wanted}
    except RetrofitError as error:
        say(f"error: {error}" + (f"\n{error.hint}" if error.hint else ""))
        sys.exit(error.exit_code)
    if path is None:
        say(f"not written: {prompts} prompts, and no --out")
    else:
        write(path, measured, list(SECTIONS))
        say(f"wrote {path}")
    bars = [Bar(**bar) for section in measured.values() for bar in section["bars"]]
    missed = sum(bar.met is False for bar in bars)
    print(f"\n{sum(bar.met is True for bar in bars)} bars met, {missed} missed")
    sys.exit(3 if missed else 0)


def run(name: str, task: Task, command: str) -> dict[str, Any]:
    """Measure one section, print its bars, return what goes into the file."""
    say(f"== {name}")
    begin = time.perf_counter()
    bars, figures = SECTIONS[name](task)
    print(table([[b.what, b.bar, b.figure, VERDICTS[b.met]] for b in bars]), flush=True)
    return section(command, time.perf_counter() - begin, bars, figures)


if __name__ == "__main__":
    main()
