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

import click

from benchmarks.common import ROOT, Bar, say, section, table, write

CASES = 10_000
RESULTS = ROOT / "results" / "hostile-cpu.json"
STANDS_STILL = 120.0
"""Seconds without a word after which a process is taken for hanging, on a machine that does other things too."""
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


def words(start: int, end: int):  # type: ignore[no-untyped-def]
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
        try:
            line = lines.get(timeout=STANDS_STILL)
        except queue.Empty:
            process.kill()
            yield json.dumps([number, "hung", 0])
            return
        if line is None:
            yield json.dumps([number, f"ended: {process.wait()}", 0])
            return
        yield line
        number += 1
    process.wait()


if __name__ == "__main__":
    main()
