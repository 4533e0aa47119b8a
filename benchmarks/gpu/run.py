"""Measure on a GPU what the project promises there: one command, nothing downloaded, one JSON.

Models of published shapes are made on the device with random weights.  Sections run in order of weight, as many
as fit into --minutes; what is skipped, or breaks, says why.  Writes gpu-NAME.json into $OUT if that is set, else
into results/, after every section.  --dry-run runs the same code on the CPU with tiny shapes, in Triton's
interpreter, and writes only where --out says.  Exits 4 without a GPU, 1 if a section broke, 3 if a bar is missed.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

if TYPE_CHECKING:
    from benchmarks.gpu.bench import Bench

ROOT = Path(__file__).resolve().parents[2]
NO_GPU = 4


class Section(NamedTuple):
    module: str
    needs: float
    """Seconds without which it is not begun."""
    beside_tests: bool = False
    """Whether the tests may run meanwhile: nothing of it is timed."""


SECTIONS: dict[str, Section] = {
    "machine": Section("machine", 5),
    "ar": Section("steps", 15),
    "rows": Section("steps", 20),
    "steps": Section("steps", 20),
    "speed": Section("generate", 70),
    "adapter": Section("steps", 15),
    "selftest": Section("machine", 20, True),
    "lossless": Section("generate", 40, True),
    "small": Section("generate", 40, True),
    "tests": Section("processes", 10, True),
    "exact": Section("steps", 20),
    "attention": Section("kernels", 10),
    "launches": Section("machine", 10),
    "memory": Section("machine", 10),
    "compiled": Section("generate", 60),
    "shapes": Section("steps", 20),
    "gemm": Section("kernels", 15),
}
VERDICTS = {True: "met", False: "MISSED", None: ""}


@click.command(help=__doc__)
@click.option("--only", multiple=True, type=click.Choice(list(SECTIONS)), help="This section only; repeatable.")
@click.option("--list", "listed", is_flag=True, help="Only name the sections, in order.")
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=9.0, show_default=True)
@click.option("--dry-run", is_flag=True, help="Tiny shapes on the CPU; no figure means anything.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for the JSON.  [default: $OUT, or results/]")
@click.option("--commit", help="What to note as the commit where git cannot tell.")
def main(
    only: tuple[str, ...], listed: bool, minutes: float, dry_run: bool, out: Path | None, commit: str | None
) -> None:
    if listed:
        print("\n".join(SECTIONS))
        return
    begin = time.perf_counter()
    if dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before the first kernel is imported
    import torch

    if not dry_run and not torch.cuda.is_available():
        say("error: there is no CUDA GPU here\n--dry-run goes through every section on the CPU, with tiny shapes")
        sys.exit(NO_GPU)
    if not dry_run and "TRITON_INTERPRET" in os.environ:
        del os.environ["TRITON_INTERPRET"]
        say("TRITON_INTERPRET is ignored: kernels run on the GPU")
    wanted = [name for name in SECTIONS if name in only] if only else list(SECTIONS)
    command = " ".join(["python -m benchmarks.gpu", *(f"--only {name}" for name in only)])
    command += (f" --minutes {minutes:g}" if minutes != 9 else "") + (" --dry-run" if dry_run else "")
    machine = {**about_machine(commit), "dry_run": dry_run}
    path = file_for(machine, out, dry_run)
    bench = new_bench(dry_run, begin + 60 * minutes)
    failed = False
    try:
        for name in wanted:
            result = run(name, bench, wanted, {"command": command, "hardware": machine})
            failed |= "error" in result
            if path is not None:
                write(path, name, result)
    finally:
        for process in bench.tests.values():
            process.finish(0)
    print(f"\n{time.perf_counter() - begin:.0f} s" + (f"; wrote {path}" if path is not None else ""))
    sys.exit(1 if failed else 3 if bench.missed and not dry_run else 0)


def new_bench(dry: bool, deadline: float) -> Bench:
    import torch

    from benchmarks.gpu.bench import TINY, Bench, Sizes
    from retrofit.runtime.kernels import interpreter

    if dry:
        interpreter.patch()
        return Bench(torch.device("cpu"), torch.float32, TINY, True, deadline)
    return Bench(torch.device("cuda"), torch.bfloat16, Sizes(), False, deadline)


def run(name: str, bench: Bench, wanted: list[str], about: dict[str, Any]) -> dict[str, Any]:
    """One section, whatever becomes of it: what goes into the file."""
    from benchmarks.gpu.bench import Found

    section, found = SECTIONS[name], Found(bench.dry)
    say(f"== {name} ({bench.left():.0f} s left)")
    begin = time.perf_counter()
    bench.reserved = sum(SECTIONS[later].needs for later in wanted[wanted.index(name) + 1 :])
    result: dict[str, Any] = {**about, "seconds": 0.0, "bars": found.bars, "figures": found.figures}
    if bench.left() < section.needs:
        result["skipped"] = f"{max(0.0, bench.left()):.0f} s were left, it needs {section.needs:.0f}"
        say(f"skipped: {result['skipped']}")
        return result
    try:
        module = import_module(f"benchmarks.gpu.{section.module}")
        if "tests" in wanted and section.beside_tests and name != "tests" and not bench.dry and not bench.tests_begun:
            bench.tests, bench.tests_begun = import_module("benchmarks.gpu.processes").start_tests(bench), True
        getattr(module, name)(bench, found)
    except Exception as error:  # the sections after it are worth as much without it
        result["error"] = "".join(traceback.format_exception(error))[-4000:]
        say(result["error"])
    bench.release()
    result["seconds"] = round(time.perf_counter() - begin, 1)
    for bar in found.bars:
        print("  ".join(filter(None, [f"{bar['what']}:", bar["figure"], f"({bar['bar']})", VERDICTS[bar["met"]]])))
    sys.stdout.flush()
    bench.missed += sum(bar["met"] is False for bar in found.bars)
    return result


def about_machine(commit: str | None) -> dict[str, Any]:
    """`hardware` of retrofit.machine, with the GPU's driver, memory and multiprocessors, CUDA and Triton."""
    import torch

    from retrofit.machine import driver, hardware

    machine = hardware()
    machine["commit"] = machine["commit"] or commit
    machine["versions"]["triton"] = version("triton")
    if torch.cuda.is_available():
        device = torch.cuda.get_device_properties(0)
        machine |= {
            "memory_gib": round(device.total_memory / 2**30, 1), "multiprocessors": device.multi_processor_count,
            "capability": f"{device.major}.{device.minor}", "cuda": torch.version.cuda, "driver": driver(),
        }  # fmt: skip
    return machine


def file_for(machine: dict[str, Any], out: Path | None, dry: bool) -> Path | None:
    """Where the JSON goes; None: nowhere."""
    if dry:
        return out / "gpu-dry-run.json" if out else None
    folder = out or (Path(os.environ["OUT"]) if os.environ.get("OUT") else ROOT / "results")
    name = re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")
    return folder / f"gpu-{name}.json"


def write(path: Path, name: str, result: dict[str, Any]) -> None:
    """Put a section into the file beside others; the file appears whole or not at all.

    A section that was skipped, or broke before it had a figure, does not take the place of an older one.
    """
    sections = json.loads(path.read_text())["sections"] if path.is_file() else {}
    if result["bars"] or name not in sections:
        sections[name] = result
    content = {"sections": {known: sections[known] for known in SECTIONS if known in sections}}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    temporary.replace(path)


def say(message: str) -> None:
    """Progress goes to stderr."""
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
