"""Read mutated files of strangers, thousands of them, and count what must not happen: crashes, hangs, memory.

They are read in a process of its own, under limits; one that ends or stands still counts, and the next goes on behind
it.  The table goes to stdout, the figures of 10,000 cases or more to results/hostile-cpu.json.  Exits 3 if anything
happened.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import click

from benchmarks.common import ROOT, Bar, say, section, table, write

CASES = 10_000
RESULTS = ROOT / "results" / "hostile-cpu.json"
STANDS_STILL = 120
"""Seconds without a word after which a process is taken for hanging, those not counted in which it was stopped."""
BAD = ("crashed", "slow", "memory", "ended", "hung", "missed")


@click.command(help=__doc__)
@click.option("--cases", type=click.IntRange(1), default=CASES, show_default=True)
@click.option("--first", default=0, show_default=True, help="Seed of the first.")
def main(cases: int, first: int) -> None:
    begin = time.perf_counter()
    found: dict[int, str] = {}
    largest = 0
    while len(found) < cases:
        start = first + len(found)
        for line in words(start, first + cases):
            number, outcome, kilobytes = json.loads(line)
            found[number] = outcome
            largest = max(largest, kilobytes)
            if not outcome.startswith(("refused", "harmless", "missed")):
                say(f"case {number}: {outcome}")
            if len(found) % 1000 == 0:
                say(f"{len(found):,} of {cases:,}")
    counts = Counter(outcome.partition(":")[0] for outcome in found.values())
    bad = {name: counts[name] for name in BAD}
    figure = ", ".join(f"{count} {name}" for name, count in bad.items())
    what = f"{cases:,} mutated safetensors and JSON files of artifacts and adapters: crashes, hangs, memory blow-ups"
    bars = [
        Bar(what, "0", figure, not any(bad.values())),
        Bar("the rest", "refused or harmless", f"{counts['refused']:,} refused, {counts['harmless']:,} harmless", True),
        Bar("memory that the readers took beyond what they began with, MB", "stated", f"{largest / 1024:.0f}", None),
    ]
    if cases >= CASES:
        command = f"python -m benchmarks.hostile --cases {cases} --first {first}"
        write(RESULTS, {"hostile": section(command, time.perf_counter() - begin, bars, dict(counts))})
    click.echo(table([["", "bar", "figure"], *([bar.what, bar.bar, bar.figure] for bar in bars)]))
    sys.exit(3 if any(bad.values()) else 0)


def words(start: int, end: int) -> Iterator[str]:
    """Lines of a process that reads the cases from `start` on; the last says how it ended, where not by itself."""
    command = [sys.executable, "-m", "benchmarks.hostile.reader", str(start), str(end)]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in process.stdout or ():
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    number = start
    while number < end:
        line = _next(lines, process.pid)
        if line == "":
            process.kill()
            yield json.dumps([number, "hung", 0])
            return
        if line is None:
            yield json.dumps([number, f"ended: {process.wait()}", 0])
            return
        yield line
        number += 1
    process.wait()


def _next(lines: queue.Queue[str | None], process: int) -> str | None:
    """The next line; None where there will be none; empty where none comes."""
    waited = 0
    while waited < STANDS_STILL:
        try:
            return lines.get(timeout=1.0)
        except queue.Empty:
            waited += not _stopped(process)
    return ""


def _stopped(process: int) -> bool:
    """Whether somebody holds the process still, which is no fault of its own."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"


if __name__ == "__main__":
    main()
