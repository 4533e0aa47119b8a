"""Record what the quickstart prints, and the forwards of one run: results/run-cpu.json, which README.md is drawn from.

Converts the embedded base (minutes), then runs the quickstart's other commands on the artifact, each in a process of
its own, and decodes its prompt once more with `Engine.stream`, whose events are the forwards.  Offline, on the CPU.
Afterwards `python scripts/draw_docs.py` draws what follows from it.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import ROOT, say, section, write
from retrofit.errors import RetrofitError
from retrofit.runtime.engine import Engine

OUT = ROOT / "results" / "run-cpu.json"
ARTIFACT = "tiny-retrofit"
PROMPT = "def read_lines(path):"
TEMPERATURE, SEED = 0.8, 0
SHORT, LONG = 24, 48
"""New tokens of the quickstart's commands, and of the run that is drawn."""
GENERATE = ["generate", ARTIFACT, PROMPT, "--temperature", str(TEMPERATURE), "--max-new-tokens", str(SHORT)]
COMMANDS = [
    ["convert", "-o", ARTIFACT],
    [*GENERATE, "--strategy", "fused"],
    [*GENERATE, "--mode", "ar"],
    GENERATE,
    ["certify", ARTIFACT],
]


@click.command(help=__doc__)
def main() -> None:
    command = "python scripts/record_run.py"
    with tempfile.TemporaryDirectory() as place:
        began = time.perf_counter()
        try:
            printed = [run(arguments, Path(place)) for arguments in COMMANDS]
            middle = time.perf_counter()
            drawn = forwards(Path(place, ARTIFACT))
        except RetrofitError as error:
            say(f"error: {error}")
            sys.exit(error.exit_code)
    seconds = time.perf_counter() - middle
    quickstart = section(command, middle - began, [], {"prompt": PROMPT, "seed": SEED, "printed": printed})
    write(OUT, {"quickstart": quickstart, "forwards": section(command, seconds, [], drawn)})
    say(f"wrote {OUT}")


def run(arguments: list[str], place: Path) -> dict[str, Any]:
    """What a command prints, both streams in their order, without its progress."""
    say(f"retrofit {shlex.join(arguments)}")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "RETROFIT_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "retrofit", *arguments], cwd=place, env=environment, text=True, check=False,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise RetrofitError(f"retrofit {shlex.join(arguments)} ended with {done.returncode}: {done.stdout}")
    lines = [line.rpartition("\r")[2] for line in done.stdout.rstrip("\n").split("\n")]
    return {"command": f"retrofit {shlex.join(arguments)}", "lines": [line for line in lines if "%|" not in line]}


def forwards(folder: Path) -> dict[str, Any]:
    """The text of each token, forward by forward: drafts that were kept, then the base's own token."""
    with Engine.load(folder, offline=True) as engine:
        events = list(
            engine.stream([PROMPT], strategy="fused", temperature=TEMPERATURE, seed=SEED, max_new_tokens=LONG)
        )
        assert engine.tokenizer is not None
        pieces = [[engine.tokenizer.decode([token]) for token in event.tokens] for event in events]
    result = events[-1].result
    assert result is not None
    stats = {key: value for key, value in result.stats.to_dict().items() if "seconds" not in key}
    if len(pieces) - 1 != result.stats.decode_forwards or not all(pieces):
        raise RetrofitError(f"{len(pieces)} events for {result.stats.decode_forwards} forwards behind the prompt's")
    return {
        "prompt": PROMPT,
        "temperature": TEMPERATURE,
        "seed": SEED,
        "strategy": "fused",
        "forwards": pieces,
        "stats": stats,
    }


if __name__ == "__main__":
    main()
