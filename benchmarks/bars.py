"""`make bars`: measure the figures the project promises and print each beside its bar.

Offline, on the CPU.  Without --artifact the embedded base is converted afresh first.  The figures go to
results/bars-cpu.json, a section measured anew replacing its older self; with fewer prompts than 64 only
where --out says so.  Exits 3 if a bar is missed.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from benchmarks.common import ROOT, convert_default, say, table
from benchmarks.sections import NEED_ARTIFACT, SECTIONS, Bar, Task
from retrofit.errors import RetrofitError
from retrofit.eval.speed import hardware

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
        write(path, measured)
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
    return {
        "command": command,
        "hardware": hardware(),
        "seconds": round(time.perf_counter() - begin, 1),
        "bars": [asdict(bar) for bar in bars],
        "figures": figures,
    }


def write(path: Path, measured: dict[str, Any]) -> None:
    """Put the measured sections into the file, beside older ones; the file appears whole or not at all."""
    old = json.loads(path.read_text())["sections"] if path.is_file() else {}
    merged = {name: measured.get(name, old.get(name)) for name in SECTIONS}
    content = {"sections": {name: section for name, section in merged.items() if section is not None}}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, indent=2) + "\n")
    temporary.replace(path)


if __name__ == "__main__":
    main()
