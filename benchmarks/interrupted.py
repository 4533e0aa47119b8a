"""kill -9 a conversion at random moments, run it again, and compare what comes out with an uninterrupted run's.

Every second kill waits until a checkpoint is being written.  Offline, the embedded base on the CPU; live probes decide
which step is published.  The table goes to stdout, progress to stderr, the figures of 10 kills or more to
results/interrupted-cpu.json.  Exits 3 if an adapter differs.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click

from benchmarks.common import ROOT, Bar, say, section, table, write
from retrofit.recipes.training.checkpoint import folder_of

KILLS = 10
RESULTS = ROOT / "results" / "interrupted-cpu.json"
SETTINGS = [
    *("train.steps=24", "train.save_every=1", "train.batch_size=2", "train.anchors=8", "train.warmup=2"),
    *("adapter.rank=4", "data.max_length=64", "data.held_out=4", "train.publish=best"),
    *("train.probe_every=4", "train.probe_prompts=2", "train.probe_tokens=8"),
]


@click.command(help=__doc__)
@click.option("--kills", type=click.IntRange(1), default=KILLS, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
def main(kills: int, seed: int, as_json: bool) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory(prefix="retrofit-interrupted-") as folder:
        straight = Path(folder, "straight")
        begun = begin = time.perf_counter()
        if started(straight).wait() != 0:
            sys.exit("the uninterrupted conversion failed")
        whole = time.perf_counter() - begin
        say(f"uninterrupted: {whole:.1f} s")
        rows = []
        for number in range(kills):
            rows.append(trial(Path(folder, f"killed-{number}"), straight, chance, whole, in_writing=number % 2 == 1))
            say(f"{number + 1}/{kills}: {rows[-1]}")
    equal, writing = (sum(row[key] for row in rows) for key in ("equal", "writing"))
    if kills >= KILLS:
        what = f"kill -9 at {kills} random moments, {writing} while writing a checkpoint; resumed = uninterrupted"
        bars = [Bar(what, "all sha256 equal", f"{equal}/{kills}", equal == kills)]
        command = f"python -m benchmarks.interrupted --kills {kills} --seed {seed}"
        write(RESULTS, {"interrupted": section(command, time.perf_counter() - begun, bars, {"kills": rows})})
    if as_json:
        click.echo(json.dumps({"kills": rows, "equal": equal, "of": kills}, indent=2))
    else:
        cells = [[f"{r['seconds']:.2f}", r["left"], str(r["writing"]), str(r["equal"])] for r in rows]
        click.echo(table([["killed after s", "newest checkpoint", "while writing one", "adapter equal"], *cells]))
        click.echo(f"\n{equal} of {kills} adapters have the sha256 of the uninterrupted run's")
    sys.exit(0 if equal == kills else 3)


def trial(out: Path, straight: Path, chance: random.Random, whole: float, in_writing: bool) -> dict[str, Any]:
    """Kill a conversion once, at any moment of it, and let a second one go on."""
    latest = 0.95 * whole
    while (killed := kill(out, chance.uniform(0.1 * whole, latest), in_writing)) is None:
        shutil.rmtree(out)  # it was faster than the uninterrupted one and had ended
        latest = 0.8 * latest
    if started(out).wait() != 0:
        sys.exit(f"the conversion did not go on after {killed}")
    return {**killed, "equal": sha256(out) == sha256(straight) and not folder_of(out).exists()}


def kill(out: Path, moment: float, in_writing: bool) -> dict[str, Any] | None:
    """Seconds it ran, and what the killed conversion left; None for one that had ended."""
    begin = time.perf_counter()
    process = started(out)
    while process.poll() is None and time.perf_counter() - begin < moment:
        time.sleep(0.0005)
    while in_writing and process.poll() is None and not half_written(out):
        pass
    process.kill()
    if process.wait() >= 0:
        return None
    return {"seconds": round(time.perf_counter() - begin, 2), "left": newest(out), "writing": half_written(out)}


def started(out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "retrofit.cli.main", "convert", *SETTINGS, "-o", str(out), "-q", "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def half_written(out: Path) -> bool:
    """Whether a checkpoint of `out` is being written, or was when its process was killed."""
    folder = folder_of(out)
    try:
        return any(path.suffix == ".part" for path in folder.iterdir())
    except FileNotFoundError:
        return False


def newest(out: Path) -> str:
    return max((path.name for path in folder_of(out).glob("step-*")), default="none")


def sha256(out: Path) -> list[str]:
    """Of the adapter and the heads."""
    names = ("adapter/adapter_model.safetensors", "heads.safetensors")
    return [hashlib.sha256((out / name).read_bytes()).hexdigest() for name in names]


if __name__ == "__main__":
    main()
