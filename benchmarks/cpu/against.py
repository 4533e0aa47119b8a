"""Is the embedded base as fast as it was?  This checkout and another one decode in turns; exits 3 if it is slower.

    git clone . ../before && git -C ../before checkout COMMIT
    python -m benchmarks.cpu.against --against ../before

Both run with all defaults in float32 on one thread, each in a process of its own, with one adapter that has learned
nothing: so `self_spec`, a fused chain, shows what its forwards cost.  Writes no file.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import click
from transformers.utils import logging

from benchmarks.common import ROOT, number, say, table
from benchmarks.cpu.checkout import WAYS
from benchmarks.cpu.figures import interleaved, medians
from benchmarks.cpu.subjects import untrained_artifact
from retrofit.eval.speed import ratio_of
from retrofit.named_bases import EMBEDDED

LEAST = 0.98
"""How many times as fast as before, at least."""
WARM = 3
FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@contextmanager
def decoding(root: Path, artifact: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that decodes with a checkout's code."""
    command = [sys.executable, "-P", "-W", "ignore", str(Path(__file__).with_name("checkout.py")), str(artifact)]
    environment = {**os.environ, "PYTHONPATH": str(root.resolve()), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        try:
            yield process
        finally:
            process.terminate()


def turn(process: subprocess.Popen[str], way: str) -> float:
    """Seconds a token."""
    assert process.stdin is not None and process.stdout is not None
    print(way, file=process.stdin, flush=True)
    answer = process.stdout.readline()
    if not answer:
        raise click.ClickException(f"a checkout does not decode {way}; what it said is above")
    return float(answer)


@click.command(help=__doc__)
@click.option("--against", type=FOLDER, required=True, help="Another checkout of this repository.")
@click.option("--turns", type=click.IntRange(1), default=15, show_default=True, help="Of each way and checkout.")
def main(against: Path, turns: int) -> None:
    logging.set_verbosity_error()
    if not (against / "retrofit").is_dir():
        raise click.UsageError(f"{against} is no checkout: it has no folder retrofit")
    rows, slower = [["", "before, ms a token", "now", "times as fast"]], False
    with tempfile.TemporaryDirectory(prefix="retrofit-against-") as folder, ExitStack() as stack:
        artifact = untrained_artifact(Path(EMBEDDED), Path(folder, "artifact"))
        roots = {"before": against, "now": ROOT}
        both = {name: stack.enter_context(decoding(root, artifact)) for name, root in roots.items()}
        for way in WAYS:
            say(f"{way}: {turns} turns")
            calls = {name: partial(turn, process, way) for name, process in both.items()}
            interleaved(calls, WARM)
            found = interleaved(calls, turns)
            faster, times = ratio_of(found, "before", "now"), medians(found)
            rows.append([way, *(number(1000 * times[name]) for name in roots), number(faster)])
            slower = slower or faster < LEAST
    print(table(rows))
    sys.exit(3 if slower else 0)


if __name__ == "__main__":
    main()
